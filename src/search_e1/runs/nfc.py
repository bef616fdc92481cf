"""Unicode's composed normal forms, in linear time."""

import re
import unicodedata
from functools import cache
from typing import Literal

# Fast test for a run of marks: 30 characters from blocks that have marks, unlike Latin, Han and Hangul.
_PERHAPS = re.compile(
    "[\u0300-\u1fff\u20d0-\u2dff\u302a-\u302f\u3099\u309a\ua66f-\uabff\ufb1e\ufe20-\ufe2f\U000101fd-\U0001efff]{30}"
)


def nfc(text: str) -> str:
    """``text`` in NFC: a letter and its accents become one character if Unicode has it.

    Python sorts the marks of one letter in quadratic time. No script puts 30 on a letter; longer runs are composed 30 at a
    time.
    """
    return _normalize("NFC", text)


def nfkc(text: str) -> str:
    """``text`` in NFKC: NFC, with compatible characters such as full-width letters and ligatures replaced."""
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
