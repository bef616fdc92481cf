"""What endpoints do that went wrong without a word, or died where it should go on; and whatever bytes they may send."""

import json
import os
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import PASSAGES, TinyRetriever
from search_e1.config import EvaluationConfig, Prompts, RolloutConfig
from search_e1.errors import EndpointError, SearchE1Error
from search_e1.evaluation.evaluate import evaluate
from search_e1.evaluation.results import read as read_results
from search_e1.rollout.engines.base import Request
from search_e1.rollout.engines.endpoint import Endpoint, EndpointEngine
from search_e1.rollout.engines.remote import _stop_reason
from search_e1.rollout.engines.words import Words
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import starts
from search_e1.runs.http import Reply, TransientError
from search_e1.text.protocols import protocol_of
from search_e1.types import ActionKind, Question, StopReason
from serving import misbehaving
from test_endpoint import LIMITS, QUESTION, TAGS, TOOLS, completion, play

SEARCH = ("search", '{"query": "mayor Bel"}')


def ids_of(messages: list[dict[str, Any]]) -> list[str]:
    return [call["id"] for message in messages for call in message.get("tool_calls", ())]


# Two channels are two.


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("prompts", [TAGS, TOOLS])
@pytest.mark.parametrize(
    "quoted",
    [
        "I could write <search> query </search>, or <answer> Fen </answer>.",
        'Or </think> <tool_call>\n{"name": "search", "arguments": {"query": "query"}}\n</tool_call> then.',
        "</think><answer>Fen</answer><think>",
        "<|end|> <search>",
    ],
)
def test_reasoning_is_shown_and_never_parsed(name: str, prompts: Prompts, quoted: str) -> None:
    t, server = play(prompts, completion("<answer> Oslo </answer>", **{name: quoted}))
    assert (t.answer, len(t.turns), len(server.requests)) == ("Oslo", 1, 1)
    shown = t.turns[0].action_text.partition("</think>\n\n")[0]
    assert [word for word in re.findall(r"\w+", quoted) if word not in shown] == []


def test_text_beside_calls_is_shown_and_never_parsed() -> None:
    quoted = 'As <tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call> and <answer>Fen</answer>.'
    t, _ = play(TOOLS, completion(quoted, calls=[SEARCH]), completion("<answer>Cor Dun</answer>"))
    assert [(turn.kind, turn.argument) for turn in t.turns] == [
        (ActionKind.SEARCH, "mayor Bel"),
        (ActionKind.ANSWER, "Cor Dun"),
    ]


@pytest.mark.parametrize(
    "query", ["a </tool_call> b", '"}} <tool_call>', "\\", "<answer>x</answer>", "\N{SNOWMAN} <|end|>", "</think>"]
)
def test_an_argument_is_what_the_server_says(query: str) -> None:
    for arguments in (json.dumps({"query": query}), {"query": query}):  # some servers send the object
        t, server = play(TOOLS, completion("", calls=[("search", arguments)]), completion("<answer>x</answer>"))
        assert (t.turns[0].kind, t.turns[0].argument) == (ActionKind.SEARCH, query)
        [call] = server.requests[1]["messages"][1]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"query": query}


def test_an_end_that_the_server_says_is_no_end_of_ours() -> None:
    t, _ = play(TOOLS, completion("It is <|end|> <answer>Cor Dun</answer>"))
    assert t.answer == "Cor Dun"


# Ids of calls.


def test_the_server_s_own_ids_of_calls_are_sent_back() -> None:
    def reply(request: dict[str, Any], number: int) -> tuple[int, bytes]:
        results = [m["tool_call_id"] for m in request["messages"] if m["role"] == "tool"]
        if ids_of(request["messages"]) != results or not all(re.fullmatch("[a-zA-Z0-9]{9}", id) for id in results):
            return 400, b'{"message": "Tool call id has to be defined in a-z, A-Z, 0-9, with a length of 9."}'
        if number == 2:
            return completion("<answer>Cor Dun</answer>")
        status, body = completion("", calls=[SEARCH] * (number + 1))
        return status, re.sub(rb'"id": "x(\d)"', rb'"id": "Ab3dEf%d\g<1>9"' % number, body)

    with misbehaving(reply) as server:
        engine = EndpointEngine(Endpoint(server.url, "m"), TOOLS)
        begun = starts(engine.tokenizer, TOOLS, [QUESTION])
        [t] = rollout(engine, TinyRetriever(PASSAGES), begun, LIMITS, temperature=0.0, seed=0, prompts=TOOLS)
        engine.server.close()
    assert t.answer == "Cor Dun"
    assert ids_of(server.requests[2]["messages"]) == ["Ab3dEf009", "Ab3dEf109", "Ab3dEf119"]


@pytest.mark.parametrize("own", [b'"id": null', b'"id": ""'])
def test_calls_without_an_id_get_ones_that_any_server_takes_and_that_differ(own: bytes) -> None:
    status, body = completion("", calls=[SEARCH])
    body = re.sub(rb'"id": "x\d"', own, body)
    _, server = play(TOOLS, (status, body), (status, body), completion("<answer>x</answer>"))
    ids = ids_of(server.requests[2]["messages"])
    assert len(set(ids)) == 2
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", id) for id in ids)


# Refusals.

ERRORS = {  # as these servers write them
    "OpenAI": {"message": "...", "type": "invalid_request_error", "param": "messages", "code": "context_length_exceeded"},
    "vLLM": {"message": "This model's maximum context length is 4096 tokens. However, you requested 4600 tokens", "code": 400},
    "llama.cpp": {"code": 400, "message": "request (4390 tokens) exceeds the available context size (4096 tokens), try", "type":
                  "exceed_context_size_error"},
    "llama.cpp, at times": {"code": 500, "message": "Context size has been exceeded.", "type": "server_error"},
    "SGLang": {"message": "The input (61709 tokens) is longer than the model's context length (40960 tokens).", "code": 400},
    "TGI": {"message": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000"},
    "Mistral": {"message": "Prompt contains 40000 tokens, too large for model with 32768 maximum context length"},
    "llama-cpp-python": {"message": "Requested tokens (2285) exceed context window of 2048", "code": None},
}  # fmt: skip


@pytest.mark.parametrize("server", ERRORS)
@pytest.mark.parametrize("status", [400, 413, 422, 500])
@pytest.mark.parametrize("form", [lambda error: {"error": error}, lambda error: {"object": "error", **error}])
def test_a_context_that_is_too_long_ends_that_trajectory(server: str, status: int, form: Callable[..., Any]) -> None:
    told = (status, json.dumps(form(ERRORS[server])).encode())
    t, asked = play(TOOLS, completion("", calls=[SEARCH]), told)
    assert (t.stop_reason, t.searches, len(asked.requests)) == (StopReason.MAX_TOKENS, 1, 2)


@pytest.mark.parametrize(
    "message",
    [
        "Prompt length of 5016 is longer than the maximum model length of 4096.",  # vLLM V1
        "The prompt (total length 25938) is too long to fit into the model (context length 4096). Make sure that",
        "max_tokens must be at least 1, got -186.",
        "input length and `max_tokens` exceed context limit: 199759 + 8192 > 200000, decrease input length",
        "litellm.BadRequestError: " + "x" * 300 + " This model's maximum context length is 4096 tokens.",  # a proxy's preface
    ],
)
def test_what_other_servers_say_of_a_context_that_is_too_long(message: str) -> None:
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error"}}).encode()
    assert _stop_reason(Reply(400, httpx.Headers(), body, "")) is StopReason.MAX_TOKENS


@pytest.mark.parametrize(
    "message",
    [
        "'stop' is not supported in this context",
        "max_tokens is too large: this model supports at most 4096 completion tokens, whatever the context",
        "unknown parameter context_length",
        "content filters cannot be configured",
    ],
)
def test_any_other_refusal_stops_the_stage_with_the_server_s_words(message: str) -> None:
    told = (400, json.dumps({"error": {"message": message, "code": "unsupported_parameter"}}).encode())
    for replies in ([told], [completion("<search>x"), told]):
        with pytest.raises(EndpointError, match=re.escape(f"status 400 Bad Request ({message}); check --endpoint")):
            play(TAGS, *replies)


FILTERS = {
    "Azure": (400, {"error": {"message": "The response was filtered due to the prompt triggering Azure OpenAI's content "
              "management policy. Please modify your prompt", "type": None, "param": "prompt", "code": "content_filter",
              "innererror": {"code": "ResponsibleAIPolicyViolation"}}}),
    "Azure's inner code": (400, {"error": {"code": "400", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}),
    "OpenAI": (400, {"error": {"message": "Invalid prompt: your prompt was flagged as potentially violating our usage policy.",
               "code": "invalid_prompt"}}),
    "OpenRouter": (403, {"error": {"message": "Your input was flagged", "code": "moderation_blocked"}}),
    "DeepSeek": (400, {"error": {"message": "Content Exists Risk", "type": "invalid_request_error", "code": None}}),
    "finish reason": (200, {"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]}),
    "refusal": (200, {"choices": [{"message": {"content": None, "refusal": "I'm sorry, I can't help with that."}}]}),
}  # fmt: skip


def sixty(reply: Callable[[int], tuple[int, bytes]], tmp_path, count: int = 60) -> tuple[Any, list[Any], list[int]]:
    """An evaluation by an endpoint that says ``reply`` to a question's number, its results, and how often each was asked."""
    questions = [Question(id=f"q{i}", text=f"Number {i}?", answers=("Cor Dun",)) for i in range(count)]
    asked = [0] * count

    def replying(request: dict[str, Any], _: int) -> tuple[int, bytes]:
        number = int(re.findall(r"Number (\d+)\?", request["messages"][0]["content"])[0])
        asked[number] += 1
        return reply(number)

    with misbehaving(replying) as server:
        engine = EndpointEngine(Endpoint(server.url, "m"), TAGS)
        config, out = EvaluationConfig(samples=0, latency=0), tmp_path / "evaluation"
        out.mkdir()
        with engine.server:
            found = evaluate(engine, TinyRetriever(PASSAGES), {"b": questions}, TAGS, config, LIMITS, seed=0, out=out)
    return found, list(read_results(out / "questions.jsonl")), asked


@pytest.mark.parametrize("kind", FILTERS)
def test_a_question_refused_by_a_content_filter_is_no_answer_counted_and_named(kind: str, tmp_path, caplog) -> None:
    status, told = FILTERS[kind]
    refused = (status, json.dumps(told).encode())
    found, results, asked = sixty(lambda i: refused if i == 7 else completion("<answer>Cor Dun"), tmp_path, 20)
    assert found.em == 19 / 20
    assert dict(found.stop_reasons) == {StopReason.ANSWERED: 19, StopReason.REFUSED: 1}
    [result] = [result for result in results if result.stop_reason is StopReason.REFUSED]
    assert (result.id, result.answer, result.em, result.failure) == ("q7", None, 0.0, "refused")
    assert asked == [1] * 20
    assert "question 'q7': refused by the endpoint (" in caplog.text


@pytest.mark.parametrize("told", [FILTERS["Azure"], FILTERS["finish reason"], (400, {"error": ERRORS["vLLM"]})])
@pytest.mark.parametrize("count", [3, 60])
def test_where_all_of_the_first_requests_are_refused_the_stage_stops(told: tuple[int, Any], count: int, tmp_path) -> None:
    reply = (told[0], json.dumps(told[1]).encode())
    words = "maximum context length is 4096" if "vLLM" in str(told) or "However" in str(told) else "filter"
    with pytest.raises(EndpointError, match=rf"all requests so far \(\d+\) were refused: .*{words}.*; check --endpoint"):
        sixty(lambda _: reply, tmp_path, count)


# Work that grows no faster than what is said.

LONG = {
    "words": "word " * 600_000,
    "thinking opened": "<think>" * 400_000,
    "thinking closed": "</think>" * 400_000,
    "thinking": "<think></think>" * 200_000,
    "calls opened": "<tool_call>" * 300_000,
    "calls closed": "</tool_call>" * 300_000,
    "searches opened": "<search>" * 400_000,
    "searches and answers opened": "<search><answer>" * 200_000,
    "spaces": " " * 3_000_000,
    "brackets": "<" * 3_000_000,
    "one word": "x" * 3_000_000,
}


@pytest.mark.parametrize("prompts", [TAGS, TOOLS])
@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("channel", ["content", "reasoning_content", "arguments"])
def test_megabytes_are_cut_at_the_limit_of_an_action(kind: str, prompts: Prompts, channel: str) -> None:
    """So all that is done with an action has a bound; before, it took over 40 s and 1.8 GB."""
    engine = EndpointEngine(Endpoint("http://x", "m"), prompts)
    request = Request(0, engine.tokenizer.encode("Q"), 50, 0)
    calls = [("search", LONG[kind])] if channel == "arguments" else ()
    message = {} if channel == "arguments" else {channel: LONG[kind]}
    content = message.pop("content", "")
    status, body = completion(content, calls=calls, **message)
    payload = engine._payload(request, 0.0, ())
    done = engine._understood(Reply(status, httpx.Headers(), body, "status 200 OK"), payload)
    said = engine.tokenizer.decode(done.ids)
    assert len(said) <= 64 * 50 + len("</answer>")
    assert len(done.ids) <= 50
    protocol = protocol_of(engine.tokenizer, prompts)
    protocol.parse(said)
    list(protocol.spans(said))
    assert len(json.dumps(engine.tokenizer.messages([*request.prompt, *done.ids]))) < 10 * 64 * 50


def test_thousands_of_calls_are_one_malformed_action() -> None:
    t, server = play(TOOLS, completion("", calls=[SEARCH] * 50_000), completion("<answer>Cor Dun</answer>"))
    assert [turn.kind for turn in t.turns] == [ActionKind.MALFORMED, ActionKind.ANSWER]
    assert len(server.requests[1]["messages"][1]["tool_calls"]) == 16


class Counted(str):
    """Text that counts the characters that are copied out of it."""

    copied = 0

    def __getitem__(self, key: Any) -> Any:
        piece = super().__getitem__(key)
        Counted.copied += len(piece)
        return Counted(piece)

    def __add__(self, other: str) -> "Counted":
        return Counted(super().__add__(other))


@pytest.mark.parametrize("text", ["<think>a</think>" * 20_000, "</think>" * 20_000, "a<think>" * 20_000])
def test_thinking_is_taken_out_in_linear_work(text: str) -> None:
    from search_e1.text.tool_calls import _without_thinking

    Counted.copied = 0
    assert len(_without_thinking(Counted(text), False)) == len(text)
    assert Counted.copied <= 3 * len(text)


# JSON of any depth.


@pytest.mark.parametrize("depth", [150, 900, 5_000, 200_000])
def test_a_call_nested_thousands_deep_is_malformed(depth: int) -> None:
    nested = '{"query": ' + "[" * depth + "]" * depth + "}"
    limits = RolloutConfig.model_validate({**LIMITS.model_dump(), "max_action_tokens": 20_000, "max_tokens": 90_000})
    text = f'<tool_call>{{"name": "search", "arguments": {nested}}}</tool_call>'
    for reply in (completion("", calls=[("search", nested)]), completion(text)):
        t, _ = play(TOOLS, reply, completion("<answer>Cor Dun</answer>"), limits=limits)
        assert [turn.kind for turn in t.turns] == [ActionKind.MALFORMED, ActionKind.ANSWER]


# Whatever comes in.

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_pieces = st.sampled_from(
    ["<search>", "</search>", "<answer>", "</answer>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<|end|>",
     '{"name": "search", "arguments": {"query": "x"}}', '"arguments"', "\\", '"', "\ud800", "\0", "\u202e", " ", "\n", "Oslo"]
)  # fmt: skip
_text = st.lists(_pieces | st.text(st.characters(), max_size=8), max_size=12).map("".join)


def _mostly(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(strategy, strategy, strategy, _json)


_call = st.fixed_dictionaries(
    {"function": _mostly(st.fixed_dictionaries({"name": _mostly(st.sampled_from(["search", "x"]) | _text),
                                                "arguments": _mostly(_text | st.just('{"query": "x"}'))}))},
    optional={"id": _json, "type": _json},
)  # fmt: skip
_message = st.fixed_dictionaries(
    {"content": _mostly(_text | st.none())},
    optional={
        "reasoning_content": _mostly(_text),
        "reasoning": _json,
        "refusal": _json,
        "tool_calls": _mostly(st.lists(_call)),
    },
)
_choice = st.fixed_dictionaries(
    {"message": _mostly(_message)}, optional={"finish_reason": _mostly(st.sampled_from(["stop", "length", "content_filter"]))}
)
_body = st.fixed_dictionaries(
    {"choices": _mostly(st.lists(_choice, max_size=2))},
    optional={"usage": _mostly(st.fixed_dictionaries({"completion_tokens": _json | st.integers(-9, 10**9)})), "error": _json},
)
_errors = st.fixed_dictionaries(
    {"error": _mostly(st.dictionaries(st.sampled_from(["code", "type", "message", "innererror"]), _json))}
)
_bytes = st.one_of(
    st.binary(),
    (_body | _errors | _json).map(lambda value: json.dumps(value).encode()),
    (_body | _errors).map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.tuples((_body | _errors).map(lambda value: json.dumps(value).encode()), st.integers(0, 99)).map(lambda x: x[0][: -x[1]]),
)
CASES = int(os.environ.get("CASES", "300"))


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=_bytes, status=st.sampled_from([200, 200, 200, 201, 204, 301, 400, 401, 413, 429, 500, 999]), tools=st.booleans())
def test_whatever_bytes_an_endpoint_sends_it_is_a_right_reading_or_one_line(body: bytes, status: int, tools: bool) -> None:
    prompts = TOOLS if tools else TAGS
    engine = EndpointEngine(Endpoint("http://x", "m"), prompts)
    payload = engine._payload(Request(0, engine.tokenizer.encode("Q"), 50, 0), 0.0, ())
    words = engine.server._words(status, body)
    assert len(words.splitlines()) == 1
    try:
        done = engine._understood(Reply(status, httpx.Headers(), body, words), payload)
    except (SearchE1Error, TransientError) as error:
        told = str(error)
        assert len(told.splitlines()) == 1
        return
    assert 1 <= len(done.ids) <= 50
    said = engine.tokenizer.decode(done.ids)
    if done.stop:
        assert said == ""
        return
    protocol = protocol_of(engine.tokenizer, prompts)
    action = protocol.parse(said)
    message = json.loads(body)["choices"][0]["message"]
    # What is done is what was said where it counts.
    if action.kind is not ActionKind.MALFORMED and len(said) < 64 * 50:
        counts = str(message.get("content") or "").replace("<|end|>", "(end)")
        if tools and message.get("tool_calls"):
            counts = "".join(json.dumps(json.loads(str(call["function"]["arguments"])), ensure_ascii=False)
                             if action.kind.is_call else "" for call in message["tool_calls"]) or counts  # fmt: skip
        for word in re.findall(r"\w+", action.argument or ""):
            assert word in counts
    list(protocol.spans(said))
    json.dumps(engine.tokenizer.messages([*engine.tokenizer.encode("Q"), *done.ids]))


def test_words_of_several_threads_stay_apart() -> None:
    """A retriever's thread tells while the server's says."""
    from concurrent.futures import ThreadPoolExecutor

    words = Words()
    texts = [f"{i} {j} x{i * j}" for i in range(40) for j in range(40)]
    with ThreadPoolExecutor(4) as pool:
        told, said = pool.map(words.encode, texts), pool.map(lambda text: words.said(text, None, 99), texts)
        assert [words.decode(ids) for ids in told] == texts
        assert [words.decode(ids) for ids in said] == texts
