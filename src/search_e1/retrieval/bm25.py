"""BM25 over memory-mapped files, which open instantly and are shared by processes."""

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np

from search_e1.errors import DataError
from search_e1.retrieval import directory as directories
from search_e1.retrieval.analysis import VERSION, Analysis, analysis_of, detect
from search_e1.retrieval.base import Hit
from search_e1.retrieval.bm25_build import K1, MAX_SCORES, WORDS, B, build
from search_e1.retrieval.bm25s_import import bm25s
from search_e1.retrieval.directory import IndexManifest, StoredIndex
from search_e1.retrieval.passages import Passages, hash64
from search_e1.runs.languages import AUTO, ENGLISH
from search_e1.runs.progress import Progress, silent
from search_e1.types import Passage

KIND = "bm25"

logger = logging.getLogger(__name__)
_SCORES = "bm25"
_SAMPLE = 256
"""Passages sampled to detect the language and to measure the index's coverage."""
_SAMPLED_CHARS = 4000  # per passage
_MUCH = 0.2
"""Share of passages without a word, or of letters in no word, from which a warning is logged."""
_SLACK = 1e-4
"""Relative tolerance: sums for pruning are rounded differently from the returned scores."""
_LOOKUP = 16
"""Number of list entries that can be read in the time of one lookup."""


class Bm25Index(StoredIndex):
    """An ``Index`` of the words of titles and texts, analyzed by language (``retrieval.analysis``).

    Every hit shares a word with the query; ties are in corpus order. Each thread takes 4 bytes per passage.
    """

    def __init__(self, directory: Path, manifest: IndexManifest) -> None:
        """Use ``open`` or ``build``."""
        super().__init__(directory, manifest)
        # Old indexes record no language; they are English.
        self.analysis = analysis_of(manifest.settings.get("language", ENGLISH))
        # Without the vocabulary, a dictionary that takes 1 GB for 21 million passages; WORDS stays on disk.
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
        language: str = AUTO,
    ) -> Self:
        """Build an index of ``corpus``; ``directory`` appears only when it is complete.

        The corpus is read once. ``source``: its checksum; with it, an interrupted build is resumed. ``processes``: processes
        that count words; more than one requires a main module that can be imported again (``multiprocessing``'s spawn).
        ``language``: codes such as ``de`` and ``en+zh``, or ``auto``, detected from a sample of the passages.

        Raises:
            ConfigError: an unknown language.
            DataError: the corpus is empty or has no word to search for.
            RunError: ``directory`` exists, or cannot be written.
        """
        if language != AUTO:
            analysis_of(language)  # before anything is written
        settings = source and {
            "kind": KIND, "format": directories.FORMAT, "source": source, "k1": K1, "b": B, "language": language,
            "analysis": VERSION,
        }  # fmt: skip
        with directories.building(directory, settings or None) as work:
            passages = work.passages(corpus, progress)
            sample = _sample(passages)
            analysis = _analysis(language, sample, directory)
            scores = work.path / _SCORES
            wordless = build(passages, scores, work.scratch, progress, processes, language=analysis.language)
            _warn_of_gaps(analysis, wordless, sample, directory)
            packages = ("bm25s", "PyStemmer", "numpy")
            manifest = work.finish(KIND, passages, {"k1": K1, "b": B, **analysis.settings}, packages)
        return cls(directory, manifest)

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Open the index in ``directory``.

        Raises:
            DataError: the index is missing, damaged, of another kind or of another version.
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
        """Ids of the query's words that occur in the corpus."""
        words = self.analysis.split(query)
        digests = np.array([hash64(root) for word in words if (root := self.analysis.stem(word))], dtype=np.uint64)
        at = np.minimum(np.searchsorted(self._words["digest"], digests), len(self._words) - 1)
        return self._words["id"][at[self._words["digest"][at] == digests]].tolist()


def _sample(passages: Passages) -> list[str]:
    """The beginnings of some passages, evenly spread."""
    step = max(1, len(passages) // _SAMPLE)
    return [next(iter(passages.texts(at, at + 1)))[:_SAMPLED_CHARS] for at in range(0, len(passages), step)]


def _analysis(language: str, sample: Sequence[str], directory: Path) -> Analysis:
    if language != AUTO:
        return analysis_of(language)
    found = detect(sample)
    logger.log(
        logging.DEBUG if found.language == "en" else logging.INFO,  # the usual case is not reported
        "%s: language %s, detected in a sample of %d passages; --language or retrieval.language sets another",
        directory,
        found,
        len(sample),
    )
    return analysis_of(found.language)


def _warn_of_gaps(analysis: Analysis, wordless: float, sample: Sequence[str], directory: Path) -> None:
    """Warn if searches will find little, with the reason and the remedy."""
    uncovered = analysis.uncovered(sample)
    if wordless < _MUCH and uncovered < _MUCH:
        return
    found = detect(sample).language
    remedy = f"build it with --language {found}" if found != analysis.language else "build a dense index instead"
    logger.warning(
        "%s: by the rules for language %s, %.0f%% of the passages have no word to search for, and %.0f%% of the letters are in "
        "no word, so searches will rarely find them; %s", directory, analysis.language, 100 * wordless, 100 * uncovered, remedy,
    )  # fmt: skip


class Postings:
    """Memory-mapped posting lists: the passages and BM25 scores of each word.

    bm25s sums the scores of all passages, so that the cost of a query grows with the corpus. Here only passages that can reach
    the top are summed (MaxScore; Turtle and Flood, Query evaluation, 1995). Rare words come first; once the remaining common
    words together cannot lift a new passage into the top, they are looked up only for the remaining candidates.
    """

    def __init__(self, scores: Mapping[str, Any], most: np.ndarray) -> None:
        """``scores``: bm25s's CSC matrix (data float32, indices int32, indptr int64). ``most``: float32 [words], maxima."""
        # Plain arrays: each slice of numpy's memmap class takes a microsecond.
        self._scores, self._passages, self._ends = (np.asarray(scores[k]) for k in ("data", "indices", "indptr"))
        self._most, self._number = most, int(scores["num_docs"])
        self._thread = threading.local()

    def best(self, words: Sequence[int], topk: int) -> list[tuple[int, float]]:
        """The ``topk`` passages with the highest positive scores, as (passage, score), best first, ties in corpus order.

        ``words``: ids of the query's words, with repetitions. Scores are float32 sums in word order, as in bm25s.
        """
        passages = self._candidates(words, topk)
        scores = np.zeros(len(passages), dtype=np.float32)
        for word in words:
            scores += self._word_scores(word, passages)
        order = np.lexsort((passages, -scores))[:topk]
        return list(zip(passages[order].tolist(), scores[order].tolist(), strict=True))

    def _candidates(self, words: Sequence[int], topk: int) -> np.ndarray:
        """All passages that can be among the top ``topk``."""
        times = Counter(words)
        rare_first = sorted(times, key=lambda word: int(self._ends[word + 1] - self._ends[word]))
        most = [times[word] * float(self._most[word]) for word in rare_first]
        rest = list(accumulate(reversed(most), initial=0.0))[::-1]  # maximum that the words from each one on can add
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
                    sums[passages] += self._word_scores(word, passages) * times[word]
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

    def _word_scores(self, word: int, passages: np.ndarray) -> np.ndarray:
        """Scores of ``passages`` for ``word``, float32 [passages]; 0 where it does not occur."""
        listed, scores = self._list(word)
        at = np.minimum(np.searchsorted(listed, passages), len(listed) - 1)
        return np.where(listed[at] == passages, scores[at], np.float32(0))

    def _sums(self) -> np.ndarray:
        """This thread's buffer of zeros, float32 [passages]; the caller resets it to 0."""
        if not hasattr(self._thread, "sums"):
            self._thread.sums = np.zeros(self._number, dtype=np.float32)
        return self._thread.sums


def _kth_largest(values: np.ndarray, k: int) -> float:
    return float(np.partition(values, len(values) - k)[len(values) - k])
