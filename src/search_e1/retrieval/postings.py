"""The best passages for the words of a query, from BM25 scores that lie on disk by word."""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

_SLACK = 1e-4
"""Relative. Sums that decide what is looked at are rounded differently from those that are answered."""
_LOOKUP = 16
"""Passages in a list that are read in the time in which one is looked up in it."""


class Postings:
    """For each word the passages that hold it and their BM25 scores for it, memory-mapped.

    bm25s adds the scores up over all passages, so that a query costs as much as the corpus is large. Here only what can
    still be among the best is added up (MaxScore: Turtle and Flood, Query evaluation, 1995): the rare words come first, and
    once the common ones together cannot lift another passage into the best, they are looked up for those that remain.
    """

    def __init__(self, scores: Mapping[str, Any], most: np.ndarray) -> None:
        """``scores``: bm25s's (CSC: data float32, indices int32, indptr int64). ``most``: float32 [words], the greatest."""
        # Plain arrays: slices of numpy's memmap class take a microsecond each to make.
        self._scores, self._passages, self._ends = (np.asarray(scores[k]) for k in ("data", "indices", "indptr"))
        self._most, self._number = most, int(scores["num_docs"])
        self._thread = threading.local()

    def best(self, words: Sequence[int], topk: int) -> list[tuple[int, float]]:
        """The ``topk`` passages with the greatest scores above 0, best first, ties in their order, and these scores.

        ``words`` are the query's, repeated as they are in it. A score is the sum in their order in float32, as in bm25s.
        """
        passages = self._candidates(words, topk)
        scores = np.zeros(len(passages), dtype=np.float32)
        for word in words:
            scores += self._of(word, passages)
        order = np.lexsort((passages, -scores))[:topk]
        return list(zip(passages[order].tolist(), scores[order].tolist(), strict=True))

    def _candidates(self, words: Sequence[int], topk: int) -> np.ndarray:
        """All passages that can be among the ``topk`` best."""
        times = Counter(words)
        rare_first = sorted(times, key=lambda word: int(self._ends[word + 1] - self._ends[word]))
        most = [times[word] * float(self._most[word]) for word in rare_first]
        rest = list(accumulate(reversed(most), initial=0.0))[::-1]  # the most that the words from each one on can add
        sums, touched = self._sums(), []
        passages, closed, least = np.empty(0, dtype=np.int32), False, 0.0
        try:
            for word, more in zip(rare_first, rest, strict=False):
                if len(passages) >= topk:
                    least = _greatest(sums[passages], topk) * (1 - _SLACK)
                    closed = closed or more < least
                if closed:
                    passages = passages[sums[passages] + more >= least]
                there, scores = self._list(word)
                if closed and len(passages) * _LOOKUP < len(there):
                    sums[passages] += self._of(word, passages) * times[word]
                    continue
                if not closed:
                    passages = np.concatenate((passages, there[sums[there] == 0]))
                touched.append(there)
                sums[there] += scores * times[word] if times[word] > 1 else scores
            if len(passages) > topk:
                found = sums[passages]
                passages = passages[found >= _greatest(found, topk) * (1 - _SLACK)]
            return passages
        finally:
            for there in touched:
                sums[there] = 0

    def _list(self, word: int) -> tuple[np.ndarray, np.ndarray]:
        start, end = self._ends[word], self._ends[word + 1]
        return self._passages[start:end], self._scores[start:end]

    def _of(self, word: int, passages: np.ndarray) -> np.ndarray:
        """float32, as long as ``passages``: their scores for ``word``, 0 for those that lack it."""
        there, scores = self._list(word)
        at = np.minimum(np.searchsorted(there, passages), len(there) - 1)
        return np.where(there[at] == passages, scores[at], np.float32(0))

    def _sums(self) -> np.ndarray:
        """float32 [passages], all 0; this thread's own, and left so again by who uses it."""
        if not hasattr(self._thread, "sums"):
            self._thread.sums = np.zeros(self._number, dtype=np.float32)
        return self._thread.sums


def _greatest(values: np.ndarray, k: int) -> float:
    """The ``k``-th greatest."""
    return float(np.partition(values, len(values) - k)[len(values) - k])
