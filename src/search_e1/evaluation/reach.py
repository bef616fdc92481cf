"""Which passages hold an answer, and where BM25 ranks the first of them, for all questions in one pass over the passages.

Passages become arrays of word ids, one chunk at a time. An answer is looked up at the positions of its rarest word. Words of
the questions are counted, and scored once all passages are read. About 300 bytes per passage stay in memory.
"""

import math
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from search_e1.data.answers import language_in_force, words
from search_e1.evaluation.recall import patterns
from search_e1.retrieval.analysis import one_a_script
from search_e1.retrieval.bm25_build import K1, B
from search_e1.runs.languages import ENGLISH
from search_e1.runs.nfc import nfc
from search_e1.runs.progress import Progress, silent
from search_e1.types import Question

_CHUNK = 2**15  # passages
_WORD, _ARTICLES = re.compile(r"[^\W_]+"), frozenset({"a", "an", "the"})
_DROPPED, _UNCOUNTED, _OTHER = range(3)
"""Ids shared by words in no answer and no question: articles; words that BM25 does not count, ends of passages; all others."""
_MARK = "\0"


class Reach(NamedTuple):
    """How the passages answer one question."""

    passages: int
    """Number of passages with an answer, as ``recall`` defines it."""
    rank: int | None
    """Rank of the first of them when BM25 searches for the question, in the active language; ``None`` if none shares a word
    with the question."""


class Reached(NamedTuple):
    """The result of ``measure``."""

    by_question: list[Reach | None]
    """``None`` for questions without an answer to search for (yes/no, unanswerable)."""
    passages: int
    repeated: int
    """Passages with the text of an earlier one."""


def measure(texts: Iterable[str], questions: Sequence[Question], progress: Progress = silent) -> Reached:
    """The reach of every question. ``texts``: title and text of each passage."""
    wanted = [patterns(question) for question in questions]
    numbers = {pattern: i for i, pattern in enumerate(dict.fromkeys(chain.from_iterable(wanted)))}
    vocabulary = _Vocabulary(numbers, questions)
    found: list[list[np.ndarray]] = [[] for _ in numbers]
    index, seen, total = _Scores(len(vocabulary.roots)), set[int](), 0
    stream = iter(texts)
    while chunk := list(islice(stream, _CHUNK)):
        seen.update(map(hash, chunk))
        ids, passage = vocabulary.encode(chunk)
        for i, at in _occurrences(ids, vocabulary.patterns):
            found[i].append(np.unique(passage[at]) + np.int32(total))
        index.add(ids, passage, vocabulary, total)
        total += len(chunk)
        progress(total, 0, f"{total:,} passages")
    index.finish(total)
    by_question: list[Reach | None] = []
    for done, (question, own) in enumerate(zip(questions, wanted, strict=True), 1):
        parts = [part for pattern in own for part in found[numbers[pattern]]]
        holders = np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.int32)
        by_question.append(Reach(len(holders), index.rank(vocabulary.query(question), holders)) if own else None)
        if done % 1000 == 0:
            progress(done, len(questions), "questions")
    return Reached(by_question, total, total - len(seen))


class _Vocabulary(dict[str, int]):
    """Word -> id; words in no answer and no question share the ids above.

    In English, answers and the index have the same words. In other languages they differ (e.g. characters and bigrams in
    Chinese), and a passage is encoded twice: as the words that answers are matched against, then as the index's words, whose
    keys begin with ``_MARK``.
    """

    def __init__(self, answers: Iterable[str], questions: Iterable[Question]) -> None:
        super().__init__()
        self._analysis = one_a_script(language_in_force())
        self._mark = "" if language_in_force() == ENGLISH else _MARK
        self.roots: dict[str, int] = {}
        """Stem of a word in a question -> its number."""
        for word in {word for question in questions for word in self._split(question.text)}:
            if root := self._stem(word):
                self.roots.setdefault(root, len(self.roots))
        self._answers = {word for answer in answers for word in answer.split()}
        self._root_of, self._counted = array("i", [-1] * 3), array("b", [0, 0, 1])
        self.patterns = [tuple(map(self.__getitem__, answer.split())) for answer in answers]

    def __missing__(self, word: str) -> int:
        root = self._stem(word.removeprefix(self._mark)) if word.startswith(self._mark) else ""
        number = self.roots.get(root, -1)
        if word in _ARTICLES and not self._mark:
            id = _DROPPED
        elif number < 0 and word not in self._answers:
            id = _OTHER if root else _UNCOUNTED
        else:
            id = len(self._root_of)
            self._root_of.append(number)
            self._counted.append(bool(root))
        self[word] = id
        return id

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the words of all ``texts``, and the index of the text that each is in; int32 [words] each."""
        ids, lengths = array("i"), []
        for text in texts:
            own = [*map(self.__getitem__, self._words(text)), _UNCOUNTED]
            ids.extend(own)
            lengths.append(len(own))
        flat = np.frombuffer(ids, dtype=np.int32)
        kept = flat != _DROPPED
        return flat[kept], np.repeat(np.arange(len(texts), dtype=np.int32), lengths)[kept]

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """For each id, the number of its stem (-1 if no question has it; int32), and whether BM25 counts the word (int8)."""
        return np.array(self._root_of, dtype=np.int32), np.array(self._counted, dtype=np.int8)

    def query(self, question: Question) -> list[int]:
        """Numbers of the stems of the question's words, with repetitions."""
        return [self.roots[root] for word in self._split(question.text) if (root := self._stem(word))]

    def _words(self, text: str) -> list[str]:
        if not self._mark:
            return self._split(text)
        return [*words(text), "", *(self._mark + word for word in self._split(text))]

    def _split(self, text: str) -> list[str]:
        """The index's words; in English also articles and single characters, which answers may contain."""
        return self._analysis.split(text) if self._mark else _WORD.findall(nfc(text.lower()))

    def _stem(self, word: str) -> str:
        """The stem that BM25 indexes ``word`` under; "" for a stop word, and for a single character in English."""
        return self._analysis.stem(word) if self._mark or len(word) > 1 else ""


def _occurrences(ids: np.ndarray, wanted: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, np.ndarray]]:
    """Index of each sequence of ``wanted`` that occurs in ``ids``, and the positions where it begins."""
    order = np.argsort(ids, kind="stable")
    most = max((max(pattern) for pattern in wanted), default=0)
    counts = np.bincount(ids, minlength=most + 1)
    ends, count = np.cumsum(counts).tolist(), counts.tolist()
    for i, pattern in enumerate(wanted):
        rarest = min(range(len(pattern)), key=lambda at: count[pattern[at]])
        word = pattern[rarest]
        if not count[word]:
            continue
        at = order[ends[word] - count[word] : ends[word]] - rarest
        if len(pattern) > 1:
            at = at[(at >= 0) & (at + len(pattern) <= len(ids))]
        for offset, other in enumerate(pattern):
            if offset != rarest:
                at = at[ids[at + offset] == other]
        if len(at):
            yield i, at


class _Scores:
    """BM25 scores of the questions' words only, by the formula of ``retrieval.bm25_build``."""

    def __init__(self, words: int) -> None:
        self._words = words
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # word, passage, count
        self._lengths: list[np.ndarray] = []

    def add(self, ids: np.ndarray, passage: np.ndarray, vocabulary: _Vocabulary, before: int) -> None:
        """Count the words of a chunk whose first passage has number ``before``."""
        root_of, counted = vocabulary.tables()
        self._lengths.append(np.bincount(passage, weights=counted[ids]).astype(np.int32))
        roots = root_of[ids]
        asked = roots >= 0
        keys, counts = np.unique(passage[asked].astype(np.int64) * self._words + roots[asked], return_counts=True)
        where, word = np.divmod(keys, max(1, self._words))
        self._parts.append((word.astype(np.int32), (where + before).astype(np.int32), counts.astype(np.float32)))

    def finish(self, passages: int) -> None:
        """Compute the scores from the counts."""
        empty = (np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32))
        word, passage, tf = (np.concatenate(column) for column in zip(*(self._parts or [empty]), strict=True))
        order = np.argsort(word, kind="stable")
        word, self._passage, tf = word[order], passage[order], tf[order]
        frequency = np.bincount(word, minlength=self._words)
        self._ends = np.concatenate(([0], np.cumsum(frequency)))
        idf = np.array([math.log(1 + (passages - n + 0.5) / (n + 0.5)) for n in frequency.tolist()], dtype=np.float32)
        lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0)
        relative = lengths / (lengths.mean() or 1) if len(lengths) else lengths
        self._score = (idf[word] * (tf / (K1 * ((1 - B) + B * relative[self._passage]) + tf))).astype(np.float32)
        self._sums = np.zeros(passages, dtype=np.float32)

    def rank(self, query: Sequence[int], holders: np.ndarray) -> int | None:
        """The best rank among ``holders``, sorted passage numbers; ties rank in corpus order. ``None`` if none has a score."""
        if not len(holders):
            return None
        self._sums.fill(0)
        for word in query:
            here = slice(self._ends[word], self._ends[word + 1])
            self._sums[self._passage[here]] += self._score[here]
        own = self._sums[holders]
        best = own.max()
        if best <= 0:
            return None
        first = holders[own.argmax()]
        return 1 + int(np.count_nonzero(self._sums > best)) + int(np.count_nonzero(self._sums[:first] == best))
