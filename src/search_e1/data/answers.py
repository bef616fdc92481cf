"""Exact match, F1 and cover match of an answer, as in the Search-R1 protocol (the SQuAD definitions), by language.

The language in force (``in_language``) is the run's ``rollout.answer_language``. English uses exactly the published rule. All
other languages fold text (``runs.languages.fold``), strip all Unicode punctuation, drop their own articles, and ignore white
space next to characters of scripts without spaces, which count as words.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from search_e1.runs.languages import ENGLISH, UNSPACED, character_pattern, fold, is_unspaced, parse, word_pattern
from search_e1.runs.nfc import nfc

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ENGLISH_WORD, _ENGLISH_ARTICLES = re.compile(r"[^\W_]+"), frozenset({"a", "an", "the"})
_ARTICLES_OF = {
    "ca": "el la els les un una uns unes", "da": "en et", "de": "der die das den dem des ein eine einen einem einer eines",
    "el": "ο η το οι τα τον την του της των τους τις ένας μία μια ένα", "en": "a an the",
    "es": "el la los las un una unos unas",
    "fr": "le la les un une des", "ga": "an na", "hu": "a az egy", "it": "il lo la i gli le un uno una",
    "nl": "de het een", "no": "en ei et", "pt": "o a os as um uma uns umas", "ro": "un o niște", "sv": "en ett",
}  # fmt: skip
"""Language -> its articles that are separate words; languages not listed have none. Arabic's article is a prefix."""
_ELIDED = {"ca": "l", "fr": "l", "it": "l|un"}
_ARABIC_ARTICLE = re.compile(r"\bال(?=\w{3})")
_language: ContextVar[str] = ContextVar("answer language", default=ENGLISH)


@contextmanager
def in_language(language: str) -> Iterator[None]:
    """Compares answers by the rule of ``language`` (codes such as ``de`` and ``en+zh``) within the block, in this thread.

    Raises:
        ConfigError: an unknown language.
    """
    parse(language, "rollout.answer_language")
    token = _language.set(language)
    try:
        yield
    finally:
        _language.reset(token)


def language_in_force() -> str:
    """The codes of the language in force; see ``in_language``."""
    return _language.get()


def put_in_force(language: str) -> None:
    """Put ``language`` in force at the start of a thread, since threads do not inherit it."""
    _language.set(language)


def normalize_answer(text: str) -> str:
    """Lower-case, strip ASCII punctuation, drop a/an/the, collapse white space, in this order; or by the language in force.

    Unlike SQuAD's definition the result is in NFC, so that different encodings of an accent are equal.
    """
    language = _language.get()
    if language != ENGLISH:
        return _normalize(text, parse(language, "rollout.answer_language"))
    plain = nfc(text.lower().translate(_NO_PUNCTUATION))
    return " ".join(_ARTICLES.sub(" ", plain).split())


def answer_words(text: str) -> list[str]:
    """The words of ``text`` after normalization, as F1 and cover match count them."""
    return _apart(normalize_answer(text)).split()


def words(text: str) -> list[str]:
    """The words of ``text`` for finding answers in passages: unlike in EM, punctuation separates words."""
    language = _language.get()
    if language == ENGLISH:
        plain = nfc(text.lower())  # a combining accent is not matched as a letter
        return [word for word in _ENGLISH_WORD.findall(plain) if word not in _ENGLISH_ARTICLES]
    codes = parse(language, "rollout.answer_language")
    found = _apart(" ".join(word_pattern().findall(fold(text, codes)))).split()
    return [_without_article(word, codes) for word in found if word not in _articles(codes)]


def word_spans(text: str) -> list[tuple[str, int, int]]:
    """``words`` of ``text``, which must be in NFC, each with the offsets of its begin and end (exclusive)."""
    if _language.get() == ENGLISH:
        found = ((match[0].lower(), *match.span()) for match in _ENGLISH_WORD.finditer(text))
        return [(nfc(word), begin, end) for word, begin, end in found if word not in _ENGLISH_ARTICLES]
    spans: list[tuple[str, int, int]] = []
    for run in word_pattern().finditer(text):
        parts = character_pattern().finditer(run[0]) if is_unspaced(run[0][0]) else [re.match(r"(?s).*", run[0])]
        for part in parts:
            assert part
            begin = run.start()
            spans += ((word, begin + part.start(), begin + part.end()) for word in words(part[0]))
    return spans


def _normalize(text: str, codes: tuple[str, ...]) -> str:
    plain = fold(text, codes)
    if elided := "|".join(_ELIDED[code] for code in codes if code in _ELIDED):
        plain = re.sub(rf"\b(?:{elided})['’]", " ", plain)
    kept = plain.translate(_punctuation()).split()
    joined = " ".join(_without_article(word, codes) for word in kept if word not in _articles(codes))
    return _beside_unspaced().sub("", joined)


def _apart(text: str) -> str:
    """``text`` with a space around each character of a script without spaces."""
    return text if _language.get() == ENGLISH else character_pattern().sub(r" \g<0> ", text)


def _without_article(word: str, codes: tuple[str, ...]) -> str:
    return _ARABIC_ARTICLE.sub("", word) if "ar" in codes else word


@cache
def _articles(codes: tuple[str, ...]) -> frozenset[str]:
    """The articles in folded text, including the remains of elided ones."""
    found = {fold(word, codes) for code in codes for word in _ARTICLES_OF.get(code, "").split()}
    return frozenset(found | {"l" for code in codes if code in _ELIDED})


@cache
def _punctuation() -> dict[int, None]:
    every = map(chr, range(128, 0x20000))
    return dict.fromkeys(map(ord, [*string.punctuation, *(c for c in every if unicodedata.category(c)[0] == "P")]))


@cache
def _beside_unspaced() -> re.Pattern[str]:
    return re.compile(rf"(?<=[{UNSPACED}]) | (?=[{UNSPACED}])")


def exact_match(answer: str | None, gold: Iterable[str]) -> float:
    """1.0 if ``answer`` equals any gold answer after normalization, else 0.0; no answer scores 0.0.

    An answer that is empty after normalization equals nothing: else an empty answer would match ``!!!``.
    """
    normalized = normalize_answer(answer or "")
    return float(bool(normalized) and any(normalized == normalize_answer(g) for g in gold))


def cover_match(answer: str | None, gold: Iterable[str]) -> float:
    """1.0 if ``answer`` contains any gold answer, both normalized, as whole words, else 0.0; no answer scores 0.0.

    A gold answer that is empty after normalization is contained in nothing.
    """
    said = " ".join(answer_words(answer or ""))
    return float(any(g and f" {g} " in f" {said} " for g in (" ".join(answer_words(one)) for one in gold)))


def f1(answer: str | None, gold: Iterable[str]) -> float:
    """Best token F1 over the gold answers. "yes", "no" and "noanswer" on either side must match exactly (HotpotQA's rule)."""
    return max((_f1(normalize_answer(answer), normalize_answer(g)) for g in gold), default=0.0) if answer else 0.0


def _f1(answer: str, gold: str) -> float:
    if answer != gold and {answer, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    answer_tokens, gold_tokens = _apart(answer).split(), _apart(gold).split()
    common = sum((Counter(answer_tokens) & Counter(gold_tokens)).values())
    return 2 * common / (len(answer_tokens) + len(gold_tokens)) if common else 0.0
