"""Languages by ISO 639-1 code, and the text handling that retrieval and exact match share.

A corpus or a set of answers may have several languages: ``en+zh``. ``en`` alone follows the published English rule byte for
byte; every other choice folds text (``fold``) and splits scripts that have no spaces between words.
"""

import difflib
import re
import unicodedata
from functools import cache

from search_e1.errors import ConfigError
from search_e1.runs.nfc import nfkc

ENGLISH = "en"
NAMES = {
    "ar": "arabic", "bg": "bulgarian", "ca": "catalan", "cs": "czech", "da": "danish", "de": "german", "el": "greek",
    "en": "english", "es": "spanish", "et": "estonian", "eu": "basque", "fa": "persian", "fi": "finnish", "fr": "french",
    "ga": "irish", "he": "hebrew", "hi": "hindi", "hu": "hungarian", "hy": "armenian", "id": "indonesian", "it": "italian",
    "ja": "japanese", "km": "khmer", "ko": "korean", "lo": "lao", "lt": "lithuanian", "my": "burmese", "ne": "nepali",
    "nl": "dutch", "no": "norwegian", "pl": "polish", "pt": "portuguese", "ro": "romanian", "ru": "russian", "sr": "serbian",
    "sv": "swedish", "ta": "tamil", "th": "thai", "tr": "turkish", "uk": "ukrainian", "vi": "vietnamese", "zh": "chinese",
}  # fmt: skip
"""Code -> English name, which is the name of Snowball's stemmer if there is one."""
AUTO = "auto"
"""Instead of codes: the languages found in a sample of the corpus."""
NONE = "none"
"""Instead of a code: no stop words and no stemmer."""
_JOINED = "+"
_LAST = 0x1FFFF
"""Code points above it are all Han characters."""

UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u0edc-\u0edf\u1000-\u103f\u1050-\u109f\u1100-\u11ff\u1780-\u17d3\u17dc\u17dd"
    "\u3005-\u3007\u3031-\u3035\u3041-\u3096\u3099-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3105-\u312f\u31f0-\u31ff\u3400-\u9fff"
    "\ua960-\ua97c\uaa60-\uaa7f\uac00-\ud7ff\uf900-\ufaff\U00016ff0-\U00016ff1\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, kana, Han and Hangul with their marks, for a character class. Korean has spaces, but its words
take endings, and spaces within compounds are optional."""


@cache
def parse(text: str, key: str) -> tuple[str, ...]:
    """The codes in ``text``, for example ``en+zh``. ``key``: the option or config key that has this value.

    Raises:
        ConfigError: a code is unknown (the message suggests the nearest) or repeated.
    """
    codes = tuple(text.lower().split(_JOINED))
    for code in codes:
        if code not in NAMES and (code != NONE or len(codes) > 1):
            by_name = {name: known for known, name in NAMES.items()}
            close = difflib.get_close_matches(code, [*by_name, *NAMES], n=1, cutoff=0.75)
            hint = f"did you mean {by_name.get(close[0], close[0])!r}?" if close else f"known: {' '.join(NAMES)}, or {NONE}"
            raise ConfigError(f"{key} = {text!r}: no such language; {hint}")
    if len(set(codes)) < len(codes):
        raise ConfigError(f"{key} = {text!r}: a language is repeated; name each once")
    return codes


def join(codes: tuple[str, ...]) -> str:
    """The inverse of ``parse``."""
    return _JOINED.join(codes)


def fold(text: str, codes: tuple[str, ...] = ()) -> str:
    """``text`` in lower case and NFKC, with spelling variants unified.

    Removes Arabic vowel signs, tatweel and the hamza of alef, Hebrew points, and invisible joiners; decimal digits become
    ASCII. ``codes`` settle what depends on the language: Turkish i, Persian yeh and kaf.
    """
    if "tr" in codes:
        text = text.replace("İ", "i").replace("I", "ı")
    if text.isascii():
        return text.lower()
    text, (table, needed) = nfkc(nfkc(text).lower()), _table("fa" in codes and "ar" not in codes)
    return text.translate(table) if needed.search(text) else text  # translating takes longer than all the rest


@cache
def _table(persian: bool) -> tuple[dict[int, str | None], re.Pattern[str]]:
    """The table of ``fold``'s replacements, and a pattern that matches text with something to replace."""
    arabic = {"ی": "ي", "ى": "ي", "ک": "ك"}
    letters = {"ي": "ی", "ى": "ی", "ك": "ک"} if persian else arabic
    signs = "\u00ad\u0640\u0670\u200c\u200d\u2060\ufeff"
    ranges = ((0x0610, 0x061B), (0x064B, 0x0660), (0x06D6, 0x06DD), (0x06DF, 0x06E9), (0x06EA, 0x06EE), (0x0591, 0x05BE))
    removed = [*map(ord, signs), *(i for first, end in ranges for i in range(first, end)), 0x05BF, 0x05C1, 0x05C2]
    digits = {i: str(unicodedata.decimal(chr(i))) for i in range(128, _LAST) if chr(i).isdecimal()}
    alefs = dict.fromkeys(map(ord, "أإآٱ"), "ا")
    table = digits | alefs | {ord(k): v for k, v in letters.items()} | dict.fromkeys(removed)
    return table, re.compile(f"[{''.join(map(chr, table))}]")


@cache
def word_pattern() -> re.Pattern[str]:
    """Matches words of letters, digits and marks in folded text, and runs of unspaced scripts.

    Python's ``\\w`` does not match the vowel signs of Indic scripts and would end a word there.
    """
    return re.compile(f"[{UNSPACED}]+|(?:[^\\W_{UNSPACED}]+[{_marks(unspaced=False)}]*)+")


@cache
def character_pattern() -> re.Pattern[str]:
    """Matches each character of unspaced scripts, with its marks."""
    return re.compile(f"[{UNSPACED}][{_marks(unspaced=True)}]*")


def is_unspaced(character: str) -> bool:
    """Whether ``character`` belongs to ``UNSPACED``."""
    return bool(_unspaced().match(character))


@cache
def _unspaced() -> re.Pattern[str]:
    return re.compile(f"[{UNSPACED}]")


def _marks(unspaced: bool) -> str:
    """The marks of unspaced scripts, or of all others, for a character class."""
    every = (chr(i) for i in range(0x300, _LAST) if unicodedata.category(chr(i))[0] == "M")
    return "".join(mark for mark in every if is_unspaced(mark) == unspaced)
