"""The rules of the HTTP client, held for both who use it: the retrieval client, and the client of models' endpoints."""

import gzip
import json
import logging
import resource
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tenacity import wait_none

from scripted import generate
from search_e1.config import Prompts
from search_e1.errors import ConfigError, EndpointError, RetrievalError, SearchE1Error
from search_e1.retrieval import client as retrieval
from search_e1.retrieval.client import HttpRetriever
from search_e1.rollout.engines import remote
from search_e1.rollout.engines.endpoint import Endpoint, EndpointEngine
from search_e1.runs import http
from serving import Reply, good, misbehaving
from test_endpoint import completion

KEY = "sk-4f9a8b7c6d5e4f3a"
Ask = Callable[..., str]
"""URL -> what a client of it says: the answer, or the error."""


def ask_retriever(url: str, *, timeout: float = 5.0, attempts: int | None = 2, time_limit: float = 30.0) -> str:
    with HttpRetriever(url, timeout, attempts, time_limit) as client:
        client._server.retrying.wait = wait_none()
        return client.search(["a"], 1)[0][0].text


def ask_endpoint(url: str, **settings: Any) -> str:
    engine = EndpointEngine(Endpoint(url, "m", **{"timeout": 5.0, "attempts": 2} | settings), Prompts())
    engine.server.retrying.wait = wait_none()
    with engine.server:
        [said] = generate(engine, [engine.tokenizer.encode("x")], max_new_tokens=50, temperature=0.0, stop=())
    return engine.tokenizer.decode(said.ids)


ASK: dict[str, Ask] = {"retriever": ask_retriever, "endpoint": ask_endpoint}
BODY = {"retriever": good({"queries": ["a"], "topk": 1})[1], "endpoint": completion("text 0")[1]}
ERROR = {"retriever": RetrievalError, "endpoint": EndpointError}
both = pytest.mark.parametrize("who", ASK)


def failing(who: str, reply: Reply, url: Callable[[str], str] = str, **settings: Any) -> tuple[str, int]:
    """The one line of the error, and how many requests were sent."""
    with misbehaving(reply) as server:
        with pytest.raises(ERROR[who]) as caught:
            ASK[who](url(server.url), **settings)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value), len(server.requests)


@both
@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "application/json; charset=base64"},  # an encoding, but of no text
        {"Content-Type": "application/json; charset=undefined"},
        {"Content-Type": "application/json; charset=rot13"},
        {"Content-Type": "application/json; charset=no such thing"},
        {"Content-Encoding": "undefined"},
        {"Content-Encoding": "gzip"},
        {"Content-Encoding": "deflate"},
    ],
)
def test_whatever_charset_a_server_names_it_is_read_as_utf8(who: str, headers: dict[str, str]) -> None:
    pack = {"gzip": gzip.compress, "deflate": zlib.compress}.get(headers.get("Content-Encoding", ""), bytes)
    with misbehaving(lambda *_: (200, pack(BODY[who]), headers)) as server:
        assert "text 0" in ASK[who](server.url)
    message, _ = failing(who, lambda *_: (400, pack(b'{"error": {"message": "na\xc3\xafve"}}'), headers))
    assert "status 400 Bad Request (na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve)" in message


@both
@pytest.mark.parametrize("status", [200, 400, 500])
@pytest.mark.parametrize("nested", [b"[" * 200_000, b'{"error":' * 200_000, b'{"choices":[{"message":' * 100_000])
def test_json_of_any_depth_is_no_answer(who: str, status: int, nested: bytes) -> None:
    message, requests = failing(who, lambda *_: (status, nested))
    assert ("not a" in message) if status == 200 else (f"status {status} " in message)
    assert requests == (1 if status == 400 else 2)


ENDLESS = {
    "plain": ({}, b" " * 65536),
    "gzip": ({"Content-Encoding": "gzip"}, gzip.compress(b" " * 2**27)),
    "gzip in gzip": ({"Content-Encoding": "gzip, gzip"}, gzip.compress(gzip.compress(b" " * 2**27))),
    "gzip members": ({"Content-Encoding": "gzip"}, gzip.compress(b"") * 3000),
}


@contextmanager
def pouring(headers: dict[str, str], piece: bytes) -> Iterator[tuple[str, list[int]]]:
    """A server whose answer never ends, and what it has sent, in bytes."""
    sent, listener = [0], socket.create_server(("127.0.0.1", 0))

    def pour() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                try:
                    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                    connection.sendall(f"HTTP/1.1 200 OK\r\n{lines}Transfer-Encoding: chunked\r\n\r\n".encode())
                    while True:
                        connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
                        sent[0] += len(piece)
                except OSError:
                    continue

    threading.Thread(target=pour, daemon=True).start()
    with listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", sent


@both
@pytest.mark.parametrize("kind", ENDLESS)
def test_an_answer_without_end_takes_bounded_memory_and_is_refused(who: str, kind: str, monkeypatch) -> None:
    monkeypatch.setattr(retrieval, "_RESPONSE_BYTES", 2**22)
    monkeypatch.setattr(remote, "_RESPONSE_BYTES", 2**22)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pouring(*ENDLESS[kind]) as (url, sent):
        with pytest.raises(ERROR[who], match=r"after 1 attempt: a response of more than 4 MiB; is it the right server\?"):
            ASK[who](url, timeout=60.0)
        assert sent[0] < 2**25  # what was read, and what sockets hold
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@both
def test_a_body_that_is_cut_short_or_not_packed_as_it_says_is_no_answer(who: str) -> None:
    packed = gzip.compress(BODY[who])
    for body in (packed[:-9], BODY[who], b"\x1f\x8b"):
        message, requests = failing(who, lambda *_, body=body: (200, body, {"Content-Encoding": "gzip"}))
        assert "after 2 attempts: a body that cannot be decompressed: " in message
        assert requests == 2


@both
def test_an_answer_that_drips_has_no_more_time_than_any_other(who: str) -> None:
    with (
        pouring({}, b"") as (url, _),  # an empty chunk ends the body
        pytest.raises(ERROR[who]),
    ):
        ASK[who](url, timeout=0.3)

    def drip(request: dict[str, Any], number: int) -> tuple[Any, ...]:
        time.sleep(1)
        return 200, BODY[who]

    message, _ = failing(who, drip, timeout=0.3, attempts=1)
    assert "after 1 attempt: no answer within 0.3 s" in message


# Secrets.

ECHOES: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "JSON": lambda secret: (401, json.dumps({"error": {"message": f"Incorrect API key provided: {secret}."}}).encode()),
    "detail": lambda secret: (403, json.dumps({"detail": f"no rights: {secret}"}).encode()),
    "text": lambda secret: (401, f"bad key {secret}".encode()),
    "at the cut": lambda secret: (401, f"{'x' * 190} {secret}".encode()),
    "in pieces of lines": lambda secret: (401, f"bad\nkey\t{secret}\x1b[0m".encode()),
    "a bad header": lambda secret: (None, f"HTTP/1.1 200 OK\r\n{secret}\r\n\r\n".encode()),
    "error with status 200": lambda secret: (200, json.dumps({"error": {"message": f"for {secret}"}}).encode()),
}


@pytest.mark.parametrize("echo", ECHOES)
def test_a_key_that_an_endpoint_echoes_is_masked(echo: str, monkeypatch, caplog) -> None:
    monkeypatch.setenv(remote.API_KEY, KEY)
    caplog.set_level(logging.INFO)
    message, _ = failing("endpoint", lambda *_: ECHOES[echo](KEY), attempts=5)
    assert KEY[:8] not in message
    assert not [record for record in caplog.records if KEY in record.getMessage()]


def test_a_key_that_is_echoed_in_an_answer_is_masked(monkeypatch) -> None:
    monkeypatch.setenv(remote.API_KEY, KEY)
    with misbehaving(lambda *_: completion(f"your key is {KEY}")) as server:
        assert ask_endpoint(server.url) == "your key is ***"


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize(
    "url",
    [
        lambda url: url.replace("http://", f"http://me:{KEY}@"),
        lambda url: f"{url}/retrieve?api_key={KEY}",
        lambda url: f"{url}/retrieve?x=1&{KEY}",
        lambda url: f"{url}/{KEY}/retrieve",
    ],
)
def test_a_secret_of_a_url_is_masked_in_errors_and_warnings(echo: str, url: Callable[[str], str], caplog) -> None:
    caplog.set_level(logging.WARNING)
    message, _ = failing("retriever", lambda *_: ECHOES[echo](KEY), url, attempts=6)
    assert KEY[:8] not in message
    assert KEY[:8] not in caplog.text


def test_during_an_outage_no_warning_tells_the_password(caplog) -> None:
    down = [(503, b"")] * 5
    with misbehaving(lambda r, n: down.pop() if down else good(r)) as server:
        ask_retriever(server.url.replace("http://", f"http://me:{KEY}@"), attempts=None)
    assert [record.message.partition("/retrieve")[2] for record in caplog.records if record.name.startswith("search_e1")] == [
        ": status 503 Service Unavailable; retrying for up to 30 s",
        " answers again",
    ]
    assert KEY not in caplog.text
    assert "http://***@127.0.0.1" in caplog.text


def test_httpx_is_not_given_a_password_to_log(caplog) -> None:
    caplog.set_level(logging.INFO)
    with misbehaving(good) as server:
        ask_retriever(server.url.replace("http://", f"http://me:{KEY}@"))
    assert [record for record in caplog.records if record.name == "httpx"]
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    "url",
    [
        f"ftp://me:{KEY}@host", f"me:{KEY}@host:8000", f"http://me:{KEY}/@host", f"host:8000?api_key={KEY}", f"http://h:x/{KEY}",
        f"http://?token={KEY}", f"//{KEY}", f"http://[{KEY}]",
    ],
)  # fmt: skip
@both
def test_a_url_that_is_refused_tells_no_secret(who: str, url: str) -> None:
    with pytest.raises(ConfigError, match=r"write http://host:port") as caught:
        ASK[who](url)
    assert KEY[:8] not in str(caught.value)


def test_an_endpoint_s_query_is_sent_and_masked() -> None:
    message, _ = failing("endpoint", lambda *_: (404, b""), lambda url: f"{url}/x?api-version=2&api-key={KEY}")
    assert "/x/chat/completions?api-version=2&api-key=***: status 404" in message
    with misbehaving(lambda *_: completion("a")) as server:
        ask_endpoint(f"{server.url}/x?api-version=2")
        assert server.requests[0]["path"] == "/x/chat/completions?api-version=2"


# Waiting.


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Waits are recorded and not waited for."""
    slept: list[float] = []
    made = http.Server.__init__

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    def init(server: http.Server, *args: Any, **settings: Any) -> None:
        made(server, *args, **settings)
        server.retrying.sleep = sleep

    monkeypatch.setattr(http.Server, "__init__", init)
    yield slept


@both
def test_it_waits_as_it_is_told_from_the_first_request_on(who: str, monkeypatch, caplog) -> None:
    limited: list[tuple[Any, ...]] = [(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "15"})] * 6
    with recorded(monkeypatch) as slept, misbehaving(lambda *_: limited.pop() if limited else (200, BODY[who])) as server:
        ask = HttpRetriever(server.url, time_limit=600).probe if who == "retriever" else lambda: ask_patiently(server.url)
        ask()
    assert slept == [15] * 6
    warned = [record.message for record in caplog.records if record.name.startswith("search_e1")]
    assert len(warned) == 1
    assert "status 429 Too Many Requests (slow down); waiting 15 s as requested" in warned[0]


def ask_patiently(url: str) -> str:
    engine = EndpointEngine(Endpoint(url, "m"), Prompts())
    with engine.server:
        [said] = generate(engine, [engine.tokenizer.encode("x")], max_new_tokens=50, temperature=0.0, stop=())
    return engine.tokenizer.decode(said.ids)


def test_an_endpoint_that_is_not_there_is_found_soon_and_one_that_goes_is_waited_for(monkeypatch) -> None:
    with recorded(monkeypatch) as slept:
        with pytest.raises(EndpointError, match="no answer after 4 attempts: ConnectError"):
            ask_patiently("http://127.0.0.1:1")
        assert len(slept) == 3
        slept.clear()
        replies = [completion("a"), *[(503, b"")] * 9, completion("b")]
        with misbehaving(lambda _, number: replies[number]) as server:
            engine = EndpointEngine(Endpoint(server.url, "m"), Prompts())
            for _ in range(2):
                generate(engine, [engine.tokenizer.encode("x")], max_new_tokens=5, temperature=0.0, stop=())
            engine.server.close()
        assert len(slept) == 9


def test_a_wait_beyond_the_limit_is_refused_in_words() -> None:
    told = "after 1 attempt: status 429 Too Many Requests; it asks to wait 86400 s, longer than the limit of 600 s"
    with misbehaving(lambda *_: (429, b"", {"Retry-After": "86400"})) as server:
        with pytest.raises(EndpointError, match=told):
            ask_patiently(server.url)
        assert len(server.requests) == 1


def test_a_quota_that_is_used_up_is_final() -> None:
    told = b'{"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}'
    message, requests = failing("endpoint", lambda *_: (429, told), attempts=9)
    assert "status 429 Too Many Requests (You exceeded your current quota); check" in message
    assert requests == 1


def test_more_requests_than_httpx_has_connections_by_default() -> None:
    """All are in flight together: none waits for a connection while its time runs."""
    arrived = threading.Barrier(120, timeout=20)

    def reply(*_: Any) -> tuple[int, bytes]:
        arrived.wait()
        return completion("a")

    with misbehaving(reply) as server:
        engine = EndpointEngine(Endpoint(server.url, "m", concurrency=120), Prompts())
        prompts = [engine.tokenizer.encode(f"x{i}") for i in range(120)]
        assert len(generate(engine, prompts, max_new_tokens=5, temperature=0.0, stop=())) == 120
        engine.server.close()


def test_errors_are_ours() -> None:
    assert all(issubclass(error, SearchE1Error) for error in ERROR.values())
