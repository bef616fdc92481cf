"""BM25 over memory-mapped files, which processes share and which open at once."""

import logging
import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np

from search_e1.errors import DataError
from search_e1.retrieval import directory as directories
from search_e1.retrieval.base import Hit
from search_e1.retrieval.bm25_build import K1, MAX_SCORES, STEMMER, STOPWORDS, WORDS, B, build, split, stem
from search_e1.retrieval.bm25s_import import bm25s
from search_e1.retrieval.directory import IndexManifest, StoredIndex
from search_e1.retrieval.passages import Passages, hash64
from search_e1.runs.progress import Progress, silent
from search_e1.types import Passage

KIND = "bm25"
SETTINGS = {"k1": K1, "b": B, "stopwords": STOPWORDS, "stemmer": STEMMER}

logger = logging.getLogger(__name__)
_SCORES = "bm25"
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Letters of Thai, Lao, Burmese, Khmer, Japanese and Chinese, which put no spaces between words."""
_SAMPLE = 256  # passages
_SLACK = 1e-4
"""Relative tolerance: the sums that prune are rounded differently from the scores that are returned."""
_LOOKUP = 16
"""Entries of a list that are read in the time of one look-up in it."""


class Bm25Index(StoredIndex):
    """An ``Index`` of titles and texts without English stop words, stemmed (Snowball).

    Every hit shares a word with the query; ties are in corpus order. Each thread takes 4 bytes a passage.
    """

    def __init__(self, directory: Path, manifest: IndexManifest) -> None:
        """Use ``open`` or ``build``."""
        super().__init__(directory, manifest)
        # Without the vocabulary, a dictionary of a gigabyte for 21 million passages; WORDS stays on disk.
        files = directory / _SCORES
        model = bm25s.BM25.load(files, mmap=True, load_vocab=False, show_progress=False, allow_pickle=False)
        self._postings = Postings(model.scores, np.load(files / MAX_SCORES, mmap_mode="r", allow_pickle=False))
        self._words = np.asarray(np.load(files / WORDS, mmap_mode="r", allow_pickle=False))

    @classmethod
    def build(
        cls,
        corpus: Iterable[Passage],
        directory: Path,
        progress: Progress = silent,
        *,
        source: str | None = None,
        processes: int = 1,
    ) -> Self:
        """Build an index of ``corpus`` in ``directory``, which gets its name only when it is complete.

        The corpus is read once. ``source`` is its checksum; with it, an interrupted build is resumed. ``processes`` count words
        in parallel; more than one requires a main module that can be imported again (``multiprocessing``'s spawn).

        Raises:
            DataError: the corpus is empty or has no word to search for.
            RunError: ``directory`` exists, or cannot be written.
        """
        settings = source and {"kind": KIND, "format": directories.FORMAT, "source": source, **SETTINGS}
        with directories.building(directory, settings or None) as work:
            passages = work.passages(corpus, progress)
            build(passages, work.path / _SCORES, work.scratch, progress, processes)
            if (share := _unspaced(passages)) > 0.5:
                logger.warning(
                    "%s: %.0f%% of the letters are of scripts without spaces between words, which BM25 takes for single words: "
                    "searches will find little; build a dense index instead", directory, 100 * share,
                )  # fmt: skip
            manifest = work.finish(KIND, passages, SETTINGS, ("bm25s", "PyStemmer", "numpy"))
        return cls(directory, manifest)

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Open the index in ``directory``.

        Raises:
            DataError: there is no index, or it is damaged, of another kind or of another version.
        """
        directory = Path(directory)
        manifest = directories.read(directory, KIND)
        try:
            return cls(directory, manifest)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{directory}: a damaged BM25 index ({reason}); {directories.REBUILD}") from None

    def _search(self, queries: list[str], topk: int) -> list[list[Hit]]:
        best = (self._postings.best(self._ids(query), topk) for query in queries)
        return [[self.passages.hit(i, score) for i, score in found] for found in best]

    def _ids(self, query: str) -> list[int]:
        """Ids of the query's words that occur in a passage."""
        digests = np.array([hash64(root) for word in split(query) if (root := stem(word))], dtype=np.uint64)
        at = np.minimum(np.searchsorted(self._words["digest"], digests), len(self._words) - 1)
        return self._words["id"][at[self._words["digest"][at] == digests]].tolist()


def _unspaced(passages: Passages) -> float:
    """The share of letters of ``_UNSPACED`` in some passages, evenly spread over all."""
    step = max(1, len(passages) // _SAMPLE)
    text = "".join(next(iter(passages.texts(at, at + 1))) for at in range(0, len(passages), step))
    letters = sum(map(str.isalpha, text))
    return len(_UNSPACED.findall(text)) / letters if letters else 0.0


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
        rest = list(accumulate(reversed(most), initial=0.0))[::-1]  # what the words from each one on can add at most
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
