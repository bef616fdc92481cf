"""Users' own questions: JSON lines, CSV or Parquet, with columns of any name."""

import contextlib
import csv
import difflib
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from search_e1.data.lines import checksum, read_lines
from search_e1.data.questions import Loaded, to_question
from search_e1.errors import ConfigError, DataError
from search_e1.types import Question

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz")
TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
PARQUET = (".parquet",)
SUFFIXES = (*JSON_LINES, *TABLES, *PARQUET)

_FIELDS = ("question", "answers", "id", "hops", "metadata")
_ANSWERS = ("golden_answers", "answers", "answer")


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column holds what. A path with dots goes into nested values, and into each item of a list."""

    question: str = "question"
    answers: str | None = None
    """``None``: whichever of golden_answers, answers, answer the file has."""
    id: str | None = None
    """``None``: ``id`` if the file has it. Empty: none. Ids are made where the file gives none."""
    hops: str | None = None
    metadata: str | None = None
    """Of these two, ``None``: the column of that name, if the file has it."""
    more: tuple[tuple[str, str], ...] = ()
    """Key of ``metadata`` -> column."""
    separator: str | None = None
    """What stands between the answers in one text."""

    @classmethod
    def parse(cls, mappings: Sequence[str], separator: str | None = None) -> "Columns":
        """From ``["question=Frage", "answers=Antwort", "id=", "metadata.topic=Thema"]``; ``id=`` has ids made.

        Raises:
            ConfigError: a mapping is not of that form, or comes twice.
        """
        chosen: dict[str, Any] = {}
        more: dict[str, str] = {}
        for mapping in mappings:
            field, equals, column = mapping.partition("=")
            where = more if field.startswith("metadata.") else chosen
            key = field.removeprefix("metadata.") if where is more else field
            if not equals or not (column or field == "id"):
                raise ConfigError(f"--column {mapping}: write FIELD=COLUMN, e.g. --column question=Frage")
            if where is chosen and field not in _FIELDS:
                close = difflib.get_close_matches(field, _FIELDS, n=1, cutoff=0.4)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise ConfigError(
                    f"--column {mapping}: unknown field {field!r}; {hint}(known: {', '.join(_FIELDS)}, metadata.KEY)"
                )
            if key in where:
                raise ConfigError(f"--column {mapping}: {field!r} is given twice; give one column for it")
            where[key] = column
        if separator == "":
            raise ConfigError("--separator is empty; give what stands between the answers, e.g. --separator '|'")
        return cls(**chosen, more=tuple(more.items()), separator=separator)


def load(path: Path, name: str, columns: Columns) -> Loaded:
    """The questions of one file; ``name`` is their benchmark and begins the ids that are made.

    A made id is a hash of question and answers, so that it does not depend on where the row stands.

    Raises:
        DataError: the file cannot be read, lacks a column, or a row is no question; names file and line (of Parquet, row).
    """
    questions: list[tuple[str, Question]] = []
    made: dict[str, int] = {}
    for where, row in _rows(path):
        record = _record(row, columns, where)
        if not record["id"]:
            text = json.dumps([record["question"], record["golden_answers"]], ensure_ascii=False)
            id = f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
            made[id] = made.get(id, 0) + 1
            record["id"] = id if made[id] == 1 else f"{id}_{made[id]}"
        questions.append((where, to_question(record, name, where)))
    if not questions:
        raise DataError(f"{path}: no questions in it; give a file with a question a line")
    return Loaded(questions, str(path), checksum(path))


def benchmark_name(path: Path) -> str:
    """What the questions of ``path`` go by if nothing else is said: the file's name up to its first dot."""
    return re.sub(r"[^\w-]+", "-", path.name.partition(".")[0]).strip("-") or "mine"


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row stands, and the row."""
    name = path.name.lower()
    if name.endswith(TABLES):
        yield from _table_rows(path)
    elif name.endswith(PARQUET):
        yield from _parquet_rows(path)
    elif name.endswith(JSON_LINES):
        for number, row in read_lines(path):
            yield f"{path}:{number}", row
    else:
        raise DataError(f"{path}: what kind of file is it? known: {', '.join(SUFFIXES)}")


def _table_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV file with a header; the delimiter is the one of ``, ; | tab`` that is most frequent in the header."""
    line = 0
    try:
        with _open_text(path) as file:
            header = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t|", key=header.count), strict=True)
            names = [name.strip() for name in next(reader, [])]
            line = reader.line_num
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"{path}:1: column {twice!r} is there twice; give each its own name")
            for row in reader:
                where, line = f"{path}:{line + 1}", reader.line_num  # a row may span lines: it stands where it begins
                if not any(row):
                    continue
                if len(row) != len(names):
                    raise DataError(
                        f"{where}: {len(row)} cells under a header of {len(names)}; quote cells that hold commas"
                    )
                yield where, dict(zip(names, row, strict=True))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        problem = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path}{f':{line + 1}' if line else ''}: cannot be read ({problem}); give a CSV file in UTF-8, plain or .gz"
        ) from error
    except csv.Error as error:
        raise DataError(f"{path}:{line + 1}: not CSV ({error}); close every quote that is opened") from error


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    # Dates and decimals become text, and NaN, pandas' missing number, becomes none, as JSON has neither.
                    plain = json.loads(json.dumps(row, default=str), parse_constant=lambda _: None)
                    yield f"{path}:{number}", plain
    except (OSError, pyarrow.ArrowException) as error:
        problem = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read ({problem}); give the path of a Parquet file") from error


def _record(row: Mapping[str, Any], columns: Columns, where: str) -> dict[str, Any]:
    """The row under the product's own names."""
    id = row.get("id") if columns.id is None else _dig(row, columns.id, where) if columns.id else None
    metadata = _dig(row, columns.metadata, where) if columns.metadata else row.get("metadata")
    if isinstance(metadata, str) and metadata.strip():
        try:
            metadata = json.loads(metadata)
        except ValueError as error:
            raise DataError(
                f"{where}: column {columns.metadata or 'metadata'!r} is no JSON ({error}); write an object"
            ) from error
    if metadata and not isinstance(metadata, dict):
        raise DataError(
            f"{where}: column {columns.metadata or 'metadata'!r} is {type(metadata).__name__}; write a JSON object"
        )
    metadata = {**(metadata or {}), **{key: _dig(row, column, where) for key, column in columns.more}}
    if columns.hops or "hops" in row:
        metadata["hops"] = _whole(_dig(row, columns.hops or "hops", where), columns.hops or "hops", where)
    question = _dig(row, columns.question, where)
    return {
        "id": str(id) if id is not None else "",
        "question": question.strip() if isinstance(question, str) else question,
        "golden_answers": _answers(row, columns, where),
        "metadata": {key: value for key, value in metadata.items() if value is not None},
    }


def _answers(row: Mapping[str, Any], columns: Columns, where: str) -> list[str]:
    column = columns.answers or next((name for name in _ANSWERS if name in row), _ANSWERS[0])
    found = _dig(row, column, where)
    if isinstance(found, str) and columns.separator is None and found.lstrip().startswith("["):
        with contextlib.suppress(ValueError):  # a list in a cell, unless it is an answer that begins with a bracket
            found = json.loads(found)
    answers: list[str] = []
    for item in found if isinstance(found, list) else [found]:
        if isinstance(item, bool) or not isinstance(item, str | int | float | None):
            raise DataError(
                f"{where}: column {column!r} holds {item!r}, not a text; give a path into it, "
                f"e.g. --column answers={column}.text"
            )
        text = "" if item is None else str(item)
        answers += text.split(columns.separator) if columns.separator else [text]
    return [answer.strip() for answer in answers if answer.strip()]


def _dig(value: Any, path: str, where: str) -> Any:
    """What ``path`` leads to: a column of that very name, else key by key; through a list, item by item."""
    if isinstance(value, Mapping) and path in value:
        return value[path]
    if isinstance(value, list):
        found = [_dig(item, path, where) for item in value]
        return [leaf for item in found for leaf in (item if isinstance(item, list) else [item])]
    head, _, rest = path.partition(".")
    if isinstance(value, Mapping) and rest and head in value:
        return _dig(value[head], rest, where)
    names = list(value) if isinstance(value, Mapping) else []
    close = difflib.get_close_matches(path, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise DataError(
        f"{where}: no column {path!r}; {hint}there are {', '.join(map(repr, names)) or 'none'} (--column FIELD=COLUMN)"
    )


def _whole(value: Any, column: str, where: str) -> int | None:
    if value is None or value == "":
        return None
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if isinstance(value, bool) or number < 1 or (isinstance(value, float) and value != number):
        raise DataError(f"{where}: column {column!r} holds {value!r}; hops are a whole number from 1")
    return number
