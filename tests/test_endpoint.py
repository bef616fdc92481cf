"""Endpoints of OpenAI's chat completions: the same protocols at the level of text, and all that can go wrong."""

import json
from typing import Any

import pytest
from tenacity import wait_none

from conftest import PASSAGES, TinyRetriever
from scripted import generate
from search_e1.config import EvaluationConfig, Prompts, RolloutConfig
from search_e1.errors import ConfigError, EndpointError
from search_e1.evaluation.evaluate import evaluate
from search_e1.rollout.engines.endpoint import Endpoint, EndpointEngine
from search_e1.rollout.engines.remote import API_KEY, key_headers
from search_e1.rollout.engines.words import Words
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import starts
from search_e1.types import ActionKind, Question, StopReason, Trajectory
from serving import Misbehaving, misbehaving

LIMITS = RolloutConfig(max_searches=2, topk=1, max_action_tokens=50, max_observation_tokens=60, max_tokens=400)
TAGS = Prompts(instruction="Q: {question}", correction="\nNo.\n")
TOOLS = Prompts(protocol="tools", instruction="Q: {question}", correction="No.")
QUESTION = Question(id="q", text="Mayor of Bel?", answers=("Cor Dun",))


def completion(content: str | None, *, calls=(), tokens: int | None = 7, finish: str = "stop", **message: Any):
    made = [{"id": f"x{i}", "type": "function", "function": dict(zip(("name", "arguments"), c, strict=True))}
            for i, c in enumerate(calls)]  # fmt: skip
    message |= {"role": "assistant", "content": content} | ({"tool_calls": made} if made else {})
    usage = {} if tokens is None else {"usage": {"completion_tokens": tokens}}
    return 200, json.dumps({"choices": [{"message": message, "finish_reason": finish}], **usage}).encode()


OVERFLOW = (400, b'{"error": {"message": "This model\'s maximum context length is 10 tokens."}}')


def play(prompts: Prompts, *replies, limits: RolloutConfig = LIMITS, **settings) -> tuple[Trajectory, Misbehaving]:
    with misbehaving(lambda request, number: replies[min(number, len(replies) - 1)]) as server:
        generator = EndpointEngine(Endpoint(server.url, "m", **settings), prompts)
        generator.server.retrying.wait = wait_none()
        begun = starts(generator.tokenizer, prompts, [QUESTION])
        [done] = rollout(generator, TinyRetriever(PASSAGES), begun, limits, temperature=0.5, seed=0, prompts=prompts)
        return done, server


def test_tags_are_messages_and_the_stop_string_is_put_back() -> None:
    search = completion("<think>hm</think> <search> mayor Bel")
    t, server = play(TAGS, search, completion("So <answer> Cor Dun"))
    assert (t.answer, t.reward, t.searches, t.sampled_tokens) == ("Cor Dun", 1.0, 1, 14)
    assert t.turns[0].action_text == "<think>hm</think> <search> mayor Bel</search>"
    assert t.turns[0].sampling_logprobs is None
    first, second = server.requests
    assert first["path"] == "/v1/chat/completions"
    asked = {"role": "user", "content": "Q: Mayor of Bel?"}
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("m", 0.5, 50)
    assert first["stop"] == ["</search>", "</answer>"]
    assert first["messages"] == [asked]
    assert second["messages"] == [
        asked,
        {"role": "assistant", "content": "<search> mayor Bel</search>"},
        {"role": "user", "content": t.turns[0].observation_text.strip()},
    ]
    assert "Doc 1(Title: Bel) Bel is a city with mayor Cor Dun." in t.turns[0].observation_text


def test_tools_are_the_endpoints_own() -> None:
    ask = ("search", '{"query": "mayor Bel"}')
    t, server = play(
        TOOLS,
        completion(None, calls=[ask], finish="tool_calls", reasoning_content="I need Bel."),
        completion("", calls=[ask, ask], finish="tool_calls"),
        completion("It is <answer>Cor Dun</answer>."),
    )
    assert [turn.kind for turn in t.turns] == [ActionKind.SEARCH, ActionKind.MALFORMED, ActionKind.ANSWER]
    assert (t.answer, t.reward, t.searches) == ("Cor Dun", 1.0, 1)
    assert t.turns[0].action_text.startswith("<think>\nI need Bel.\n</think>\n\n<tool_call>")
    last = server.requests[2]["messages"]
    assert server.requests[0]["tools"][0]["function"]["name"] == "search"
    assert "stop" not in server.requests[0]
    assert [m["role"] for m in last] == ["user", "assistant", "tool", "assistant", "tool", "tool"]
    assert last[1]["tool_calls"][0]["function"]["arguments"] == '{"query": "mayor Bel"}'
    assert last[2]["tool_call_id"] == last[1]["tool_calls"][0]["id"]
    assert last[2]["content"] == "Doc 1(Title: Bel) Bel is a city with mayor Cor Dun."
    assert [m["content"] for m in last[4:]] == ["No.", "No."]


@pytest.mark.parametrize(
    ("replies", "reason", "turns"),
    [
        ([completion("x " * 20, finish="length")], StopReason.MALFORMED, 3),
        ([completion(None)], StopReason.MALFORMED, 3),
        ([completion("", calls=[("browse", "{}")])], StopReason.MALFORMED, 3),
        ([completion("", calls=[("search", "{rubbish")])], StopReason.MALFORMED, 3),
        ([completion("", calls=[("search", '{"query": "x"}')]), OVERFLOW], StopReason.MAX_TOKENS, 2),
        ([completion("", calls=[("search", '{"query": "mayor Bel"}')])], StopReason.MAX_TURNS, 3),
        ([completion("x " * 900, tokens=None)], StopReason.ANSWERED, 1),
    ],
)
def test_a_bad_output_is_data(replies, reason: StopReason, turns: int) -> None:
    t, _ = play(TOOLS, *replies)
    assert (t.stop_reason, len(t.turns)) == (reason, turns)
    assert all(len(turn.action_ids) <= LIMITS.max_action_tokens for turn in t.turns)


@pytest.mark.parametrize(
    ("reply", "message", "requests"),
    [
        ((500, b"oops"), "no answer after 3 attempts: status 500", 3),
        ((200, b"<html>"), "no answer after 3 attempts: not an answer of /v1/chat/completions", 3),
        ((200, b'{"choices": []}'), "not an answer of", 3),
        ((200, b'{"choices": [{"message": {"content": 3}}]}'), "not an answer of", 3),
        ((None, b""), "no answer after 3 attempts: .*; is the server running", 3),
        (
            (401, b'{"error": {"message": "bad\\nkey \\u001b[31m"}}'),
            r"status 401 Unauthorized \(bad key \[31m\); check --endpoint",
            1,
        ),
        ((404, b""), "status 404 Not Found; check", 1),
        ((200, b"{", {"Content-Length": "50"}), "no answer after 3 attempts", 3),
    ],
)
def test_an_endpoint_that_fails_is_one_line(reply, message: str, requests: int) -> None:
    seen: list[int] = []

    def replying(request, number):
        seen.append(number)
        return reply

    with misbehaving(replying) as server:
        generator = EndpointEngine(Endpoint(server.url, "m", timeout=0.5, attempts=3), TAGS)
        generator.server.retrying.wait = wait_none()
        with pytest.raises(EndpointError, match=message) as caught:
            generate(generator, [generator.tokenizer.encode("x")], max_new_tokens=5, temperature=0.0, stop=())
    assert "\n" not in str(caught.value)
    assert len(seen) == requests


def test_what_passes_is_tried_again() -> None:
    t, server = play(TAGS, (503, b""), (None, b""), completion("<answer>Cor Dun"))
    assert t.answer == "Cor Dun"
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://x:1", "http://x:1/v1/chat/completions"),
        ("http://x:1/v1/", "http://x:1/v1/chat/completions"),
        ("https://x/api/v2", "https://x/api/v2/chat/completions"),
        ("http://x/v1/chat/completions", "http://x/v1/chat/completions"),
    ],
)
def test_addresses(url: str, address: str) -> None:
    assert Endpoint(url, "m").address == address


@pytest.mark.parametrize("url", ["x", "ftp://x", "http://", "http://a:b@x/v1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--endpoint"):
        EndpointEngine(Endpoint(url, "m"), TAGS)


def test_the_key_is_sent_and_nothing_else_is(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    assert key_headers() == {}
    monkeypatch.setenv(API_KEY, " sk-1 ")
    assert key_headers() == {"Authorization": "Bearer sk-1"}
    monkeypatch.setenv(API_KEY, "sk\n1")
    with pytest.raises(ConfigError, match=API_KEY):
        EndpointEngine(Endpoint("http://x", "m"), TAGS)


@pytest.mark.parametrize("tokens", [None, 0, 1, 2, 5, 40])
def test_words_keep_the_text_and_the_count(tokens: int | None) -> None:
    words, text = Words(), "  So, <search>日本 naïve</search>\n\n"
    ids = words.said(text, tokens, 30)
    assert words.decode(ids) == text
    assert len(ids) == {None: 12, 0: 1, 40: 30}.get(tokens, tokens)
    told = words("a b\n")
    assert "".join("a b\n"[a:b] for a, b in told["offset_mapping"]) == words.decode(told["input_ids"]) == "a b\n"


def test_an_evaluation(tmp_path) -> None:
    def reply(request, number):
        return completion("<answer>Cor Dun" if "Bel" in request["messages"][0]["content"] else "<answer>x")

    questions = [QUESTION, Question(id="p", text="Of Fen?", answers=("Gil Hor",))]
    with misbehaving(reply) as server:
        generator = EndpointEngine(Endpoint(server.url, "m"), TAGS)
        config = EvaluationConfig(samples=0, latency=0)
        found = evaluate(generator, TinyRetriever(PASSAGES), {"b": questions}, TAGS, config, LIMITS, seed=0, out=tmp_path)
    assert (found.em, found.tokens) == (0.5, 7)
