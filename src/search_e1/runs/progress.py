"""Progress reports: a stage calls them without knowing the listener."""

import time
from collections.abc import Callable, Mapping
from typing import Protocol


class Progress(Protocol):
    """Called whenever something is done. ``total`` is 0 if unknown.

    ``figure`` is the most relevant number, e.g. ``"reward 0.41"``, and more if it fits; if empty, the last one stays.
    """

    def __call__(self, done: int, total: int, figure: str = "") -> None: ...


def silent(done: int, total: int, figure: str = "") -> None:
    """A ``Progress`` that does nothing."""


def tell_within(progress: Progress, done: float, total: int, figure: str = "") -> None:
    """Report part of the current step: ``done`` of 2.5 is half of the third step.

    Calls the listener's method ``within`` with the same arguments if it has one; a plain function gets only whole steps.
    """
    within = getattr(progress, "within", None)
    if within is not None:
        within(done, total, figure)


class Pace:
    """A stage's elapsed and remaining time, from its mean pace since the first report. A resumed stage starts midway."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._opened = clock()
        self._first: tuple[float, float] | None = None
        self._end: float | None = None

    def report(self, done: float, total: float) -> None:
        now = self._clock()
        if self._first is None:
            # If the first report is of step 1, its time counts; of a later step, earlier attempts did the steps before.
            self._first = (now, done) if done > 1 else (self._opened, 0.0)
        since, before = self._first
        if total and done > before and now > since:
            self._end = now + (now - since) * max(0.0, total - done) / (done - before)

    def __str__(self) -> str:
        """``1:02<4:10``: elapsed and remaining, which counts down between reports."""
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
    """``3/8``, or only ``done`` if the total is unknown."""
    return f"{int(done)}/{total}" if total else str(int(done))


Track = Callable[[int, Mapping[str, float]], None]
"""Called with the figures of each step: name, as in ``steps.jsonl``, -> value."""


def untracked(step: int, figures: Mapping[str, float]) -> None:
    """A ``Track`` that does nothing."""
