"""Text analysis for BM25 by language (tokenization, stop words, stemming), and language detection.

English uses exactly bm25s's rule. In other languages text is folded (``runs.languages.fold``), words keep their combining
marks, and scripts without spaces become character bigrams, as in Lucene's CJK analyzer. Each script uses the stop words and
the Snowball stemmer of at most one language.
"""

import re
import threading
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import NamedTuple

import Stemmer

from search_e1.errors import ConfigError
from search_e1.retrieval.function_words import LISTED, stop_words
from search_e1.runs.languages import ENGLISH, NAMES, NONE, character_pattern, fold, is_unspaced, join, parse, word_pattern
from search_e1.runs.nfc import nfc

VERSION = 1
"""Version of all rules except English's; part of an index's settings."""
_SCRIPTS = (
    (0, "latin"), (0x0370, "greek"), (0x0400, "cyrillic"), (0x0530, "armenian"), (0x0590, "hebrew"), (0x0600, "arabic"),
    (0x0780, ""), (0x08A0, "arabic"), (0x0900, "devanagari"), (0x0980, ""), (0x0B80, "tamil"), (0x0C00, ""), (0x0E00, "thai"),
    (0x0E80, "lao"), (0x0F00, ""), (0x1000, "burmese"), (0x10A0, ""), (0x1100, "hangul"), (0x1200, ""), (0x1780, "khmer"),
    (0x1800, ""), (0x1E00, "latin"), (0x1F00, "greek"), (0x2000, ""), (0x3040, "kana"), (0x3100, "han"), (0x3130, "hangul"),
    (0x3190, ""), (0x31F0, "kana"), (0x3200, ""), (0x3400, "han"), (0xA000, ""), (0xAA60, "burmese"), (0xAA80, ""),
    (0xAC00, "hangul"), (0xD7B0, ""), (0xF900, "han"), (0xFB00, ""), (0x20000, "han"), (0x40000, ""),
)  # fmt: skip
"""(First code point of a block in folded text, its script); "" for other characters."""
_STARTS = [start for start, _ in _SCRIPTS]
_SCRIPT_OF = {
    **dict.fromkeys(("ar", "fa"), "arabic"), **dict.fromkeys(("bg", "ru", "sr", "uk"), "cyrillic"),
    **dict.fromkeys(("hi", "ne"), "devanagari"), "el": "greek", "he": "hebrew", "hy": "armenian", "ta": "tamil",
    "ja": "kana", "km": "khmer", "ko": "hangul", "lo": "lao", "my": "burmese", "th": "thai", "zh": "han",
}  # fmt: skip
"""Language -> its script; Latin if not listed."""
_FAR_EAST = frozenset(("han", "kana"))
_PRESENT = 0.01
"""Minimum share of letters for a script to be detected."""
_EVIDENCE = 0.05
"""Minimum share of stop words among a script's words to detect a language; a word counts in equal parts for its languages."""
_KANA = 0.05  # minimum share of kana among CJK letters for Japanese instead of Chinese


class Analysis:
    """Splits passages and queries of an index into words and stems them. Thread-safe."""

    def __init__(self, codes: tuple[str, ...]) -> None:
        """Use ``analysis_of``."""
        self.codes = codes
        self.language = join(codes)
        self.is_english = codes == (ENGLISH,)
        self._by_script: dict[str, str] = {}
        for code in codes:
            script = _SCRIPT_OF.get(code, "latin")
            if (other := self._by_script.setdefault(script, code)) != code:
                problem = f"both use the {script} script, for which only one language's endings are possible"
                raise ConfigError(f"language = {self.language!r}: {other} and {code}: {problem}; name one of them")
        self._stemmers = {code: Stemmer.Stemmer(NAMES[code], 0) for code in codes if NAMES.get(code) in Stemmer.algorithms()}
        self._stemming = threading.Lock()  # Stemmer is not thread-safe
        self.split = _split_english if self.is_english else self._split
        """Words of a text in order, stop words included."""
        self.stem = lru_cache(2**18)(self._stem)  # about 40 MB; holds nearly all words of a passage
        """The stem of a word, or "" for a stop word."""

    @property
    def settings(self) -> dict[str, object]:
        """The settings that an index records."""
        if self.is_english:
            return {"language": self.language, "stopwords": "english", "stemmer": "english"}
        listed = [code for code in self.codes if stop_words(code)]
        names = [NAMES[code] for code in self._stemmers]
        used = {"stopwords": join(tuple(listed)) or NONE, "stemmer": "+".join(names) or NONE}
        return {"language": self.language, "analysis": VERSION, **used, "unspaced": "bigrams"}

    def _split(self, text: str) -> list[str]:
        words: list[str] = []
        for word in word_pattern().findall(fold(text, self.codes)):
            if is_unspaced(word[0]):
                characters = character_pattern().findall(word)
                words += map("".join, pairwise(characters)) if len(characters) > 1 else characters
            elif len(word) > 1:
                words.append(word)
        return words

    def _stem(self, word: str) -> str:
        code = ENGLISH if self.is_english else self._by_script.get(_script(word[0]), NONE)
        if word in stop_words(code):
            return ""
        with self._stemming:
            return self._stemmers[code].stemWord(word) if code in self._stemmers else word

    def uncovered(self, texts: Iterable[str]) -> float:
        """Share of letters in ``texts`` that are in no word, or in a run of an unspaced script treated as a single word."""
        letters = covered = 0
        for text in texts:
            plain = nfc(text.lower()) if self.is_english else fold(text, self.codes)
            words = _find_words(plain) if self.is_english else word_pattern().findall(plain)
            kept = "".join(word for word in words if len(word) > 1 or is_unspaced(word))
            letters += sum(map(str.isalpha, plain))
            covered += sum(map(str.isalpha, kept))
            if self.is_english:
                covered -= sum(character[0].isalpha() for character in character_pattern().findall(kept))
        return 1 - covered / letters if letters else 0.0


_find_words = re.compile(r"\b\w\w+\b").findall


def _split_english(text: str) -> list[str]:
    """The words of ``text`` in lower case and NFC, as in bm25s's tokenizer."""
    return _find_words(nfc(text.lower()))  # NFC, since a combining accent would end a word


@cache
def analysis_of(language: str) -> Analysis:
    """The analysis of ``language``, codes as ``runs.languages.parse`` reads them.

    Raises:
        ConfigError: an unknown code, or two languages with the same script.
    """
    return Analysis(parse(language, "language"))


@cache
def one_a_script(language: str) -> Analysis:
    """The analysis of ``language``, keeping only the first code of each script."""
    scripts: dict[str, str] = {}
    for code in parse(language, "language"):
        scripts.setdefault(_SCRIPT_OF.get(code, "latin"), code)
    return analysis_of(join(tuple(scripts.values())))


class Detected(NamedTuple):
    """Languages detected in a sample of a corpus."""

    language: str
    """Codes, by descending share of letters."""
    shares: dict[str, float]
    """Language, or script if the language is unknown -> share of letters."""

    def __str__(self) -> str:
        parts = ", ".join(f"{share:.0%} {name}" for name, share in self.shares.items())
        return f"{self.language} ({parts} of the letters)" if len(self.shares) > 1 else self.language


def detect(texts: Sequence[str]) -> Detected:
    """Detect the languages of ``texts`` by script, and within a script by stop words.

    Defaults to English if most letters are Latin and no language is detected: corpora of names have few stop words.
    """
    words = [word for text in texts for word in word_pattern().findall(fold(text))]
    letters: Counter[str] = Counter()
    for letter, count in Counter("".join(words)).items():
        letters[_script(letter)] += count * letter.isalpha()
    total = letters.total()
    kana, han = letters["kana"], letters["han"]
    if kana + han:
        name = "kana" if kana >= _KANA * (kana + han) else "han"
        for script in _FAR_EAST:
            del letters[script]
        letters[name] = kana + han
    languages: dict[str, float] = {}
    for script, count in sorted(letters.items(), key=lambda item: (-item[1], item[0])):
        if script and count >= max(1, _PRESENT * total):
            only = [code for code in NAMES if _SCRIPT_OF.get(code, "latin") == script]
            code = only[0] if len(only) == 1 else _by_stop_words(script, words)
            if not code and script == "latin" and count > total / 2:
                code = ENGLISH
            languages[code or script] = count / total
    found = tuple(code for code in languages if code in NAMES)
    if not total:
        found = (ENGLISH,)
    return Detected(join(found) or NONE, languages)


def _by_stop_words(script: str, words: Iterable[str]) -> str | None:
    """The language with the most stop words among the ``words`` in ``script``; ``None`` if there are too few."""
    counts = Counter(word for word in words if _script(word[0]) == script)
    scores: dict[str, float] = defaultdict(float)
    for word, count in counts.items():
        codes = _languages_of().get(word, ())
        for code in codes:
            if _SCRIPT_OF.get(code, "latin") == script:
                scores[code] += count / len(codes)
    if not scores or max(scores.values()) < _EVIDENCE * counts.total():
        return None
    return max(sorted(scores), key=lambda code: (scores[code], code == ENGLISH))


@cache
def _languages_of() -> dict[str, tuple[str, ...]]:
    """Stop word -> its languages."""
    found: dict[str, tuple[str, ...]] = {}
    for code in LISTED:
        for word in stop_words(code):
            found[word] = (*found.get(word, ()), code)
    return found


@lru_cache(2**16)
def _script(character: str) -> str:
    return _SCRIPTS[bisect_right(_STARTS, ord(character)) - 1][1]
