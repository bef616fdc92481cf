"""The review table: one row per question for a spreadsheet; a reviewer's marks and edits are applied to the split files."""

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_e1 import runs
from search_e1.data.answers import cover_match
from search_e1.data.lines import checksum, write_lines
from search_e1.data.questions import load_questions, to_record
from search_e1.data.tables import table_rows
from search_e1.errors import DataError
from search_e1.questions.draft import SPLITS, Draft, Split, document_of
from search_e1.runs import locks
from search_e1.types import Question

FILE = "review.csv"
STAGE = "reviewed questions"
COLUMNS = ("keep?", "question", "answers", "passage", "file", "split", "hops", "made_by", "checks", "id")
_NEEDED = ("keep?", "question", "answers", "passage", "id")
_YES, _NO = frozenset({"yes", "y", "1", "true", "x", "ok", "keep"}), frozenset({"no", "n", "0", "false", "drop"})
_SEPARATOR = " | "
_CELL = 30_000  # characters; spreadsheets allow 32,767
_FORMULA = re.compile(r"^[=+\-@\t\r]")
_ESCAPED = re.compile(r"^'(?=[=+\-@\t\r])")


@dataclass(slots=True)
class Reviewed:
    """The reviewed questions and counts of decisions."""

    questions: dict[Split, list[Question]]
    counts: Counter[str] = field(default_factory=Counter)
    """`accepted`, `edited`, `dropped`."""
    notes: list[str] = field(default_factory=list)


def write(path: Path, questions: Mapping[Split, Sequence[Draft]], checks: Sequence[str]) -> None:
    """Write one row per question, in UTF-8 with a byte-order mark for spreadsheets. Formulas are escaped."""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for split, drafts in questions.items():
            for draft in drafts:
                passed = "; ".join([*([f"rule: {draft.rule}"] if draft.rule else []), *checks])
                passages = "\n\n".join(f"{p.title}\n{p.text}" if p.title else p.text for p in draft.passages)
                files = _SEPARATOR.join(dict.fromkeys(map(document_of, draft.passages)))
                row = ("yes", draft.text, _SEPARATOR.join(draft.answers), passages, files, split)
                table.writerow([_cell(c) for c in (*row, str(draft.hops), draft.made_by, passed, draft.id)])


def apply(table: Path, out: Path) -> Reviewed:
    """Apply the review in ``table`` to the split files beside it, and write them to the new directory ``out``.

    A question is dropped if its ``keep?`` says no or its row was deleted; edited questions and answers replace the originals.

    Raises:
        DataError: the table or a file beside it cannot be read, or a row is invalid; names its line.
        RunError: ``out`` exists, another process makes it, or it cannot be written.
    """
    files: dict[Split, Path] = {split: file for split in SPLITS if (file := table.parent / f"{split}.jsonl").exists()}
    if not files:
        raise DataError(f"{table}: no train.jsonl or eval.jsonl beside it; keep it in its original directory")
    rows = _rows(table)
    reviewed, known = Reviewed({}), set()
    for split, file in files.items():
        before = load_questions(file) if file.stat().st_size else []
        known |= {question.id for question in before}
        after = (_reviewed(question, rows.get(question.id), reviewed) for question in before)
        reviewed.questions[split] = [question for question in after if question]
    if strange := next(((id, where) for id, (where, _) in rows.items() if id not in known), None):
        raise DataError(f"{strange[1]}: no question has the id {strange[0]!r}; leave the column id as it was")
    if not any(reviewed.questions.values()):
        raise DataError(f"{table}: no question is kept; write yes in the column keep? of the good ones")
    inputs = {str(path): checksum(path) for path in (table, *files.values())}
    with locks.making(out):
        runs.artifact(
            out, stage=STAGE, settings={"review": str(table)}, inputs=inputs, seed=0,
            make=lambda directory: _write(reviewed, directory),
        )  # fmt: skip
    return reviewed


def _rows(table: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """Question id -> location and cells of its row."""
    rows: dict[str, tuple[str, dict[str, str]]] = {}
    for where, row in table_rows(table):
        if missing := next((name for name in _NEEDED if name not in row), None):
            raise DataError(f"{table}:1: column {missing!r} is missing; keep the columns of the table as they were")
        cells = {name: _ESCAPED.sub("", str(cell)).strip() for name, cell in row.items()}
        if cells["id"] in rows:
            raise DataError(f"{where}: id {cells['id']!r} appears twice; remove one of the rows")
        if cells["keep?"].lower() not in _YES | _NO | {""}:
            raise DataError(f"{where}: keep? = {cells['keep?']!r}; write yes or no")
        rows[cells["id"]] = where, cells
    return rows


def _reviewed(question: Question, found: tuple[str, dict[str, str]] | None, reviewed: Reviewed) -> Question | None:
    if found is None or found[1]["keep?"].lower() in _NO:
        reviewed.counts["dropped"] += 1
        return None
    where, cells = found
    text = cells["question"]
    answers = tuple(answer.strip() for answer in cells["answers"].split(_SEPARATOR.strip()) if answer.strip())
    if not text or not answers:
        raise DataError(f"{where}: an empty {'answer' if text else 'question'}; write one, or no in keep?")
    edited = (text, answers) != (question.text.strip(), question.answers)
    reviewed.counts["edited" if edited else "accepted"] += 1
    if edited and not any(cover_match(cells["passage"], [answer]) for answer in answers):
        reviewed.notes.append(f"{where}: the answer {answers[0]!r} is not in the passage")
    metadata = {**question.metadata, "review": "edited" if edited else "accepted"}
    return question.model_copy(update={"text": text, "answers": answers, "metadata": metadata})


def _write(reviewed: Reviewed, directory: Path) -> dict[str, Any]:
    for split, questions in reviewed.questions.items():
        write_lines(directory / f"{split}.jsonl", map(to_record, questions))
    kept = {split: len(questions) for split, questions in reviewed.questions.items()}
    return {"questions": kept, **reviewed.counts, "notes": reviewed.notes}


def _cell(text: str) -> str:
    return ("'" if _FORMULA.match(text) else "") + text[:_CELL]
