"""The report as a local page that follows runs while they are in progress.

The page asks every second whether the runs' files have changed. Complete artifacts are read once; an unfinished training
stage's curve is read again at each step. Needs the extra ``serve``.
"""

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from search_e1.errors import SearchE1Error
from search_e1.evaluation.report.page import Report
from search_e1.runs.locks import holder
from search_e1.runs.safe import plain
from search_e1.serving import listening
from search_e1.serving.access import Access
from search_e1.serving.limits import Limits

_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_FILES = ("config.json", "summary.json", "*/manifest.json", ".*.partial", ".*.partial/steps.jsonl")


class LiveReport:
    """The report of ``runs`` in their state at each request."""

    def __init__(self, runs: Sequence[Path], most: int) -> None:
        """
        Raises:
            RunError, DataError: as ``page.write``.
        """
        self._runs, self._report = runs, Report(runs, most)
        self._lock = Lock()
        self._problem: str | None = None
        self._seen = _state(runs)
        self._report.read()

    def page(self, request: Request) -> Response:
        with self._lock:
            self._refresh()
            return HTMLResponse(self._report.html(live=True), headers=_HEADERS)

    def data(self, request: Request) -> Response:
        """What changed since the client's ``version`` (figures) and ``records`` (trajectories); 204 if nothing did."""
        known = request.query_params
        with self._lock:
            self._refresh()
            if self._problem:
                return JSONResponse({"problem": self._problem}, headers=_HEADERS)
            versions = self._report.versions
            if versions["version"] == known.get("version") and versions["records"] == known.get("records"):
                return Response(status_code=204, headers=_HEADERS)
            packed = {} if versions["records"] == known.get("records") else {"packed": self._report.records}
            return JSONResponse({**versions, "overview": self._report.overview, **packed}, headers=_HEADERS)

    def _refresh(self) -> None:
        """Read the runs again if they changed. If something is damaged, the page shows the problem and keeps its data."""
        state = _state(self._runs)
        if state == self._seen:
            return
        try:
            self._report.read()
            self._seen, self._problem = state, None
        except SearchE1Error as error:
            self._seen, self._problem = state, plain(str(error))
        except FileNotFoundError:
            pass  # a stage completed, and its directory was renamed, while being read; the next request reads it


def serve(runs: Sequence[Path], most: int, bound: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve the report on ``bound``, see ``serving.listening``, until SIGINT or SIGTERM.

    Raises:
        RunError, DataError: as ``page.write``.
    """
    report = LiveReport(runs, most)
    app = Starlette(routes=[Route("/", report.page), Route("/data", report.data)])
    listening.serve(Access(app, local=True), bound, Limits(shutdown_timeout=2), ready)


def _state(runs: Sequence[Path]) -> list[object]:
    """A value that changes when a run's files do."""
    state: list[object] = []
    for run in runs:
        state.append(holder(run))
        for path in sorted(path for pattern in _FILES for path in run.glob(pattern)):
            try:
                facts = path.stat()
                state.append((str(path), facts.st_mtime_ns, facts.st_size))
            except FileNotFoundError:
                continue
    return state
