"""Tokens of BM25, the same for passages and queries: bm25s's tokenizer, for streams and in bounded memory."""

import hashlib
import re

import Stemmer

from search_e1.retrieval.bm25s_import import STOPWORDS_EN

STOPWORDS, STEMMER = "english", "english"
_CACHE_WORDS = 2**18  # about 40 MB; nearly all words of a passage are among the last that many


class Stems(dict[str, str]):
    """Lower-case word -> its stem, or "" for a stop word; filled on demand. Not thread-safe."""

    def __init__(self) -> None:
        super().__init__()
        self._stemmer = Stemmer.Stemmer(STEMMER, 0)  # without a cache of its own
        self._stopwords = frozenset(STOPWORDS_EN)

    def __missing__(self, word: str) -> str:
        if len(self) >= _CACHE_WORDS:
            self.clear()
        self[word] = stem = "" if word in self._stopwords else self._stemmer.stemWord(word)
        return stem


_find_words = re.compile(r"\b\w\w+\b").findall


def split(text: str) -> list[str]:
    """The words of ``text`` in lower case, stop words included."""
    return _find_words(text.lower())


def digest(stem: str) -> int:
    """64-bit hash of a stem: two of ten million collide with a probability of 3e-6."""
    return int.from_bytes(hashlib.blake2b(stem.encode(), digest_size=8).digest())
