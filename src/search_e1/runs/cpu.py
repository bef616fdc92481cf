"""CPU time of this process and of all that work for it."""

import os

_elsewhere = 0.0


def seconds() -> float:
    """So far: of this process, of those that it started and that have ended, and of what ``add`` was told of."""
    return sum(os.times()[:4]) + _elsewhere


def add(seconds: float) -> None:
    """Count what processes have used that are not this one's children: the system does not."""
    global _elsewhere
    _elsewhere += seconds
