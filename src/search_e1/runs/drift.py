"""Compares two nested mappings key by key, and prints one line per difference."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Defaults = Callable[[tuple[str, ...]], Any]
"""Path of a key -> its default, as JSON has it; raises LookupError for a key without a default."""

ABSENT = object()
"""Stands for a missing value."""


class Change(NamedTuple):
    """A key whose values differ."""

    key: str
    """Dotted path."""
    there: Any
    given: Any


def no_defaults(path: tuple[str, ...]) -> Any:
    """``Defaults`` without any default."""
    raise LookupError(path)


def changes(there: Mapping[str, Any], given: Mapping[str, Any], defaults: Defaults = no_defaults) -> list[Change]:
    """The keys in which two nested JSON mappings differ.

    A key that is missing in ``there`` and has its default in ``given`` is no change: it was added to the package since. Where
    ``given`` names single keys (``lead.samples``) of a section that ``there`` holds whole, only these are compared.
    """
    return list(_changes(_narrowed(there, given), given, defaults, ()))


def _narrowed(there: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(there)
    for key in given:
        section, dot, name = key.partition(".")
        if dot and section not in given and isinstance(there.get(section), Mapping):
            found.pop(section, None)
            if name in there[section]:
                found[key] = there[section][name]
    return found


def _changes(
    there: Mapping[str, Any], given: Mapping[str, Any], defaults: Defaults, prefix: tuple[str, ...]
) -> Iterator[Change]:
    for key in sorted({*there, *given}):
        a, b, path = there.get(key, ABSENT), given.get(key, ABSENT), (*prefix, key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _changes(a, b, defaults, path)
        elif a != b and not (a is ABSENT and _is_default(b, path, defaults)):
            yield Change(".".join(path), a, b)


def _is_default(value: Any, path: tuple[str, ...], defaults: Defaults) -> bool:
    try:
        return bool(defaults(tuple(part for word in path for part in word.split("."))) == value)
    except LookupError:
        return False


def lines(found: Sequence[Change]) -> str:
    """One line per change, each after a line break: ``grpo.steps: was 8, now 16``."""
    return "".join(f"\n  {change.key}: was {_short(change.there)}, now {_short(change.given)}" for change in found)


def _short(value: Any) -> str:
    if value is ABSENT:
        return "not set"
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:12]  # a checksum
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
