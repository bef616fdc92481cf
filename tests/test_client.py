import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from tenacity import wait_none

from search_e1.errors import RetrievalError
from search_e1.retrieval.base import Retriever
from search_e1.retrieval.client import HttpRetriever
from search_e1.types import Passage

Reply = Callable[[dict[str, Any], int], tuple[int, bytes]]
"""Request and its number, from 0 -> status and body."""


class Server:
    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[dict[str, Any]] = []
        self.connections: set[int] = set()


@contextmanager
def serving(reply: Reply) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(request | {"path": self.path})
            server.connections.add(self.client_address[1])
            status, body = reply(request, len(server.requests) - 1)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:
            """A client that has gone away is part of the tests."""

    with Quiet(("127.0.0.1", 0), Handler) as http:
        server = Server(f"http://127.0.0.1:{http.server_port}")
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            http.shutdown()


def hit(query: str, i: int) -> dict[str, Any]:
    return {"document": {"id": f"{query}-{i}", "contents": f'"{query}"\ntext {i}'}, "score": 1.0 - i}


def good(request: dict[str, Any], number: int) -> tuple[int, bytes]:
    result = [[hit(query, i) for i in range(request["topk"])] for query in request["queries"]]
    return 200, json.dumps({"result": result}).encode()


@contextmanager
def client(url: str, timeout: float = 5.0, attempts: int = 3) -> Iterator[HttpRetriever]:
    with HttpRetriever(url, timeout=timeout, attempts=attempts) as retriever:
        retriever._retrying.wait = wait_none()
        yield retriever


def refusal(reply: Reply, timeout: float = 5.0, attempts: int = 3) -> tuple[str, int]:
    """The message, and how many requests the server saw."""
    with serving(reply) as server, client(server.url, timeout, attempts) as retriever:
        with pytest.raises(RetrievalError) as caught:
            retriever.search(["a", "b"], 2)
        message = str(caught.value)
        assert message.startswith(f"{server.url}/retrieve: no passages after ")
        assert "\n" not in message
        return message, len(server.requests)


def test_it_speaks_the_wire_format_of_search_r1() -> None:
    with serving(good) as server, client(server.url) as retriever:
        assert isinstance(retriever, Retriever)
        found = retriever.search(["a", "b", "a"], 2)
        assert [[p.id for p in passages] for passages in found] == [["a-0", "a-1"], ["b-0", "b-1"], ["a-0", "a-1"]]
        assert found[1][1] == Passage(id="b-1", title="b", text="text 1")
        assert retriever.search([], 2) == []
        assert server.requests == [{"queries": ["a", "b"], "topk": 2, "return_scores": True, "path": "/retrieve"}]


def test_it_keeps_its_connection() -> None:
    with serving(good) as server, client(server.url + "/retrieve/") as retriever:
        for _ in range(5):
            retriever.search(["a"], 1)
        assert len(server.requests) == 5
        assert len(server.connections) == 1


def test_numbers_as_ids_and_queries_without_passages() -> None:
    body = json.dumps({"result": [[{"document": {"id": 7, "contents": "bare"}, "score": 1}], []]}).encode()
    with serving(lambda request, number: (200, body)) as server, client(server.url) as retriever:
        assert retriever.search(["a", "b"], 3) == [[Passage(id="7", title="", text="bare")], []]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again(status: int) -> None:
    def twice(request: dict[str, Any], number: int) -> tuple[int, bytes]:
        return (status, b"busy") if number < 2 else good(request, number)

    with serving(twice) as server, client(server.url) as retriever:
        assert [p.id for p in retriever.search(["a"], 1)[0]] == ["a-0"]
        assert len(server.requests) == 3


def test_an_error_that_stays_ends_after_all_attempts() -> None:
    message, requests = refusal(lambda request, number: (500, b"boom"))
    assert "no passages after 3 attempts: status 500 Internal Server Error" in message
    assert requests == 3


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (404, b"", "status 404 Not Found; is it the address"),
        (200, b'{"result": [[{"docu', "not an answer of /retrieve (the answer: Invalid JSON"),
        (200, b"<html>", "not an answer of /retrieve"),
        (200, b'{"results": []}', "not an answer of /retrieve (result: Field required)"),
        (200, b'{"result": [[], [{"document": {"id": "1"}}]]}', "(result.1.0.document.contents: Field required)"),
        (200, b'{"result": [[], "x"]}', "(result.1: Input should be a valid "),
        (200, b'{"result": [[]]}', "1 results for 2 queries"),
        (
            200,
            json.dumps({"result": [[], [hit("a", i) for i in range(3)]]}).encode(),
            "3 passages for a query where at most 2",
        ),
    ],
)
def test_rubbish_is_refused_at_once(status: int, body: bytes, says: str) -> None:
    message, requests = refusal(lambda request, number: (status, body))
    assert "no passages after 1 attempt: " in message
    assert says in message
    assert requests == 1


def test_a_slow_server_times_out() -> None:
    def slow(request: dict[str, Any], number: int) -> tuple[int, bytes]:
        time.sleep(0.5)
        return good(request, number)

    message, requests = refusal(slow, timeout=0.05, attempts=2)
    assert "no passages after 2 attempts: ReadTimeout: timed out" in message
    assert requests == 2


def test_nobody_there_is_found_by_the_probe() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with client(url, attempts=2) as retriever, pytest.raises(RetrievalError) as caught:
        retriever.probe()
    assert str(caught.value).startswith(f"{url}/retrieve: no passages after 2 attempts: ConnectError: ")
    assert str(caught.value).endswith("is the server running?")


def test_the_probe_of_a_good_server_says_nothing() -> None:
    with serving(good) as server, client(server.url) as retriever:
        retriever.probe()
        assert server.requests[0]["topk"] == 1


def test_it_waits_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    with serving(lambda request, number: (503, b"")) as server, HttpRetriever(server.url, attempts=4) as retriever:
        monkeypatch.setattr(retriever._retrying, "sleep", waits.append)
        with pytest.raises(RetrievalError, match="after 4 attempts"):
            retriever.search(["a"], 1)
    assert [low <= wait <= low + 0.2 for low, wait in zip((0.2, 0.4, 0.8), waits, strict=True)] == [True] * 3


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "nonsense", "http://host:port"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(RetrievalError, match=r"retrieval\.url = .*write http://host:port"):
        HttpRetriever(url)
