"""Retrieval recall: whether an answer was within reach of the policy at all.

A text contains an answer if the answer's words occur in it consecutively: runs of letters and digits, ignoring case and the
articles a, an and the. Unlike in EM, punctuation separates words: "Paris" is found in "Paris-based", "1963" in "1961/1963".
Other languages have their own words and articles (``data.answers``). Yes/no questions and unanswerable ones are excluded
(``None``): no passage contains such an answer.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from search_e1.data import answers
from search_e1.retrieval.base import Retriever
from search_e1.runs import read_records
from search_e1.runs.progress import Progress, silent
from search_e1.types import Question, Record

FILE = "recall.jsonl"
_YES_NO = frozenset({"yes", "no"})
_BATCH, _PROGRESS_EVERY = 64, 1000


class Recall(Record):
    """Whether retrieval can find an answer to one question, independent of any policy."""

    benchmark: str
    id: str
    in_topk: bool | None
    """The first ``rollout.topk`` passages retrieved for the question's text contain an answer; ``None`` for yes/no and
    unanswerable questions."""
    in_corpus: bool | None
    """Some passage contains an answer; ``None`` as above, and if the passages cannot be read (on a server)."""


Recalls = Mapping[tuple[str, str], Recall]
"""By benchmark and question id."""


def words(text: str) -> str:
    """The words of ``text`` that matching compares, joined by spaces."""
    return " ".join(answers.words(text))


def measure(
    retriever: Retriever,
    texts: Iterable[str] | None,
    questions_by_benchmark: Mapping[str, Sequence[Question]],
    topk: int,
    progress: Progress = silent,
) -> list[Recall]:
    """The recall of every question, in order. ``texts``: title and text of each passage; ``None`` if they cannot be read.

    Raises:
        RetrievalError: from the retriever.
    """
    names = [name for name, questions in questions_by_benchmark.items() for _ in questions]
    questions = [question for part in questions_by_benchmark.values() for question in part]
    answers = [patterns(question) for question in questions]
    topk_hits = in_topk(retriever, questions, topk, progress)
    corpus_hits = [None] * len(questions) if texts is None else in_corpus(texts, answers, progress)
    return [
        Recall(benchmark=name, id=question.id, in_topk=topk_hit, in_corpus=corpus_hit)
        for name, question, topk_hit, corpus_hit in zip(names, questions, topk_hits, corpus_hits, strict=True)
    ]


def figures(rows: Sequence[Recall]) -> dict[str, float | None]:
    """Shares over the questions with an answer to search for; ``None`` if there is no such question."""
    return {name: share_of(getattr(row, name) for row in rows) for name in ("in_topk", "in_corpus")}


def share_of(values: Iterable[bool | None]) -> float | None:
    """The share of true values among those that are not ``None``; ``None`` if all are."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def is_yes_no(question: Question) -> bool:
    """Whether every right answer is yes or no."""
    return bool(question.answers) and all(words(answer) in _YES_NO for answer in question.answers)


def patterns(question: Question) -> tuple[str, ...]:
    """The word sequences to search for: each answer's words, without duplicates, yes, no and empty ones. Empty for an
    unanswerable question."""
    return () if question.unanswerable else patterns_of(question.answers)


def patterns_of(texts: Iterable[str]) -> tuple[str, ...]:
    """The word sequences to search for, from the answers ``texts``; see ``patterns``."""
    found = dict.fromkeys(map(words, texts))
    return tuple(pattern for pattern in found if pattern and pattern not in _YES_NO)


def holds(texts: Iterable[str], answers: Sequence[str]) -> bool | None:
    """Whether one of ``texts`` contains one of the patterns ``answers``; ``None`` without patterns."""
    if not answers:
        return None
    padded = (f" {words(text)} " for text in texts)
    return any(f" {pattern} " in text for text in padded for pattern in answers)


def in_corpus(texts: Iterable[str], answers: Sequence[Sequence[str]], progress: Progress = silent) -> list[bool | None]:
    """For each question's patterns, whether one of ``texts`` contains one; ``None`` without patterns.

    One pass over ``texts`` for all patterns. A pattern is compared only where its longest word occurs, which costs one set
    intersection per text; a question is dropped once it is found.
    """
    found: list[bool | None] = [False if some else None for some in answers]
    pending: dict[str, list[tuple[str, int]]] = defaultdict(list)  # longest word -> padded patterns and their questions
    for i, some in enumerate(answers):
        for pattern in some:
            pending[max(pattern.split(), key=len)].append((f" {pattern} ", i))
    for done, raw in enumerate(texts, 1):
        text = f" {words(raw)} "
        for word in pending.keys() & set(text.split()):
            for pattern, i in pending[word]:
                if not found[i] and pattern in text:
                    found[i] = True
            pending[word] = [(pattern, i) for pattern, i in pending[word] if not found[i]]
            if not pending[word]:
                del pending[word]
        if done % _PROGRESS_EVERY == 0:
            progress(done, 0, "passages")
        if not pending:
            break
    return found


def in_topk(retriever: Retriever, questions: Sequence[Question], topk: int, progress: Progress = silent) -> list[bool | None]:
    """For each question, whether the first ``topk`` passages for its text contain an answer; ``None`` without patterns.

    Raises:
        RetrievalError: from the retriever.
    """
    found: list[bool | None] = []
    for start in range(0, len(questions), _BATCH):
        batch = questions[start : start + _BATCH]
        hits = retriever.search([question.text for question in batch], topk)
        found += [
            holds((f"{hit.title} {hit.text}" for hit in passages), patterns(question))
            for question, passages in zip(batch, hits, strict=True)
        ]
        progress(len(found), len(questions), "questions")
    return found


def read(path: Path) -> Iterator[Recall]:
    """The rows of ``recall.jsonl``; see ``runs.read_records``."""
    return read_records(path, Recall, f"remove {path.parent} and evaluate again")
