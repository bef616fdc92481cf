"""Compares dates in any notation: ``5 May 2020``, ``May 5, 2020``, ``2020-05-05``."""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Literal, NamedTuple

from search_e1.data.answers import exact_match

Order = Literal["DMY", "MDY", "YMD"]
_ISO = re.compile(r"(\d{4})-(\d{1,2})(?:-(\d{1,2}))?(?:[T ]\d.*)?")
_LIKELY = re.compile(
    r"\d{3,4}|\d{1,2}[./-]\d{1,2}[./-]\d{2}|\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)", re.IGNORECASE
)
_DROPPED = re.compile(r"\b(?:on|in|the|of|at|around)\b", re.IGNORECASE)
_FILLS = datetime(2000, 1, 1), datetime(2004, 12, 31)
"""Defaults for parts that a text omits: a part that differs between the two parses was omitted. Both are leap years."""


class Day(NamedTuple):
    """A date; ``None`` for omitted parts."""

    year: int | None
    month: int | None
    day: int | None


def date(answer: str | None, golds: Sequence[str], order: Order = "MDY") -> float:
    """1.0 if ``answer`` and a gold answer are dates, and the answer has all parts of the gold one; else exact match.

    ``order``: how to read 5/6/2020.
    """

    def equal(gold: str) -> float:
        own, wanted = read_date(answer or "", order), read_date(gold, order)
        if own is None or wanted is None:
            return exact_match(answer, [gold])
        return float(all(part is None or part == said for said, part in zip(own, wanted, strict=True)))

    return max(map(equal, golds), default=0.0)


def read_date(text: str, order: Order = "MDY") -> Day | None:
    """The date in ``text``; ``None`` if it is not exactly one date."""
    from dateutil.parser import ParserError, parse

    plain = " ".join(_DROPPED.sub(" ", text).strip(" .,;\n").split())
    if iso := _ISO.fullmatch(plain):
        year, month, day = (int(part) if part else None for part in iso.groups())
        return Day(year, month, day)
    if not _LIKELY.search(plain) or len(plain) > 40:
        return None
    try:
        first, second = (parse(plain, default=fill, dayfirst=order == "DMY", yearfirst=order == "YMD") for fill in _FILLS)
    except (ParserError, OverflowError, ValueError):
        return None
    return Day(*(getattr(first, part) if getattr(first, part) == getattr(second, part) else None for part in Day._fields))
