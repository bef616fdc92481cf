"""As much of the Hugging Face Hub as `datasets` asks for, on the loopback: one dataset repository out of a directory."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "c0ffee" * 6 + "c0ff"


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        root: Path = self.server.root  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        if asked := re.fullmatch(r"/datasets/[^/]+/[^/]+/resolve/[^/]+/(.+)", path):
            self._file(root / asked[1])
        elif asked := re.fullmatch(r"/api/datasets/[^/]+/[^/]+/tree/[^/]+/?(.*)", path):
            self._directory(root, root / asked[1])
        elif re.fullmatch(rf"/api/datasets/[^/]+/[^/]+(/revision/{COMMIT})?", path):
            files = [{"rfilename": str(file.relative_to(root))} for file in root.rglob("*") if file.is_file()]
            self._json({"_id": "0", "id": "some/repository", "sha": COMMIT, "siblings": files, "tags": []})
        else:
            self._send(b"", 404, {"X-Error-Code": "RevisionNotFound"} if "/revision/" in path else {})

    def _file(self, path: Path) -> None:
        if path.is_file():
            content = path.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                self._send(content[first : last + 1], 206, headers)
            else:
                self._send(content, 200, headers)
        else:
            self._send(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def _directory(self, root: Path, path: Path) -> None:
        if path.is_dir():
            self._json([self._entry(root, entry) for entry in path.iterdir()])
        else:
            self._send(b"", 404, {"X-Error-Code": "EntryNotFound"})

    def _entry(self, root: Path, path: Path) -> dict[str, object]:
        kind, size = ("file", path.stat().st_size) if path.is_file() else ("directory", 0)
        return {"type": kind, "oid": "0" * 40, "size": size, "path": str(path.relative_to(root))}

    def _json(self, content: object) -> None:
        self._send(json.dumps(content).encode(), 200, {"Content-Type": "application/json"})

    def _send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve(root: Path) -> Iterator[str]:
    """The address of a Hub whose only repository is ``root``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.root = root  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
