"""Exact match, F1 and cover match of an answer, as in the Search-R1 protocol (the SQuAD definitions)."""

import re
import string
from collections import Counter
from collections.abc import Iterable

from search_e1.runs.nfc import nfc

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower-case, strip ASCII punctuation, drop a/an/the, collapse white space, in this order.

    Beyond SQuAD's definition the result is in NFC, so that an accent counts the same however it is encoded.
    """
    plain = nfc(text.lower().translate(_NO_PUNCTUATION))
    return " ".join(_ARTICLES.sub(" ", plain).split())


def exact_match(answer: str | None, gold: Iterable[str]) -> float:
    """1.0 if ``answer`` equals any gold answer after normalisation, else 0.0; no answer scores 0.0.

    Where nothing is left of an answer after normalisation, nothing equals it: else an empty answer would match ``!!!``.
    """
    normalized = normalize_answer(answer or "")
    return float(bool(normalized) and any(normalized == normalize_answer(g) for g in gold))


def cover_match(answer: str | None, gold: Iterable[str]) -> float:
    """1.0 if ``answer`` holds any gold answer, both normalised, as whole words, else 0.0; no answer scores 0.0.

    Gold answers of which nothing is left after normalisation are held by no answer.
    """
    words = normalize_answer(answer or "")
    return float(any(g and f" {g} " in f" {words} " for g in map(normalize_answer, gold)))


def f1(answer: str | None, gold: Iterable[str]) -> float:
    """Best token F1 over the gold answers. A yes, no or noanswer on either side must match exactly (HotpotQA's rule)."""
    return max((_f1(normalize_answer(answer), normalize_answer(g)) for g in gold), default=0.0) if answer else 0.0


def _f1(answer: str, gold: str) -> float:
    if answer != gold and {answer, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    answer_tokens, gold_tokens = answer.split(), gold.split()
    common = sum((Counter(answer_tokens) & Counter(gold_tokens)).values())
    return 2 * common / (len(answer_tokens) + len(gold_tokens)) if common else 0.0
