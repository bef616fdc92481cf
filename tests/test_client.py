import gzip
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tenacity import wait_none

from search_e1.errors import ConfigError, RetrievalError
from search_e1.retrieval import client as module
from search_e1.retrieval.base import Hit, Retriever
from search_e1.retrieval.client import HttpRetriever
from search_e1.runs.http import TransientError
from search_e1.types import Passage
from serving import Reply, good, hit, misbehaving


@contextmanager
def client(url: str, timeout: float = 5.0, attempts: int = 3, **more: Any) -> Iterator[HttpRetriever]:
    with HttpRetriever(url, timeout=timeout, attempts=attempts, **more) as retriever:
        retriever._server.retrying.wait = wait_none()
        yield retriever


def refusal(reply: Reply, timeout: float = 5.0, attempts: int = 3) -> tuple[str, int]:
    """The message, and how many requests the server saw."""
    with misbehaving(reply) as server, client(server.url, timeout, attempts) as retriever:
        with pytest.raises(RetrievalError) as caught:
            retriever.search(["a", "b"], 2)
        message = str(caught.value)
        assert message.startswith(f"{server.url}/retrieve: no passages after ")
        assert "\n" not in message
        return message, len(server.requests)


def test_it_speaks_the_wire_format_of_search_r1() -> None:
    with misbehaving(good) as server, client(server.url) as retriever:
        assert isinstance(retriever, Retriever)
        found = retriever.search(["a", "b", "a"], 2)
        assert [[p.id for p in passages] for passages in found] == [["a-0", "a-1"], ["b-0", "b-1"], ["a-0", "a-1"]]
        assert found[1][1] == Hit(id="b-1", title="b", text="text 1", score=0.0)
        assert retriever.search([], 2) == []
        assert server.requests == [{"queries": ["a", "b"], "topk": 2, "return_scores": True, "path": "/retrieve"}]
        assert retriever.checksum is None


def test_it_keeps_its_connection() -> None:
    with misbehaving(good) as server, client(server.url + "/retrieve/") as retriever:
        for i in range(5):
            retriever.search([f"a{i}"], 1)
        assert len(server.requests) == 5
        assert len(server.connections) == 1


def test_what_search_r1_s_own_servers_leave_out() -> None:
    hits = [{"document": {"id": 7, "contents": "bare"}}, {"document": {"contents": '"T"\nx', "title": "T"}}]
    with misbehaving(lambda *_: answer([hits, []])) as server, client(server.url) as retriever:
        found = retriever.search(["a", "b"], 3)
    # sha256 of '"T"\nx', as sha256sum gives it
    assert found == [
        [Passage(id="7", title="", text="bare"), Passage(id="sha256:842515f9ccff04ee", title="T", text="x")],
        [],
    ]
    assert not isinstance(found[0][0], Hit)


def test_a_server_that_ignores_topk_is_cut_to_it() -> None:
    with misbehaving(lambda r, n: good(r | {"topk": 5})) as server, client(server.url) as retriever:
        retriever.probe(2)
        assert [p.id for p in retriever.search(["a"], 2)[0]] == ["a-0", "a-1"]
        assert [p.id for p in retriever.search(["a"], 3)[0]] == ["a-0", "a-1", "a-2"]
        assert [request["topk"] for request in server.requests] == [2, 2, 3]


@pytest.mark.parametrize("score", [{}, {"score": 0.5}])
def test_both_shapes_of_a_document_are_read(score: dict[str, float]) -> None:
    text = '"T"\nx'
    hits = [{"document": text} | score, {"document": {"contents": "y"}} | score]
    with misbehaving(lambda *_: answer([hits])) as server, client(server.url) as retriever:
        first, second = retriever.search(["a"], 2)[0]
    assert (first.id, first.title, first.text) == ("sha256:842515f9ccff04ee", "T", "x")
    assert (second.title, second.text) == ("", "y")
    assert [getattr(passage, "score", None) for passage in (first, second)] == [score.get("score")] * 2


# What is wrong with an answer: the reply, and the cause that the error names.

SECONDS = 0.3


def slow(request: dict[str, Any], number: int) -> tuple[int, bytes]:
    time.sleep(2 * SECONDS)
    return good(request)


def answer(result: Any) -> tuple[int, bytes]:
    return 200, json.dumps({"result": result}).encode()


def cut(request: dict[str, Any], number: int) -> tuple[Any, ...]:
    _, body = good(request)
    return 200, body[: len(body) // 2], {"Content-Length": str(len(body))}


FAULTS: dict[str, tuple[Reply, str]] = {
    "reset": (lambda *_: (None, b""), "RemoteProtocolError: Server disconnected without sending a response"),
    "garbage": (lambda *_: (None, b"\0\1\2\r\n\r\n"), "RemoteProtocolError: "),
    "slow": (slow, f"no answer within {SECONDS} s"),
    "500": (lambda *_: (500, b"boom"), "status 500 Internal Server Error"),
    "502": (lambda *_: (502, b"<html>"), "status 502 Bad Gateway"),
    "503": (lambda *_: (503, b'{"detail": "too\\nmany"}', {"Retry-After": "0"}), "Unavailable (too many)"),
    "429": (lambda *_: (429, b"", {"Retry-After": "0"}), "status 429 Too Many Requests"),
    "cut short": (cut, "RemoteProtocolError: peer closed connection"),
    "truncated JSON": (lambda r, n: (200, good(r)[1][:-20]), "not a response of /retrieve (the response: Invalid JSON"),
    "no JSON": (lambda *_: (200, b"<html>"), "not a response of /retrieve (the response: Invalid JSON"),
    "no bytes": (lambda *_: (200, b""), "not a response of /retrieve (the response: Invalid JSON"),
    "not gzip": (lambda r, n: (*good(r), {"Content-Encoding": "gzip"}), "a body that cannot be decompressed: "),
    "other keys": (lambda *_: (200, b'{"results": []}'), "not a response of /retrieve (result: Field required)"),
    "null": (lambda *_: answer(None), "not a response of /retrieve (result: Input should be a valid "),
    "a text": (lambda *_: answer([[], "x"]), "(result.1: Input should be a valid "),
    "no contents": (lambda *_: answer([[], [{"document": {"id": 1}}]]), "(result.1.0.document.contents: Field req"),
    "bare documents": (lambda *_: answer([[], [{"id": 1, "contents": "x"}]]), "(result.1.0.document: Field required)"),
    "number as contents": (lambda *_: answer([[], [{"document": {"id": 1, "contents": 2}}]]), "contents: Input sho"),
    "score as text": (lambda *_: answer([[], [hit("a", 0) | {"score": "high"}]]), "(result.1.0.score: Input should"),
    "score NaN": (lambda *_: answer([[], [hit("a", 0) | {"score": float("nan")}]]), "score: Input should be a finite"),
    "infinite score": (lambda *_: answer([[hit("a", 0) | {"score": float("inf")}], []]), "score: Input should be a fi"),
    "one score missing": (lambda *_: answer([[hit("a", 0), hit("a", 1) | {"score": None}], []]), "some passages have a score"),
    "unsorted": (lambda *_: answer([[], [hit("a", 1), hit("a", 0)]]), "passages out of order by score"),
    "twice the same": (lambda *_: answer([[hit("a", 0), hit("a", 0)], []]), "the same passage twice for a query"),
    "too few results": (lambda *_: answer([[]]), "1 results for 2 queries"),
    "too many results": (lambda *_: answer([[], [], []]), "3 results for 2 queries"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_an_error_that_names_url_attempts_and_cause(fault: str) -> None:
    reply, cause = FAULTS[fault]
    message, requests = refusal(reply, timeout=SECONDS if fault == "slow" else 5.0, attempts=2)
    assert " no passages after 2 attempts: " in message
    assert cause in message
    assert message.endswith("; is the server running?") == ("Error: " in cause)
    assert requests == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_fault_that_passes_the_answer_is_right(fault: str) -> None:
    def twice(request: dict[str, Any], number: int) -> tuple[Any, ...]:
        return FAULTS[fault][0](request, number) if number < 2 else good(request)

    with misbehaving(twice) as server, client(server.url, SECONDS if fault == "slow" else 5.0) as retriever:
        found = retriever.search(["a", "b"], 2)
        assert [[p.id for p in passages] for passages in found] == [["a-0", "a-1"], ["b-0", "b-1"]]
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (404, b"", "status 404 Not Found; is it the address of a Search-R1 retrieval server?"),
        (404, b'{"detail": "Not Found"}', "status 404 Not Found; is it the address"),
        (307, b"", "status 307 Temporary Redirect; is it"),
        (422, b'{"detail": "topk: 9 is more than 5"}', "status 422 Unprocessable Entity (topk: 9 is more than 5); is"),
        (422, b'{"detail": [{"msg": "Field required"}]}', "status 422 Unprocessable Entity; is"),
    ],
)
def test_a_refusal_is_final(status: int, body: bytes, says: str) -> None:
    message, requests = refusal(lambda *_: (status, body))
    assert f"no passages after 1 attempt: {says}" in message
    assert requests == 1


def test_an_answer_that_drips_has_no_more_time_than_any_other() -> None:
    """Time-outs between two bytes never end it; only one for the whole request does."""
    done = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not done.wait(0.01):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        dripping = threading.Thread(target=drip, args=(listener,), daemon=True)
        dripping.start()
        with (
            client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=SECONDS, attempts=1) as retriever,
            pytest.raises(RetrievalError, match=r"after 1 attempt: no answer within 0.3 s"),
        ):
            retriever.search(["a"], 1)
        done.set()
        dripping.join(10)


def test_nobody_there_is_found_by_the_probe() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with client(url, attempts=2) as retriever, pytest.raises(RetrievalError) as caught:
        retriever.probe()
    assert str(caught.value).startswith(f"{url}/retrieve: no passages after 2 attempts: ConnectError: ")
    assert str(caught.value).endswith("is the server running?")


def test_the_probe_of_a_good_server_says_nothing() -> None:
    with misbehaving(good) as server, client(server.url) as retriever:
        retriever.probe()
        assert server.requests[0]["topk"] == 1


def test_another_index_behind_the_same_address_is_noticed() -> None:
    checksums = ["a" * 64, "a" * 64, "b" * 64]
    with (
        misbehaving(lambda r, n: (*good(r), {"Search-E1-Index": checksums[n]})) as server,
        client(server.url) as retriever,
    ):
        retriever.probe()
        assert retriever.checksum == "a" * 64
        retriever.search(["a"], 1)
        with pytest.raises(RetrievalError, match=r"index changed while it was in use \(from aaaaaaaaaaaa to bbbb"):
            retriever.search(["b"], 1)


def test_it_works_after_close_and_in_a_forked_child() -> None:
    with misbehaving(good) as server, client(server.url) as retriever:
        retriever.search(["a"], 1)
        retriever.close()
        assert len(retriever.search(["a"], 1)[0]) == 1
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if len(retriever.search(["a", "b"], 1)) == 2 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(retriever.search(["c"], 1)[0]) == 1


def test_a_proxy_is_not_asked_for_what_is_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with misbehaving(good) as server, client(server.url, attempts=1) as retriever:
        assert len(retriever.search(["a"], 1)[0]) == 1


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "nonsense", "http://host:port"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"retrieval\.url = .*write http://host:port"):
        HttpRetriever(url)


@pytest.mark.parametrize("packed", [False, True])
def test_an_answer_without_end_is_refused(monkeypatch, packed: bool) -> None:
    monkeypatch.setattr("search_e1.retrieval.client._RESPONSE_BYTES", 2**20)
    body = b" " * 2**24
    headers = {"Content-Encoding": "gzip"} if packed else {}
    with misbehaving(lambda request, number: (200, gzip.compress(body) if packed else body, headers)) as server:
        with HttpRetriever(server.url) as client, pytest.raises(RetrievalError, match="a response of more than 1 MiB"):
            client.search(["a"], 1)
        assert len(server.requests) == 1  # it is not asked for again


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_document = st.text() | st.fixed_dictionaries(
    {"contents": st.text() | _json}, optional={"id": st.text() | st.integers() | _json}
)
_hit = st.fixed_dictionaries({"document": _document | _json}, optional={"score": st.floats() | _json})
_bodies = st.fixed_dictionaries({"result": st.lists(st.lists(_hit | _json, max_size=4), max_size=3) | _json}) | _json
_bytes = st.binary() | st.tuples(_bodies.map(lambda value: json.dumps(value).encode()), st.integers(0, 9)).map(
    lambda drawn: drawn[0][: len(drawn[0]) - drawn[1] // 3]
)


@settings(max_examples=int(os.environ.get("CASES", "300")), deadline=None, suppress_health_check=list(HealthCheck))
@given(body=_bytes, queries=st.integers(1, 2))
def test_whatever_bytes_a_server_sends_it_is_its_passages_or_one_line(body: bytes, queries: int) -> None:
    try:
        found = module._parse(body, queries, 2)
    except TransientError as error:
        told = str(error)
        assert len(told.splitlines()) == 1
        return
    told = json.loads(body)["result"]
    assert [len(passages) for passages in found] == [min(2, len(hits)) for hits in told]
    for passages, hits in zip(found, told, strict=True):
        for passage, document in zip(passages, (row["document"] for row in hits), strict=False):
            contents = document if isinstance(document, str) else document["contents"]
            assert passage.contents == contents or (passage.title, passage.text) == ("", contents) or "\n" in contents
