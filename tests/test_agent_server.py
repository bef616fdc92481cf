"""The agent's server, by the official client and others: answers, streams, refusals, failures, and clients that go away."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")

import openai

from agent_serving import LIMITS, Gated, scripted, serving_agent
from conftest import PASSAGES, TinyRetriever, make_tiny_policy
from search_e1.agent.agent import Agent
from search_e1.agent.answer import NOT_FOUND
from search_e1.types import Passage

ASKED = [{"role": "user", "content": "Who is mayor?"}]
SAID = "<think> It is a city. </think><search> mayor of Bel </search><think> So. </think>"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving_agent(scripted(), max_question_chars=2000, max_body_bytes=10_000) as url:
        yield url


def client(url: str, key: str = "none", retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=retries, timeout=30)


def post(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny", "messages": ASKED} | fields, timeout=30)


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_answer_has_its_sources_its_reasoning_and_what_it_cost(url: str) -> None:
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Before?"}]
    found = client(url).chat.completions.create(model="tiny", messages=[*history, *ASKED])
    [choice] = found.choices
    assert (choice.message.content, choice.finish_reason) == ("Cor Dun", "stop")
    assert choice.message.reasoning_content == SAID
    [annotation] = choice.message.annotations
    cited = annotation.url_citation
    assert (cited.start_index, cited.end_index, cited.title, cited.url) == (0, 7, "Bel", f"{url}/passages/p2")
    own = choice.message.search_e1
    assert (own["answer"], own["found"], own["support"], own["not_read"]) == ("Cor Dun", True, "held", 2)
    assert [(s["id"], s["holds"]) for s in own["sources"]] == [("p2", True), ("p1", False)]
    sampled = sum(len(text) for text in ("<> It is a city. <><> mayor of Bel <>", "<> So. <><> Cor Dun <>"))
    assert found.usage.completion_tokens == own["sampled_tokens"] == sampled - 8  # a tag is one token, and no letters here
    assert found.usage.prompt_tokens > len("Question: Who is mayor?\n") + len(PASSAGES[1].text)
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_a_stream_tells_thoughts_searches_answer_and_usage_in_this_order(url: str) -> None:
    stream = client(url).chat.completions.create(
        model="tiny", messages=ASKED, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(d.get("reasoning_content", "") for d in deltas) == SAID
    kinds = [kind for kind, _ in groupby(next(iter(d)) for d in deltas[1:])]
    assert kinds == ["reasoning_content", "search_e1", "reasoning_content", "content", "annotations"]
    [search] = [d["search_e1"]["search"] for d in deltas if "search" in d.get("search_e1", {})]
    assert search["query"] == "mayor of Bel"
    assert search["passages"] == [
        {"id": id, "title": title, "url": f"{url}/passages/{id}"} for id, title in (("p2", "Bel"), ("p1", "Arda"))
    ]
    assert deltas[-2] == {"content": "Cor Dun"}
    assert deltas[-1]["search_e1"]["answer"]["answer"] == "Cor Dun"
    assert deltas[-1]["annotations"][0]["url_citation"]["url"] == f"{url}/passages/p2"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "stop"]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens > 0) == ([], True)
    raw = post(url, stream=True)
    assert raw.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert raw.text.endswith("data: [DONE]\n\n")


def test_reasoning_can_be_left_out(url: str) -> None:
    whole = post(url, search_e1={"reasoning": False}).json()["choices"][0]["message"]
    assert "reasoning_content" not in whole
    told = post(url, search_e1={"reasoning": False}, stream=True).text
    assert "reasoning_content" not in told
    assert '"search":' in told


def test_what_nothing_holds_is_not_found(url: str) -> None:
    message = post(url, messages=[{"role": "user", "content": [{"type": "text", "text": "Guess?"}]}]).json()["choices"][0][
        "message"
    ]
    assert (message["content"], message["annotations"]) == (NOT_FOUND, [])
    assert (message["search_e1"]["answer"], message["search_e1"]["support"]) == ("Gil Hor", "guess")


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"messages": []}, 400, "messages", "messages: List should have at least 1 item"),
        ({"messages": "Who?"}, 400, "messages", "messages: Input should be a valid array"),
        ({"messages": [{"content": "Who?"}]}, 400, "messages.0.role", "messages.0.role: Field required"),
        ({"messages": [{"role": "system", "content": "Who?"}]}, 400, "messages", "messages: no message of the role user"),
        ({"messages": [{"role": "user", "content": " \n"}]}, 400, "messages[0].content", "messages[0].content: the question"),
        ({"messages": [{"role": "user", "content": 7}]}, 400, "messages[0].content", "messages[0].content: neither a text nor"),
        ({"messages": [{"role": "user", "content": "x" * 2001}]}, 400, "messages[0].content", "messages[0].content: a"),
        ({"messages": [{"role": "user", "content": "x" * 1999}]}, 400, "messages", "question 'asked': a context of 2010"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}]},
            400, "messages[0].content[0]", "messages[0].content[0]: a part of type 'image_url'; a question is text",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "tools: the agent has its own tools"),
        ({"tool_choice": "required"}, 400, "tool_choice", "tool_choice: the agent has its own tools"),
        ({"modalities": ["text", "audio"]}, 400, "modalities", "modalities: it answers in text only; leave it out"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "response_format: it answers in text"),
        ({"n": 2}, 400, "n", "n: there is one answer"),
        ({"n": True}, 400, "n", "n: there is one answer"),
        ({"top_p": 0.9}, 400, "top_p", "top_p: it samples as in its evaluation"),
        ({"logprobs": True}, 400, "logprobs", "logprobs: it reports none"),
        ({"temperature": 3}, 400, "temperature", "temperature: Input should be less than or equal to 2"),
        ({"temperature": "0"}, 400, "temperature", "temperature: Input should be a valid number"),
        ({"max_tokens": 0}, 400, "max_tokens", "max_tokens: Input should be greater"),
        ({"seed": 2**70}, 400, "seed", "seed: Input should be less"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream_options: only with stream"),
        ({"search_e1": {"thinking": False}}, 400, "search_e1.thinking", "search_e1.thinking: Extra inputs"),
        ({"topk": 5}, 400, "topk", "topk: unknown to this server"),
        ({"model": "gpt-5"}, 404, "model", "model: no model 'gpt-5' here, only 'tiny'"),
        ({"user": "x" * 10_000}, 413, None, "the body exceeds 10000 bytes; send less"),
    ],
)  # fmt: skip
def test_what_it_does_not_do_is_refused(url: str, fields: dict[str, Any], status: int, param: str | None, says: str) -> None:
    for stream in (False, True):
        refused = post(url, **({} if "stream_options" in fields else {"stream": stream}), **fields)
        assert refused.status_code == status
        error = refused.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert error["message"].startswith(says)


def test_what_asks_for_nothing_is_taken(url: str) -> None:
    nothing = dict(
        n=1, top_p=1.0, frequency_penalty=0, presence_penalty=0.0, logprobs=False, stop=None, tools=[], tool_choice="none",
        response_format={"type": "text"}, user="me", metadata={"a": "b"}, store=True, temperature=0, seed=3, max_tokens=500,
    )  # fmt: skip
    assert post(url, **nothing).json()["choices"][0]["message"]["content"] == "Cor Dun"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b"null", b'{"model": "tiny"}', b"\xff", b"[" * 9000, b'{"a":' * 1500])
def test_what_is_no_chat_is_refused(url: str, body: bytes) -> None:
    refused = httpx.post(f"{url}/v1/chat/completions", content=body)
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_budget_of_tokens_ends_the_answer() -> None:
    with serving_agent(scripted()) as url:
        short = post(url, max_completion_tokens=50, max_tokens=20).json()
        assert short["usage"]["completion_tokens"] == 20
        assert (short["choices"][0]["finish_reason"], short["choices"][0]["message"]["search_e1"]["answer"]) == ("length", None)
        assert post(url, max_tokens=10_000).json()["choices"][0]["finish_reason"] == "stop"


def test_models_health_routes_and_methods(url: str) -> None:
    assert [model.id for model in client(url).models.list()] == ["tiny"]
    assert client(url).models.retrieve("tiny").owned_by == "search-e1"
    with pytest.raises(openai.NotFoundError, match="no model 'other' here"):
        client(url).models.retrieve("other")
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok", "model": "tiny", "under_way": 0, "waiting": 0}
    missing, wrong = httpx.get(f"{url}/v1/embeddings"), httpx.get(f"{url}/v1/chat/completions")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_url")
    assert (wrong.status_code, wrong.json()["error"]["code"], wrong.headers["allow"]) == (405, "wrong_method", "POST")


def test_passages_of_any_id_and_a_search() -> None:
    ids = ["a/b", "../x", "q?x=1#y", "100%", "é 日", " ", "%2F"]
    passages = [Passage(id=id, title="Bel", text=f"Bel {i}", metadata={"page": i}) for i, id in enumerate(ids)]
    passages.append(Passage(id="u", title="Bel", text="Bel", metadata={"url": "javascript:alert(1)"}))
    with serving_agent(scripted(TinyRetriever(passages))) as url:
        found = httpx.get(f"{url}/search", params={"q": "Bel", "topk": 8}).json()
        assert (found["query"], [p["id"] for p in found["passages"]]) == ("Bel", [*ids, "u"])
        from search_e1.agent.chat_api import Completion

        told = Completion("tiny", url, 0)
        for i, passage in enumerate(passages):
            assert told.url(passage).startswith(f"{url}/passages/")
            assert httpx.get(told.url(passage)).json()["text"] == (f"Bel {i}" if i < len(ids) else "Bel")
        missing = httpx.get(f"{url}/passages/none")
        assert (missing.status_code, missing.json()["error"]["message"]) == (404, "no passage 'none'")
        for wrong in ({"q": " "}, {"q": "x", "topk": 0}, {}):
            refused = httpx.get(f"{url}/search", params=wrong)
            assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_passage_with_an_address_is_cited_by_it() -> None:
    there = Passage(id="p", title="Bel", text="mayor of Bel: Cor Dun", metadata={"url": "https://example.org/b"})
    with serving_agent(scripted(TinyRetriever([there]))) as url:
        [cited] = post(url).json()["choices"][0]["message"]["annotations"]
        assert cited["url_citation"]["url"] == "https://example.org/b"


def test_the_key() -> None:
    with serving_agent(scripted(), key="a-long-key") as url:
        assert (
            client(url, "a-long-key").chat.completions.create(model="tiny", messages=ASKED).choices[0].message.content
            == "Cor Dun"
        )
        for path in ("/v1/models", "/passages/p1", "/search?q=x", "/metrics", "/openapi.json", "/nothing"):
            missing, wrong = httpx.get(url + path), httpx.get(url + path, headers={"Authorization": "Bearer a-long-kez"})
            assert (missing.status_code, missing.json()["error"]["code"]) == (401, "invalid_api_key")
            assert (wrong.status_code, wrong.json()["error"]["message"]) == (401, "a wrong key")
        with pytest.raises(openai.AuthenticationError, match="a wrong key"):
            client(url, "other").chat.completions.create(model="tiny", messages=ASKED)
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert httpx.get(f"{url}/healthz", headers={"Host": "agent.example.org"}).status_code == 200


def test_web_pages_of_others_ask_only_where_they_may(url: str) -> None:
    host = url.partition("://")[2]
    for headers, status in (
        ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Host": "evil.example"}, 421),
        ({"Host": "["}, 421), ({"Origin": f"http://{host}"}, 200),
        ({"Host": "localhost:8000"}, 200), ({"Host": "[::1]:8000"}, 200),
    ):  # fmt: skip
        told = httpx.get(f"{url}/v1/models", headers=headers)
        assert (told.status_code, "access-control-allow-origin" in told.headers) == (status, False), headers
    with serving_agent(scripted(), origins=["https://good.example"]) as url:
        good = {"Origin": "https://good.example", "Access-Control-Request-Method": "POST"}
        asked = httpx.options(f"{url}/v1/chat/completions", headers=good | {"Access-Control-Request-Headers": "authorization"})
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, "https://good.example")
        assert httpx.get(f"{url}/v1/models", headers=good).headers["access-control-allow-origin"] == "https://good.example"
        assert httpx.get(f"{url}/v1/models", headers={"Origin": "https://bad.example"}).status_code == 403


def test_the_page_is_served_under_a_strict_policy(url: str) -> None:
    page = httpx.get(f"{url}/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    script = httpx.get(f"{url}/page/app.js")
    assert (script.status_code, script.headers["content-type"].partition(";")[0]) == (200, "text/javascript")
    assert httpx.get(f"{url}/page/../server.py").status_code == 404
    assert httpx.get(f"{url}/page/%2e%2e/server.py").status_code == 404


def test_a_full_line_a_late_answer_and_a_failed_retriever() -> None:
    gate = Gated()
    limits = LIMITS.model_copy(update={"batch_size": 1})
    waiting = {"messages": [{"role": "user", "content": "Wait?"}]}
    with serving_agent(scripted(gate, limits), max_waiting=1, timeout=20) as url, ThreadPoolExecutor(2) as threads:
        one = threads.submit(post, url, **waiting)
        assert gate.asked.wait(20)
        two = threads.submit(post, url)
        until(lambda: httpx.get(f"{url}/healthz").json()["waiting"] == 1)
        for stream in (False, True):
            full = post(url, stream=stream)
            assert (full.status_code, full.headers["retry-after"], full.json()["error"]["code"]) == (503, "2", "full")
        gate.opened.set()
        assert [f.result().json()["choices"][0]["message"]["content"] for f in (one, two)] == [NOT_FOUND, "Cor Dun"]
        for stream in (False, True):
            failed = post(url, messages=[{"role": "user", "content": "Break?"}], stream=stream)
            assert (failed.status_code, failed.json()["error"]["message"]) == (500, "http://x: no passages after 4 attempts")
        begun = post(url, messages=[{"role": "user", "content": "Then break?"}], stream=True)
        *_, search, error = begun.text.strip().split("data: ")  # no [DONE]
        assert (begun.status_code, "Arda" in search, json.loads(error)) == (200, True, failed.json())
        assert post(url).status_code == 200
        assert 'search_e1_agent_failures_total{why="failed"} 3.0' in httpx.get(f"{url}/metrics").text
    gate = Gated()
    with serving_agent(scripted(gate), timeout=0.2) as url:
        late = post(url, **waiting)
        assert (late.status_code, late.json()["error"]["message"]) == (504, "no answer within 0.2 s")
        with pytest.raises(openai.APIError, match="no answer within"):
            list(client(url).chat.completions.create(model="tiny", stream=True, **waiting))
        gate.opened.set()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_takes_its_question_along(stream: bool) -> None:
    gate, limits = Gated(), LIMITS.model_copy(update={"batch_size": 1})
    agent = scripted(gate, limits)
    with serving_agent(agent) as url:
        asking = {
            "model": "tiny",
            "stream": stream,
            "messages": [{"role": "user", "content": "Then wait?" if stream else "Wait?"}],
        }
        with gone(url, asking) as raw:
            if stream:  # it has begun
                assert raw.recv(100).startswith(b"HTTP/1.1 200 OK")
            assert gate.asked.wait(20)
            assert len(agent._scheduler._jobs) == 1
        until(lambda: not agent._scheduler._jobs)  # while its search still waits
        assert not gate.opened.is_set()
        assert httpx.get(f"{url}/healthz").json()["under_way"] == 0
        gate.opened.set()
        assert post(url).json()["choices"][0]["message"]["content"] == "Cor Dun"


@contextmanager
def gone(url: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request whose client leaves without having read all."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as raw:
        text = json.dumps(body).encode()
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
        yield raw


def test_many_at_once_get_what_each_gets_alone() -> None:
    policy = make_tiny_policy()
    limits = LIMITS.model_copy(update={"max_action_tokens": 30})
    texts = [f"{name} {i}?" for i in range(6) for name in ("Arda", "Bel")]
    with Agent(policy, TinyRetriever(PASSAGES), limits) as agent:
        alone = [agent.ask(text, temperature=0.8, seed=4).as_json() for text in texts]
    agent = Agent(policy, TinyRetriever(PASSAGES), limits, name="tiny")
    with serving_agent(agent) as url, ThreadPoolExecutor(12) as threads:
        ask = client(url).chat.completions.create

        def answered(i: int) -> Any:
            asked = dict(model="tiny", messages=[{"role": "user", "content": texts[i]}], temperature=0.8, seed=4)
            if i % 2:
                return ask(**asked).choices[0].message.search_e1
            last = [c for c in ask(stream=True, **asked) if c.choices][-1]
            return last.choices[0].delta.search_e1["answer"]

        together = list(threads.map(answered, range(len(texts))))
    assert [told | {"not_read": 0} for told in alone] == together


def test_what_is_sampled_is_streamed_as_it_is_sampled_and_is_the_same_in_one_piece() -> None:
    policy = make_tiny_policy()
    agent = Agent(policy, TinyRetriever(PASSAGES), LIMITS, name="tiny")
    with serving_agent(agent) as url:
        lines = post(url, stream=True, temperature=1, seed=2).text.splitlines()
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
        pieces = [d["reasoning_content"] for d in deltas if "reasoning_content" in d]
        assert len(pieces) > 10
        whole = post(url, temperature=1, seed=2).json()["choices"][0]["message"]
        assert "".join(pieces) == whole["reasoning_content"]
        samples = {post(url, temperature=1).json()["choices"][0]["message"]["reasoning_content"] for _ in range(3)}
        assert len(samples) == 3  # without a seed, each is its own


def test_metrics_count_what_was_asked() -> None:
    with serving_agent(scripted()) as url:
        post(url), post(url, stream=True), post(url, messages=[{"role": "user", "content": "Guess?"}]), post(url, n=2)
        told = dict(line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if line[:1] != "#")
    counted = {name.removeprefix("search_e1_agent_"): float(value) for name, value in told.items() if "_created" not in name}
    assert counted['requests_total{status="200"}'] == 3
    assert counted['requests_total{status="400"}'] == 1
    assert counted['answers_total{support="held"}'] == counted["searches_total"] == counted['found_total{found="yes"}'] == 2
    assert counted['answers_total{support="guess"}'] == counted["first_token_seconds_count"] == 1
    assert counted["answer_seconds_count"] == 3
    assert counted["questions_under_way"] == counted["questions_waiting"] == 0


def test_langchain_asks_it(url: str) -> None:
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model="tiny", max_retries=0, stream_usage=True
    )
    found = chat.invoke("Who is mayor?")
    assert (found.text, found.usage_metadata["output_tokens"] > 0) == ("Cor Dun", True)
    parts = list(chat.stream("Who is mayor?"))
    assert "".join(part.text for part in parts) == "Cor Dun"
    with pytest.raises(openai.BadRequestError, match="the agent has its own tools"):
        chat.bind_tools([{"type": "function", "function": {"name": "f", "parameters": {}}}]).invoke("Who is mayor?")


def test_the_server_ends_while_a_question_waits() -> None:
    gate = Gated()
    with ThreadPoolExecutor(1) as threads:
        with serving_agent(scripted(gate), shutdown_timeout=0) as url:
            asked = threads.submit(post, url, messages=[{"role": "user", "content": "Wait?"}])
            assert gate.asked.wait(20)
            threading.Timer(0.5, gate.opened.set).start()
        with pytest.raises(httpx.HTTPError):
            asked.result().raise_for_status()
