"""How a stage tells what it is doing, without knowing who listens."""

import time
from collections.abc import Callable, Mapping
from typing import Protocol


class Progress(Protocol):
    """Told whenever something is done. ``total`` is 0 where it is not known.

    ``figure`` is the one number that matters just now, e.g. ``"reward 0.41"``, and what else there is room for; without one,
    the last one stays.
    """

    def __call__(self, done: int, total: int, figure: str = "") -> None: ...


def silent(done: int, total: int, figure: str = "") -> None:
    """A ``Progress`` for nobody."""


def tell_within(progress: Progress, done: float, total: int, figure: str = "") -> None:
    """Tell of a part of the step at hand: ``done`` of 2.5 is half of the third step.

    A listener that wants it has a method ``within``, which takes the same; a plain function is told of whole steps alone.
    """
    within = getattr(progress, "within", None)
    if within is not None:
        within(done, total, figure)


class Pace:
    """Time passed and time left of a stage, by its mean pace since the first report; a resumed stage begins in the middle."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._opened = clock()
        self._first: tuple[float, float] | None = None
        self._end: float | None = None

    def report(self, done: float, total: float) -> None:
        now = self._clock()
        if self._first is None:
            # The first of many to come has taken the time since the beginning; a later one was done by an earlier attempt.
            self._first = (now, done) if done > 1 else (self._opened, 0.0)
        since, before = self._first
        if total and done > before and now > since:
            self._end = now + (now - since) * max(0.0, total - done) / (done - before)

    def __str__(self) -> str:
        """``1:02<4:10``: passed and left, which runs down between reports."""
        now = self._clock()
        left = "-:--" if self._end is None else _clock_time(max(0.0, self._end - now))
        return f"{_clock_time(now - self._opened)}<{left}"


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def stage_label(stage: str, rounds: int) -> str:
    """``grpo-1`` -> ``grpo 1/2``."""
    kind, _, round = stage.rpartition("-")
    return f"{kind.replace('-', ' ')} {round}/{rounds}" if round.isdigit() else stage.replace("-", " ")


def count(done: float, total: int) -> str:
    """``3/8``, or what is done where the total is not known."""
    return f"{int(done)}/{total}" if total else str(int(done))


Track = Callable[[int, Mapping[str, float]], None]
"""Told the figures of each step: name, as in ``steps.jsonl``, -> value."""


def untracked(step: int, figures: Mapping[str, float]) -> None:
    """A ``Track`` for nobody."""
