"""How a stage tells what it is doing, without knowing who listens."""

from collections.abc import Callable, Mapping
from typing import Protocol


class Progress(Protocol):
    """Told whenever something is done. ``total`` is 0 where it is not known.

    ``figure`` is the one number that matters just now, e.g. ``"reward 0.41"``.
    """

    def __call__(self, done: int, total: int, figure: str = "") -> None: ...


def silent(done: int, total: int, figure: str = "") -> None:
    """A ``Progress`` for nobody."""


Track = Callable[[int, Mapping[str, float]], None]
"""Told the figures of each step: name, as in ``steps.jsonl``, -> value."""


def untracked(step: int, figures: Mapping[str, float]) -> None:
    """A ``Track`` for nobody."""
