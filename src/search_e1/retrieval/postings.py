"""Top passages of a query, from BM25 scores stored by word."""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

_SLACK = 1e-4
"""Relative tolerance: the sums that prune are rounded differently from the scores that are returned."""
_LOOKUP = 16
"""Entries of a list that are read in the time of one look-up in it."""


class Postings:
    """Memory-mapped passages and BM25 scores of each word.

    bm25s sums the scores of all passages, so that the cost of a query grows with the corpus. Here only passages that can reach
    the top are summed (MaxScore; Turtle and Flood, Query evaluation, 1995): rare words come first, and once the remaining
    common words together cannot lift a new passage into the top, they are looked up for the remaining candidates only.
    """

    def __init__(self, scores: Mapping[str, Any], most: np.ndarray) -> None:
        """``scores``: bm25s's CSC matrix (data float32, indices int32, indptr int64). ``most``: float32 [words], maxima."""
        # Plain arrays: slicing numpy's memmap class takes a microsecond each time.
        self._scores, self._passages, self._ends = (np.asarray(scores[k]) for k in ("data", "indices", "indptr"))
        self._most, self._number = most, int(scores["num_docs"])
        self._thread = threading.local()

    def best(self, words: Sequence[int], topk: int) -> list[tuple[int, float]]:
        """The ``topk`` passages with the highest scores above 0 and their scores, best first, ties in corpus order.

        ``words``: ids of the query's words, with repetitions. Scores are float32 sums in the order of the words, as in bm25s.
        """
        passages = self._candidates(words, topk)
        scores = np.zeros(len(passages), dtype=np.float32)
        for word in words:
            scores += self._of(word, passages)
        order = np.lexsort((passages, -scores))[:topk]
        return list(zip(passages[order].tolist(), scores[order].tolist(), strict=True))

    def _candidates(self, words: Sequence[int], topk: int) -> np.ndarray:
        """All passages that can be among the top ``topk``."""
        times = Counter(words)
        rare_first = sorted(times, key=lambda word: int(self._ends[word + 1] - self._ends[word]))
        most = [times[word] * float(self._most[word]) for word in rare_first]
        rest = list(accumulate(reversed(most), initial=0.0))[
            ::-1
        ]  # upper bounds of what the words from each one on can add
        sums, touched = self._sums(), []
        passages, closed, least = np.empty(0, dtype=np.int32), False, 0.0
        try:
            for word, more in zip(rare_first, rest, strict=False):
                if len(passages) >= topk:
                    least = _kth_largest(sums[passages], topk) * (1 - _SLACK)
                    closed = closed or more < least
                if closed:
                    passages = passages[sums[passages] + more >= least]
                listed, scores = self._list(word)
                if closed and len(passages) * _LOOKUP < len(listed):
                    sums[passages] += self._of(word, passages) * times[word]
                    continue
                if not closed:
                    passages = np.concatenate((passages, listed[sums[listed] == 0]))
                touched.append(listed)
                sums[listed] += scores * times[word] if times[word] > 1 else scores
            if len(passages) > topk:
                reached = sums[passages]
                passages = passages[reached >= _kth_largest(reached, topk) * (1 - _SLACK)]
            return passages
        finally:
            for listed in touched:
                sums[listed] = 0

    def _list(self, word: int) -> tuple[np.ndarray, np.ndarray]:
        start, end = self._ends[word], self._ends[word + 1]
        return self._passages[start:end], self._scores[start:end]

    def _of(self, word: int, passages: np.ndarray) -> np.ndarray:
        """Scores of ``passages`` for ``word``, float32, 0 where it does not occur."""
        listed, scores = self._list(word)
        at = np.minimum(np.searchsorted(listed, passages), len(listed) - 1)
        return np.where(listed[at] == passages, scores[at], np.float32(0))

    def _sums(self) -> np.ndarray:
        """Zeros, float32 [passages], of this thread; its user sets them back to 0."""
        if not hasattr(self._thread, "sums"):
            self._thread.sums = np.zeros(self._number, dtype=np.float32)
        return self._thread.sums


def _kth_largest(values: np.ndarray, k: int) -> float:
    return float(np.partition(values, len(values) - k)[len(values) - k])
