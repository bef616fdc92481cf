"""Rewards for lists and for yes-or-no answers."""

import re
from collections.abc import Sequence

from search_e1.data.answers import exact_match, normalize_answer

_STRONG, _WEAK = re.compile(r"[;\n|]"), re.compile(r",|\band\b|&", re.IGNORECASE)
_BULLET = re.compile(r"^\s*(?:[-*\u2022]|\d+[.)])\s+")
_YES_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}


def list_match(answer: str | None, golds: Sequence[str]) -> float:
    """1.0 if ``answer`` has exactly the items of a gold answer, in any order; each gold answer is a complete list."""
    return max((float(_f1(answer, gold) == 1.0) for gold in golds), default=0.0)


def list_f1(answer: str | None, golds: Sequence[str]) -> float:
    """The best F1 of the items over the gold answers, each of which is a complete list."""
    return max((_f1(answer, gold) for gold in golds), default=0.0)


def items(text: str) -> frozenset[str]:
    """The items, normalized as for EM: split at ``;``, ``|`` and newlines, or without these at commas, ``and``, ``&``."""
    parts = (_STRONG if _STRONG.search(text.strip()) else _WEAK).split(text)
    return frozenset(filter(None, (normalize_answer(_BULLET.sub("", part)) for part in parts)))


def _f1(answer: str | None, gold: str) -> float:
    own, wanted = items(answer or ""), items(gold)
    both = len(own & wanted)
    return 2 * both / (len(own) + len(wanted)) if both else 0.0


def yes_no(answer: str | None, golds: Sequence[str]) -> float:
    """1.0 if ``answer`` starts with the yes or no (true, false) of a gold answer; exact match if the gold answer is neither."""

    def equal(gold: str) -> float:
        wanted = _YES_NO.get(normalize_answer(gold))
        first = next(iter(normalize_answer(answer or "").split()), "")
        return exact_match(answer, [gold]) if wanted is None else float(_YES_NO.get(first) == wanted)

    return max(map(equal, golds), default=0.0)
