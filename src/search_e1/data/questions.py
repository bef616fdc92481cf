"""Questions from JSON lines."""

import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from search_e1.data.answers import normalize_answer
from search_e1.data.formats import sheets
from search_e1.data.lines import read_lines
from search_e1.data.tables import SUFFIXES as TABLES
from search_e1.errors import DataError
from search_e1.runs import ranks
from search_e1.types import Question

logger = logging.getLogger(__name__)
_HOLDS = (
    'each line holds {"id", "question", "golden_answers"} and optionally "metadata"; `search-e1 data prepare` converts '
    "other files"
)
ANSWERS = ("golden_answers", "answers", "answer", "answer_aliases", "possible_answers")
"""Columns whose answers ``data prepare`` joins; a run reads the first alone."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The questions of one file, each with its location (``file:line``)."""

    questions: list[tuple[str, Question]]
    source: str
    """The file, or its path on the Hub."""
    checksum: str
    """sha256 of a file, or commit of a Hub repository."""
    expected: int | None = None
    """Number of questions of this split in the collection; ``None`` for other files."""
    notes: tuple[str, ...] = ()
    """How ambiguities in the file were resolved, one line each."""


def load_questions(path: str | Path, benchmark: str = "", not_found: Sequence[str] | None = None) -> list[Question]:
    """The questions of one file, in order.

    Each line (plain, ``.gz`` or ``.zst``) holds ``id``, ``question``, ``golden_answers`` (a list of alternatives; empty if the
    documents hold no answer) and optionally ``metadata``, whose ``hops`` becomes ``Question.hops``. Other keys are ignored; an
    id may be a number. ``benchmark`` names the questions in evaluation; for ``not_found`` see ``settle``.

    Raises:
        DataError: the file cannot be read or is empty, a line is not a question, a question has an empty answer, or an id is
            repeated; see also ``settle``. Names file and line.
    """
    return load_many([Path(path)], benchmark, not_found)


def load_many(paths: Iterable[Path], benchmark: str = "", not_found: Sequence[str] | None = None) -> list[Question]:
    """The questions of several files, concatenated; ids must be unique across all of them.

    Raises:
        DataError: as ``load_questions``.
    """
    paths = list(paths)
    found = ((where, settle(q, not_found, where)) for path in paths for where, q in read_questions(path, benchmark))
    return _unique(found, ", ".join(map(str, paths)))


def settle(question: Question, not_found: Sequence[str] | None, where: str) -> Question:
    """``question``, with ``not_found`` (``rollout.rewards.not_found``) as its correct answers if it is unanswerable.

    Unchanged if ``not_found`` is ``None``, or if it is empty and the question has answers.

    Raises:
        DataError: the question has no answers and ``not_found`` is empty; the message begins with ``where``.
    """
    if not_found is None or not question.unanswerable:
        return question
    if not_found:
        return question.model_copy(update={"answers": tuple(not_found)})
    if not question.answers:
        raise DataError(
            f"{where}: a question without answers (golden_answers = []); set rollout.rewards.not_found to what is correct when "
            "the documents hold no answer, give one, or remove the question"
        )
    return question


def subset(questions: Sequence[Question], n: int, seed: int) -> list[Question]:
    """``n`` questions drawn without replacement, in their original order; determined by ``seed``.

    Raises:
        DataError: there are fewer than ``n`` questions.
    """
    if n > len(questions):
        raise DataError(f"{n} questions requested, but there are only {len(questions)}; ask for fewer")
    chosen = random.Random(seed).sample(range(len(questions)), n)
    return [questions[i] for i in sorted(chosen)]


def read_questions(path: Path, benchmark: str = "") -> Iterator[tuple[str, Question]]:
    """Location (``file:line``) and content of each question; repeated ids are not checked.

    Raises:
        DataError: the file cannot be read or is empty, or a line is not a question.
    """
    if path.name.lower().endswith((*TABLES, sheets.SUFFIX, ".parquet")):
        raise DataError(f"{path}: not JSON lines; `search-e1 data prepare --train {path} --out DIR` converts it")
    number, unread = 0, dict[str, None]()
    for number, record in read_lines(path):
        where = f"{path}:{number}"
        question = to_question(record, benchmark, where, may_lack_answers=True)
        yield where, question
        for name in ANSWERS[1:]:
            held = record.get(name)
            others = held if isinstance(held, list) else [held]
            if any(isinstance(text, str) and text.strip() and text not in question.answers for text in others):
                unread[name] = None
    if not number:
        raise DataError(f"{path}: no questions in it; {_HOLDS}")
    if unread and ranks.is_first():
        logger.warning(
            "%s: not read: %s; only golden_answers counts (`search-e1 data prepare` joins several columns)",
            path, ", ".join(unread),
        )  # fmt: skip


def _unique(items: Iterable[tuple[str, Question]], files: str) -> list[Question]:
    places: dict[str, str] = {}
    questions = []
    for where, question in items:
        if question.id in places:
            raise DataError(f"{where}: id {question.id!r} was used at {places[question.id]}; give every question its own")
        places[question.id] = where
        questions.append(question)
    dead = [(q.id, q.answers) for q in questions if q.answers and not any(map(normalize_answer, q.answers))]
    if dead and ranks.is_first():
        logger.warning(
            "%s: %d questions have only answers of punctuation and articles (%s: %s), which no answer matches",
            files, len(dead), dead[0][0], ", ".join(map(repr, dead[0][1])),
        )  # fmt: skip
    if not questions:
        raise DataError(f"no question files ({files or 'an empty list'}); give at least one")
    return questions


def whole_number(value: Any) -> int | None:
    """``value`` as a positive integer, also from text (``"2"``; ``"2.0"``, as tables write it); ``None`` if it is not one."""
    if isinstance(value, str):
        said = re.fullmatch(r"\s*(\d{1,18})(?:\.0+)?\s*", value)
        value = int(said[1]) if said else None
    whole = type(value) in (int, float) and value >= 1 and value % 1 == 0
    return int(value) if whole else None


def to_record(question: Question) -> dict[str, Any]:
    """The record of ``question`` in a question file; ``to_question`` is the inverse."""
    metadata = question.metadata if question.hops is None else {"hops": question.hops, **question.metadata}
    record = {"id": question.id, "question": question.text, "golden_answers": list(question.answers)}
    return {**record, "metadata": metadata} if metadata else record


def to_question(record: Mapping[str, Any], benchmark: str, where: str, *, may_lack_answers: bool = False) -> Question:
    """The question in a record with ``id``, ``question``, ``golden_answers`` and optionally ``metadata``.

    ``may_lack_answers``: an empty list of answers makes the question unanswerable instead of being refused.

    Raises:
        DataError: the record is not a question; the message begins with ``where``.
    """
    for field in ("id", "question", "golden_answers"):
        if field not in record:
            raise DataError(f"{where}: field {field!r} is missing; {_HOLDS}")
    answers, metadata = record["golden_answers"], record.get("metadata") or {}
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise DataError(
            f'{where}: golden_answers = {answers!r} is not a list of strings; write ["..."], as `search-e1 data prepare` does'
        )
    if not any(map(str.strip, answers)) and (answers or not may_lack_answers):
        raise DataError(f"{where}: a question without answers (golden_answers = {answers!r}); give at least one")
    if not all(map(str.strip, answers)):
        raise DataError(f"{where}: an empty answer (golden_answers = {answers!r}); remove it")
    if not isinstance(metadata, dict):
        raise DataError(f"{where}: metadata is {type(metadata).__name__}, not an object; write {{...}} or leave it out")
    if not isinstance(marked := metadata.get("unanswerable"), bool | None):
        raise DataError(f"{where}: metadata.unanswerable = {marked!r}; write true or false")
    if not answers:
        if marked is False:
            raise DataError(f"{where}: metadata.unanswerable = false, and golden_answers = []; change one of them")
        metadata = {**metadata, "unanswerable": True}
    id, hops, text = record["id"], metadata.get("hops"), record["question"]
    if hops is not None and not whole_number(hops):
        raise DataError(f"{where}: metadata.hops = {hops!r}: hops must be a whole number, at least 1")
    if isinstance(text, str) and not text.strip():
        raise DataError(f"{where}: question = {text!r}: an empty question; remove it")
    try:
        return Question(
            id=str(id) if type(id) is int else id,
            text=text,
            answers=tuple(answers),
            benchmark=benchmark,
            hops=whole_number(hops),
            metadata=metadata,
        )
    except ValidationError as error:
        problem = error.errors()[0]
        field = {"text": "question"}.get(str(problem["loc"][0]), str(problem["loc"][0]))
        raise DataError(f"{where}: {field} = {problem['input']!r}: {problem['msg']}") from None
