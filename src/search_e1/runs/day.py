"""The day that chat templates that tell the date are given: a run's is the day on which it was begun, whenever it goes on."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from search_e1.errors import RunError
from search_e1.runs.files import write_atomically

FILE = "day.json"
_pinned: date | None = None


def pinned() -> date | None:
    """The day of the run that is open in this process, if one is."""
    return _pinned


@contextmanager
def pin(day: date | None) -> Iterator[None]:
    """With ``day`` as that of the run, for as long as the context lasts."""
    global _pinned
    before, _pinned = _pinned, day
    try:
        yield
    finally:
        _pinned = before


def recorded(directory: Path) -> date | None:
    """The day on which the run in ``directory`` was begun; ``None`` if there is no run yet.

    Raises:
        RunError: the file that tells it is damaged.
    """
    try:
        return date.fromisoformat(json.loads((directory / FILE).read_text(encoding="utf-8"))["begun"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise RunError(
            f'{directory / FILE}: damaged; write {{"begun": "YYYY-MM-DD"}}, the day on which the run was begun'
        ) from error


def record(directory: Path, day: date) -> None:
    write_atomically(directory / FILE, json.dumps({"begun": day.isoformat()}) + "\n")
