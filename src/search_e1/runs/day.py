"""The date that chat templates see: the day on which the run was started, however often it is resumed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from search_e1.errors import RunError

FILE = "day.json"
_pinned: date | None = None


def pinned() -> date | None:
    """The day of the run that is open in this process; ``None`` without a run."""
    return _pinned


@contextmanager
def pin(day: date | None) -> Iterator[None]:
    """Use ``day`` as the run's day within the context."""
    global _pinned
    before, _pinned = _pinned, day
    try:
        yield
    finally:
        _pinned = before


def recorded(directory: Path) -> date | None:
    """The day on which the run in ``directory`` was started; ``None`` if there is no run yet.

    Raises:
        RunError: the file that records it is damaged.
    """
    try:
        return date.fromisoformat(json.loads((directory / FILE).read_text(encoding="utf-8"))["begun"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise RunError(
            f'{directory / FILE}: damaged; write {{"begun": "YYYY-MM-DD"}}, the day on which the run began'
        ) from None


def record(directory: Path, day: date) -> date:
    """Record ``day`` unless another run that shares the directory came first; returns the recorded day."""
    own = directory / f".{FILE}.{os.getpid()}"
    own.write_text(json.dumps({"begun": day.isoformat()}) + "\n", encoding="utf-8")
    try:
        os.link(own, directory / FILE)  # fails if it exists
    except FileExistsError:
        own.unlink()
    except OSError:  # a file system without links
        own.replace(directory / FILE)
    else:
        own.unlink()
    return recorded(directory) or day
