"""The agent's server under slow, greedy and malformed clients: others are answered, and no 5xx but what is meant."""

import json
import logging
import random
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")

import schemathesis
from hypothesis import HealthCheck, given, settings

from agent_serving import LIMITS, scripted, serving_agent
from conftest import PASSAGES, TinyRetriever, make_tiny_policy
from search_e1.agent.agent import Agent
from test_server_attacks import MALFORMED, answer, connected, dripping, status_of

BODY = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Who is mayor?"}]}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"


def brief() -> Agent:
    """An agent that answers whatever it is asked, in no time."""
    limits = LIMITS.model_copy(update={"max_action_tokens": 5, "max_searches": 1})
    return Agent(make_tiny_policy(), TinyRetriever(PASSAGES), limits, name="tiny")


def served(url: str) -> int:
    with connected(url) as raw:
        raw.sendall(HEAD % len(BODY) + BODY)
        return status_of(raw)


def test_slow_heads_slow_bodies_and_unending_ones() -> None:
    with serving_agent(scripted(), head_timeout=0.3, body_timeout=0.5, max_body_bytes=5000) as url, ExitStack() as clients:
        silent, begun, slow, long = (clients.enter_context(connected(url)) for _ in range(4))
        begun.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
        slow.sendall(HEAD % 1000 + b"{")
        with suppress(ConnectionError):
            long.sendall(HEAD % 10**12 + b" " * 10**6)
        with connected(url) as raw, pytest.raises(ConnectionError):
            dripping(raw)
        assert served(url) == 200
        assert answer(silent) == b""
        assert answer(begun).startswith(b"HTTP/1.1 408 ")
        told = answer(slow)
        assert told.startswith(b"HTTP/1.1 408 ")
        assert json.loads(told.partition(b"\r\n\r\n")[2])["error"]["message"] == "the request did not arrive within 0.5 s"
        assert answer(long)[:12] in (b"HTTP/1.1 413", b"")


def test_streams_that_are_not_read_are_given_up_and_disturb_nobody() -> None:
    # What does not fit between server and client must come: long texts of many passages.
    passages = [passage.model_copy(update={"metadata": {"note": "x" * 2_000_000}}) for passage in PASSAGES]
    agent = scripted(TinyRetriever(passages))
    body = json.dumps(json.loads(BODY) | {"stream": True}).encode()
    with serving_agent(agent, send_timeout=0.5) as url, ExitStack() as clients:
        deaf = [clients.enter_context(connected(url)) for _ in range(8)]
        for raw in deaf:
            raw.sendall(HEAD % len(body) + body)
        begun = time.monotonic()
        assert served(url) == 200
        assert time.monotonic() - begun < 20
        while httpx.get(f"{url}/healthz").json()["under_way"]:
            assert time.monotonic() - begun < 30
        time.sleep(0.6)
        cut = [answer(raw) for raw in deaf]
        assert not any(told.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for told in cut)


def test_a_thousand_connections_take_no_place_from_a_question() -> None:
    with serving_agent(scripted(), connections=20, head_timeout=60, body_timeout=60) as url, ExitStack() as clients:
        for i in range(1000):
            raw = clients.enter_context(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20))
            with suppress(ConnectionError):
                raw.sendall((b"", HEAD % 100 + b"{", b"POST /v1")[i % 3])
            if i % 100 == 50:
                assert served(url) == 200
        assert served(url) == 200


def test_malformed_requests(caplog) -> None:
    rng = random.Random(0)
    requests = [
        request.replace(b"/retrieve", b"/v1/chat/completions").replace(b"Host: x", b"Host: localhost") for request in MALFORMED
    ]
    for _ in range(60):
        broken = bytearray(HEAD % len(BODY) + BODY)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        requests.append(bytes(broken))
    with caplog.at_level(logging.ERROR), serving_agent(brief(), head_timeout=0.3, body_timeout=0.3) as url:
        for request in requests:
            with connected(url) as raw:
                with suppress(ConnectionError):
                    raw.sendall(request)
                    raw.shutdown(socket.SHUT_WR)
                told = answer(raw)
            assert told[:10] in (b"", b"HTTP/1.1 2", b"HTTP/1.1 4"), request
        assert served(url) == 200
    assert caplog.records == []


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving_agent(brief(), max_question_chars=50) as url:
        yield url


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@pytest.mark.filterwarnings("ignore")
def _of_the_schema(case: Any) -> None:
    response = case.call(timeout=20)
    case.validate_response(response)
    assert response.status_code < 500


def test_what_schemathesis_makes_of_the_schema(url: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = {found.ok().path: found.ok() for found in schema.get_all_operations()}
    assert sorted(operations) == [
        "/healthz", "/metrics", "/passages/{id}", "/search", "/v1/chat/completions", "/v1/models", "/v1/models/{id}",
    ]  # fmt: skip
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    for path, operation in operations.items():
        for mode in modes if path == "/v1/chat/completions" else modes[:1]:
            given(case=operation.as_strategy(generation_mode=mode))(_of_the_schema)()
