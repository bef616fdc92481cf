"""What a word is to BM25, the same for passages and for queries: bm25s's own tokeniser, for streams and in bounded memory."""

import hashlib
import re

import Stemmer
from bm25s.stopwords import STOPWORDS_EN

STOPWORDS, STEMMER = "english", "english"
_MOST_CACHED = 2**18  # words, about 40 MB; a passage's words are nearly always among the last that many


class Stems(dict[str, str]):
    """Word in lower case -> its stem, or nothing for a stop word. Remembers what it has seen. For one thread."""

    def __init__(self) -> None:
        super().__init__()
        # What is remembered here need not be remembered there again.
        self._stemmer = Stemmer.Stemmer(STEMMER, 0)
        self._stopwords = frozenset(STOPWORDS_EN)

    def __missing__(self, word: str) -> str:
        if len(self) >= _MOST_CACHED:
            self.clear()
        self[word] = stem = "" if word in self._stopwords else self._stemmer.stemWord(word)
        return stem


_found = re.compile(r"\b\w\w+\b").findall


def split(text: str) -> list[str]:
    """The words of ``text`` in lower case, stop words among them."""
    return _found(text.lower())


def digest(stem: str) -> int:
    """64 bits that stand for a stem: two of ten million share theirs with a probability of 3e-6."""
    return int.from_bytes(hashlib.blake2b(stem.encode(), digest_size=8).digest())
