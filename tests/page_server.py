"""A stand-in for the agent's server: it serves the page and says what a script tells it to, in the server's format."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

PAGE = files("search_e1.agent") / "page"
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
# As strict as a policy can be: without inline code, and no text may become markup in any way.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)


class Standin:
    """What the server does; a test sets it.

    A script is a list of ("thought", text), ("search", query, passages), ("call", tool, argument, passages),
    ("answer", Answer.as_json()), ("gate",): wait until ``gate`` is set, ("error", error): an error within the stream, ("cut",):
    break the connection off.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.scripts: dict[str, list[tuple[Any, ...]]] = {}
        """By question."""
        self.refusal: tuple[int, dict[str, Any], dict[str, str]] | None = None
        """Status, body and headers of every answer of the API."""
        self.key: str | None = None
        self.passages: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.gate = threading.Event()
        self.aborted = threading.Event()
        """Set when a client has gone away in the middle."""


class _Handler(BaseHTTPRequestHandler):
    standin: Standin  # HTTP/1.0: a connection ends with its answer, and with the server

    def do_GET(self) -> None:
        if self.path == "/" or self.path.startswith("/page/"):
            name = self.path.removeprefix("/page/") if self.path != "/" else "index.html"
            return self._send(200, (PAGE / name).read_bytes(), TYPES[name.rpartition(".")[2]])
        if self._refused():
            return None
        if self.path == "/v1/models":
            return self._json(200, {"object": "list", "data": [{"id": "moby", "object": "model"}]})
        passage = self.standin.passages.get(self.path.removeprefix("/passages/"))
        return self._json(200, passage) if passage else self._json(404, {"error": {"message": "no such passage"}})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        assert request["model"] == "moby"
        assert request["stream"] is True
        [message] = request["messages"]
        self.standin.asked.append(message["content"])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for step in self.standin.scripts[message["content"]]:
                if not self._step(*step):
                    return
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.standin.aborted.set()

    def _step(self, kind: str, *told: Any) -> bool:
        """False when the stream is to end there."""
        if kind == "gate":
            while not self.standin.gate.wait(0.02):
                self.wfile.write(b": still there\n\n")
        elif kind == "thought":
            self._event({"reasoning_content": told[0]})
        elif kind == "search":
            self._event({"search_e1": {"search": {"query": told[0], "passages": told[1]}}})
        elif kind == "call":
            self._event({"search_e1": {"call": {"tool": told[0], "argument": told[1], "passages": told[2]}}})
        elif kind == "answer":
            self._event({"content": told[0]["answer"] or ""})
            self._event({"search_e1": {"answer": told[0]}, "annotations": []}, "stop")
        elif kind == "error":
            self.wfile.write(f"data: {json.dumps({'error': told[0]})}\n\n".encode())
        return kind not in ("error", "cut")

    def _event(self, delta: dict[str, Any], reason: str | None = None) -> None:
        chunk = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        self.wfile.write(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode())

    def _refused(self) -> bool:
        if self.standin.refusal:
            status, body, headers = self.standin.refusal
            self._json(status, body, headers)
        elif self.standin.key and self.headers["Authorization"] != f"Bearer {self.standin.key}":
            self._json(401, {"error": {"message": "no such key"}})
        else:
            return False
        return True

    def _json(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(body).encode(), "application/json", headers)

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        told = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body)), "Content-Security-Policy": POLICY}
        for name, value in (told | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        """Clients that go away are part of the tests."""


@contextmanager
def standing_in() -> Iterator[Standin]:
    """A stand-in at an address of its own, so that nothing of another test is stored for it."""
    handler = type("Handler", (_Handler,), {})
    with _Server(("127.0.0.1", 0), handler) as http:
        handler.standin = standin = Standin(f"http://127.0.0.1:{http.server_port}/")
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield standin
        finally:
            standin.gate.set()
            http.shutdown()


def source(id: str, title: str, text: str, *, query: str = "Moby Dick", held: str = "", **told: Any) -> dict[str, Any]:
    """A source as ``Answer.as_json`` gives it; every place of ``held`` in the text is marked."""
    marks = [[at, at + len(held)] for at in range(len(text)) if held and text.startswith(held, at)]
    return {**told, "id": id, "title": title, "text": text, "holds": bool(marks), "marks": marks, "query": query}


def answered(question: str, answer: str | None, support: str, sources: list[dict[str, Any]], **told: Any) -> dict[str, Any]:
    """``Answer.as_json`` of an answer."""
    return {
        "question": question, "answer": answer, "found": support in ("held", "yes_no"), "support": support, "sources": sources,
        "searches": ["Moby Dick"], "stop_reason": "answered", "sampled_tokens": 61,
    } | told  # fmt: skip


def bare(*sources: dict[str, Any]) -> list[dict[str, Any]]:
    """Passages of a search event: without what only the answer tells."""
    return [{name: value for name, value in one.items() if name not in ("holds", "marks", "query", "text")} for one in sources]
