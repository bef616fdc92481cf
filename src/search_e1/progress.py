"""How a stage tells what it is doing, without knowing who listens."""

from typing import Protocol


class Progress(Protocol):
    """Told whenever something is done. ``total`` is 0 where it is not known.

    ``figure`` is the one number that matters just now, e.g. ``"reward 0.41"``.
    """

    def __call__(self, done: int, total: int, figure: str = "") -> None: ...


def silent(done: int, total: int, figure: str = "") -> None:
    """A ``Progress`` for nobody."""
