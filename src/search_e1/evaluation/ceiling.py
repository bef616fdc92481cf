"""The retrieval ceiling: whether an answer could have been read at all.

An answer is found in a text if its words stand there in a row: runs of letters and digits, without a, an and the, whatever
their case. Unlike in EM, punctuation separates words, so that "Paris" is found in "Paris-based" and "1963" in "1961/1963".
Questions whose only answers are yes or no are set apart: nothing can be found for them, and what is said of them is ``None``.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from search_e1.retrieval.base import Retriever
from search_e1.runs import read_records
from search_e1.runs.progress import Progress, silent
from search_e1.types import Question, Record

FILE = "ceiling.jsonl"
_YES_NO = frozenset({"yes", "no"})
_WORD, _ARTICLES = re.compile(r"[^\W_]+"), frozenset({"a", "an", "the"})
_AT_ONCE, _TOLD_EVERY = 64, 1000


class Ceiling(Record):
    """What retrieval could do for one question, whatever the policy."""

    benchmark: str
    id: str
    in_topk: bool | None
    """An answer is in one of the first ``rollout.topk`` passages for the question itself; ``None`` for yes/no questions."""
    in_corpus: bool | None
    """An answer is in some passage; ``None`` for yes/no questions, and where the passages cannot be read (a server's)."""


def _words(text: str) -> str:
    return " ".join(word for word in _WORD.findall(text.lower()) if word not in _ARTICLES)


def measure(
    retriever: Retriever,
    texts: Iterable[str] | None,
    questions_by_benchmark: Mapping[str, Sequence[Question]],
    topk: int,
    progress: Progress = silent,
) -> list[Ceiling]:
    """The ceiling of every question, in order. ``texts``: title and text of all passages; ``None`` if they cannot be read.

    Raises:
        RetrievalError: from the retriever.
    """
    names = [name for name, questions in questions_by_benchmark.items() for _ in questions]
    questions = [question for part in questions_by_benchmark.values() for question in part]
    wanted = [patterns(question) for question in questions]
    near = in_topk(retriever, questions, topk, progress)
    there = [None] * len(questions) if texts is None else in_corpus(texts, wanted, progress)
    return [
        Ceiling(benchmark=name, id=question.id, in_topk=topk_holds, in_corpus=corpus_holds)
        for name, question, topk_holds, corpus_holds in zip(names, questions, near, there, strict=True)
    ]


def figures(rows: Sequence[Ceiling]) -> dict[str, float | None]:
    """Shares of the questions whose answer can be looked for; ``None`` where that is none."""
    known = {
        name: [value for row in rows if (value := getattr(row, name)) is not None] for name in ("in_topk", "in_corpus")
    }
    return {name: fmean(values) if values else None for name, values in known.items()}


def is_yes_no(question: Question) -> bool:
    """Whether its right answers are yes or no and nothing else."""
    return all(_words(answer) in _YES_NO for answer in question.answers)


def patterns(question: Question) -> tuple[str, ...]:
    """What to look for: the words of its answers, each once, without yes, no and those of which nothing is left."""
    found = dict.fromkeys(map(_words, question.answers))
    return tuple(pattern for pattern in found if pattern and pattern not in _YES_NO)


def holds(texts: Iterable[str], wanted: Sequence[str]) -> bool | None:
    """Whether one of ``texts`` holds one of the patterns; ``None`` without patterns."""
    if not wanted:
        return None
    padded = (f" {_words(text)} " for text in texts)
    return any(f" {pattern} " in text for text in padded for pattern in wanted)


def in_corpus(texts: Iterable[str], wanted: Sequence[Sequence[str]], progress: Progress = silent) -> list[bool | None]:
    """For each question's patterns, whether one of ``texts`` holds one of them; ``None`` without patterns.

    One pass over ``texts``, for all patterns at once. A pattern is looked for where its longest word occurs, which one
    set intersection a text tells; a question that was found is looked for no longer.
    """
    found: list[bool | None] = [False if some else None for some in wanted]
    waiting: dict[str, list[tuple[str, int]]] = defaultdict(list)  # longest word -> padded patterns and their questions
    for i, some in enumerate(wanted):
        for pattern in some:
            waiting[max(pattern.split(), key=len)].append((f" {pattern} ", i))
    for done, raw in enumerate(texts, 1):
        text = f" {_words(raw)} "
        for word in waiting.keys() & set(text.split()):
            for pattern, i in waiting[word]:
                if not found[i] and pattern in text:
                    found[i] = True
            waiting[word] = [(pattern, i) for pattern, i in waiting[word] if not found[i]]
            if not waiting[word]:
                del waiting[word]
        if done % _TOLD_EVERY == 0:
            progress(done, 0, "passages")
        if not waiting:
            break
    return found


def in_topk(
    retriever: Retriever, questions: Sequence[Question], topk: int, progress: Progress = silent
) -> list[bool | None]:
    """For each question, whether one of its own ``topk`` passages holds an answer; ``None`` for yes/no questions.

    Raises:
        RetrievalError: from the retriever.
    """
    found: list[bool | None] = []
    for at in range(0, len(questions), _AT_ONCE):
        batch = questions[at : at + _AT_ONCE]
        hits = retriever.search([question.text for question in batch], topk)
        found += [
            holds((f"{hit.title} {hit.text}" for hit in passages), patterns(question))
            for question, passages in zip(batch, hits, strict=True)
        ]
        progress(len(found), len(questions), "questions")
    return found


def read(path: Path) -> Iterator[Ceiling]:
    """The rows of a ceiling's file; see ``runs.read_records``."""
    return read_records(path, Ceiling, f"remove {path.parent} and evaluate again")
