"""Progress in a notebook: one line with a bar per stage, which is still shown when the notebook is reopened.

Plain HTML, updated in place, without widgets: Jupyter, JupyterLab, VS Code and Colab show it without an extension.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from html import escape
from importlib import import_module
from typing import Any

from search_e1.runs.progress import Pace, Progress, count, stage_label

_INTERVAL = 0.2
"""Seconds between updates, each of which is a message to the browser."""


def in_notebook() -> bool:
    """Whether a notebook kernel runs this process, rather than a terminal or a script."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython and ipython.get_ipython(), "kernel", None) is not None


def watch(rounds: int) -> Callable[[str], AbstractContextManager[Progress]]:
    """A progress line per stage; ``cli.display.watch`` does the same in a terminal."""
    display = import_module("IPython.display").display  # every notebook has it; not a dependency

    @contextmanager
    def stage(name: str) -> Iterator[Progress]:
        line = _Line(stage_label(name, rounds))
        line.handle = display(line, display_id=True)
        try:
            yield line
            line.ended = True
        finally:
            line.show(now=True)

    return stage


class _Line:
    """A progress listener that IPython renders."""

    handle: Any
    """IPython's display handle, which updates the line in place."""

    def __init__(self, label: str) -> None:
        self.label, self.pace, self.ended = label, Pace(), False
        self.done, self.total, self.figure, self._shown = 0.0, 0, "", 0.0

    def __call__(self, done: float, total: int, figure: str = "") -> None:
        self.done, self.total, self.figure = done, total, figure or self.figure
        self.pace.report(done, total)
        self.show()

    within = __call__

    def show(self, now: bool = False) -> None:
        if now or time.monotonic() - self._shown >= _INTERVAL:
            self._shown = time.monotonic()
            self.handle.update(self)

    @property
    def text(self) -> str:
        return f"{count(self.done, self.total)}  {str(self.pace).partition('<')[0] if self.ended else self.pace}  {self.figure}"

    def __repr__(self) -> str:
        return f"{self.label}  {self.text}"

    def _repr_html_(self) -> str:
        known = f' max="{self.total}" value="{self.total if self.ended else self.done:g}"' if self.total else ""
        known = ' max="1" value="1"' if self.ended and not self.total else known
        return (
            f'<div style="white-space:pre;font-family:monospace">{escape(self.label):<20} '
            f'<progress{known} style="width:8em"></progress> {escape(self.text)}</div>'
        )
