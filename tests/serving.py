"""Servers for tests: ours over an index that does as it is told, and one that misbehaves as it is told."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from search_e1.retrieval.base import Hit


class FakeIndex:
    """Finds passages that name query and rank; every call waits until ``open`` is set."""

    checksum = "c0ffee" * 10 + "0000"

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], int]] = []
        self.entered = threading.Semaphore(0)
        """Released at the beginning of every call."""
        self.open = threading.Event()
        self.open.set()

    def __len__(self) -> int:
        return 1000

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        self.calls.append((list(queries), topk))
        self.entered.release()
        assert self.open.wait(10)
        if "break" in queries:
            raise ValueError("broken\nindex")
        return [
            [Hit(id=f"{q}-{i}", title=f"t {q}", text=f"text {i}", score=1.5 - i) for i in range(topk)] if q else []
            for q in queries
        ]


@contextmanager
def serving(index: Any, **limits: Any) -> Iterator[str]:
    """The URL of our retrieval server over ``index``, run in a thread."""
    from search_e1.retrieval import server

    settings = server.Settings(**limits)
    with serving_app(server.make_app(index, settings), settings) as url:
        yield url


@contextmanager
def serving_app(app: Any, limits: Any) -> Iterator[str]:
    """The URL of an application, run in a thread."""
    from search_e1.serving import listening

    with listening.bind("127.0.0.1", 0) as bound:
        bound.listen(listening.BACKLOG)
        port = bound.getsockname()[1]
        running = listening.make_server(app, limits)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            running.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


Reply = Callable[[dict[str, Any], int], tuple[Any, ...]]
"""Request and its number, from 0 -> status, body, and perhaps headers. ``None`` as status cuts the connection."""


class Misbehaving:
    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[dict[str, Any]] = []
        self.connections: set[int] = set()


@contextmanager
def misbehaving(reply: Reply) -> Iterator[Misbehaving]:
    """A server that answers what ``reply`` returns, whatever that is."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, request: dict[str, Any]) -> None:
            with lock:
                number = len(server.requests)
                request |= {"path": self.path}
                server.requests.append(request)
            server.connections.add(self.client_address[1])
            status, body, *more = reply(request, number)
            if status is None:
                self.close_connection = True
                self.wfile.write(body)
                return
            headers = {"Content-Length": str(len(body))} | (more[0] if more else {})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = int(headers["Content-Length"]) > len(body)

        def log_message(self, *args: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *args: object) -> None:
            """A client that has gone away is part of the tests."""

    lock = threading.Lock()
    with Quiet(("127.0.0.1", 0), Handler) as http:
        server = Misbehaving(f"http://127.0.0.1:{http.server_port}")
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            http.shutdown()


def hit(query: str, i: int) -> dict[str, Any]:
    return {"document": {"id": f"{query}-{i}", "contents": f'"{query}"\ntext {i}'}, "score": 1.0 - i}


def good(request: dict[str, Any], number: int = 0) -> tuple[int, bytes]:
    result = [[hit(query, i) for i in range(request["topk"])] for query in request["queries"]]
    return 200, json.dumps({"result": result}).encode()
