"""Unicode's composed forms, in linear time: one accented letter, however it was encoded."""

import re
import unicodedata
from functools import cache
from typing import Literal

# What may be a run of marks, found fast: 30 characters of blocks that have marks, which Latin, Han and Hangul have not.
_PERHAPS = re.compile(
    "[\u0300-\u1fff\u20d0-\u2dff\u302a-\u302f\u3099\u309a\ua66f-\uabff\ufb1e\ufe20-\ufe2f\U000101fd-\U0001efff]{30}"
)


def nfc(text: str) -> str:
    """``text`` in NFC: a letter and its accents composed where there is one character for them.

    Python sorts the marks of one letter in quadratic time. No script puts 30 on it: more are composed 30 at a time.
    """
    return _normalize("NFC", text)


def nfkc(text: str) -> str:
    """``text`` in NFKC: the same for what is compatible, such as full-width letters and ligatures."""
    return _normalize("NFKC", text)


def _normalize(form: Literal["NFC", "NFKC"], text: str) -> str:
    if not _PERHAPS.search(text):
        return unicodedata.normalize(form, text)
    ends = [match.end() for match in _thirty_marks().finditer(text)]
    parts = zip([0, *ends], [*ends, len(text)], strict=True)
    return "".join(unicodedata.normalize(form, text[start:end]) for start, end in parts)


@cache
def _thirty_marks() -> re.Pattern[str]:
    marks = "".join(chr(i) for i in range(0x300, 0x1EFFF) if unicodedata.combining(chr(i)))
    return re.compile(f"[{marks}]{{30}}")
