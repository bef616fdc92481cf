"""As much of the Hugging Face Hub as is asked for here, on the loopback: one repository, of data or a model, in a directory.

Anybody may read it, unless it is private; to write takes the token ``WRITER``. Files come over Git LFS, not over Xet.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "c0ffee" * 6 + "c0ff"
WRITER, READER = "hf_writer", "hf_reader"
_REPOSITORY = r"(?:datasets/|models/)?[^/]+/[^/]+"


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        root: Path = self.server.root  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        if not root.exists():
            self._send(b"", 404, {"X-Error-Code": "RepoNotFound"})
        elif self.server.private and self._token() is None:  # type: ignore[attr-defined]
            self._send(b"", 401, {"X-Error-Code": "RepoNotFound"})
        elif asked := re.fullmatch(rf"/{_REPOSITORY}/resolve/[^/]+/(.+)", path):
            self._file(root / asked[1])
        elif asked := re.fullmatch(rf"/api/{_REPOSITORY}/tree/[^/]+/?(.*)", path):
            self._directory(root, root / asked[1], "recursive=true" in self.path.lower())
        elif re.fullmatch(rf"/api/{_REPOSITORY}(/revision/({COMMIT}|main))?", path):
            files = [{"rfilename": str(file.relative_to(root))} for file in root.rglob("*") if file.is_file()]
            about = {"private": self.server.private, "tags": []}  # type: ignore[attr-defined]
            self._json({"_id": "0", "id": "some/repository", "sha": COMMIT, "siblings": files, **about})
        else:
            self._send(b"", 404, {"X-Error-Code": "RevisionNotFound"} if "/revision/" in path else {})

    def do_POST(self) -> None:
        root: Path = self.server.root  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self._token() not in (WRITER, READER):
            self._send(b"{}", 401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif self._token() == READER:
            self._send(b"{}", 403, {"X-Error-Message": "You don't have the rights"})
        elif self.path == "/api/repos/create":
            self._create(root, json.loads(body))
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "size": file["size"]} for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            self._json({"files": [{**f, "uploadMode": modes[f["size"] > 10_000], "shouldIgnore": False} for f in files]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"http://{self.headers['Host']}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self._commit(root, [json.loads(line) for line in body.splitlines()])
        else:
            self._send(b"{}", 404, {})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.blobs[hashlib.sha256(content).hexdigest()] = content  # type: ignore[attr-defined]
        self._send(b"", 200, {})

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _create(self, root: Path, asked: dict) -> None:
        about = {"url": f"http://{self.headers['Host']}/{asked.get('organization', 'me')}/{asked['name']}"}
        if root.exists():
            self._json(about, 409)
            return
        root.mkdir()
        self.server.private = asked.get("visibility") == "private"  # type: ignore[attr-defined]
        self._json(about)

    def _commit(self, root: Path, lines: list[dict]) -> None:
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "deletedFile":
                (root / value["path"]).unlink()
            elif kind != "header":
                blobs: dict[str, bytes] = self.server.blobs  # type: ignore[attr-defined]
                (root / value["path"]).parent.mkdir(parents=True, exist_ok=True)
                (root / value["path"]).write_bytes(
                    base64.b64decode(value["content"]) if kind == "file" else blobs[value["oid"]]
                )
        self._json(
            {"commitUrl": f"http://{self.headers['Host']}/me/agent/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        )

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

    def _directory(self, root: Path, path: Path, recursive: bool) -> None:
        if path.is_dir():
            self._json([self._entry(root, entry) for entry in (path.rglob("*") if recursive else path.iterdir())])
        else:
            self._send(b"", 404, {"X-Error-Code": "EntryNotFound"})

    def _entry(self, root: Path, path: Path) -> dict[str, object]:
        kind, size = ("file", path.stat().st_size) if path.is_file() else ("directory", 0)
        return {"type": kind, "oid": "0" * 40, "size": size, "path": str(path.relative_to(root))}

    def _json(self, content: object, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def _send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve(root: Path) -> Iterator[str]:
    """The address of a Hub whose only repository is ``root``, which need not be there yet."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.root, server.private, server.blobs = root, False, {}  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
