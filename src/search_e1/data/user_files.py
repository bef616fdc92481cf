"""Users' own questions: JSON lines, CSV or Parquet, with columns of any name."""

import ast
import contextlib
import csv
import difflib
import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from search_e1.data import sources
from search_e1.data.lines import checksum, parse, read_lines
from search_e1.data.questions import Loaded, to_question
from search_e1.errors import ConfigError, DataError
from search_e1.types import Question

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz")
TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
PARQUET = (".parquet",)
SUFFIXES = (*JSON_LINES, *TABLES, *PARQUET)

_FIELDS = ("question", "answers", "id", "hops", "metadata")
_ANSWERS = ("golden_answers", "answers", "answer")
_ITEM = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|nan|None"""
_LIST = re.compile(rf"\[\s*(?:{_ITEM})(?:(?:\s*,\s*|\s+)(?:{_ITEM}))*\s*,?\s*\]", re.DOTALL)
_WHOLE_FLOAT = re.compile(r"\A\s*(-?\d+)\.0\s*\Z")


@dataclass(frozen=True, slots=True)
class Columns:
    """The column of each field. A dotted path leads into nested values, and into each item of a list."""

    question: str = "question"
    answers: str | None = None
    """``None``: whichever of golden_answers, answers, answer the file has."""
    id: str | None = None
    """``None``: ``id`` if the file has it. Empty: none. Missing ids are generated."""
    hops: str | None = None
    metadata: str | None = None
    """``None``, for both: the column of that name, if the file has it."""
    more: tuple[tuple[str, str], ...] = ()
    """Key of ``metadata`` -> column."""
    separator: str | None = None
    """Separates several answers in one text."""

    @classmethod
    def parse(cls, mappings: Sequence[str], separator: str | None = None) -> "Columns":
        """From ``["question=Frage", "answers=Antwort", "id=", "metadata.topic=Thema"]``; ``id=`` generates ids.

        Raises:
            ConfigError: a mapping has another form, or occurs twice.
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
    """The questions of one file; ``name`` is their benchmark and the prefix of generated ids.

    A generated id is a hash of question and answers, so that it does not depend on the order of the rows.

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
    """The default name of the questions in ``path``: the file's name up to its first dot."""
    return re.sub(r"[^\w-]+", "-", path.name.partition(".")[0]).strip("-") or "mine"


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and content of each row."""
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
                where, line = f"{path}:{line + 1}", reader.line_num  # a row may span lines; its first one is reported
                if not any(row):
                    continue
                if len(row) != len(names):
                    raise DataError(f"{where}: {len(row)} cells under a header of {len(names)}; quote cells that hold commas")
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
    for where, row in sources.parquet_rows(path):
        # Dates and decimals become text; NaN, pandas' missing number, becomes null.
        plain = row if isinstance(row, bytes) else json.dumps(row, default=str).encode()
        yield where, parse(plain, where, nan=None)


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
        raise DataError(f"{where}: column {columns.metadata or 'metadata'!r} is {type(metadata).__name__}; write a JSON object")
    metadata = {**(metadata or {}), **{key: _dig(row, column, where) for key, column in columns.more}}
    if columns.hops or "hops" in row:
        metadata["hops"] = _whole(_dig(row, columns.hops or "hops", where), columns.hops or "hops", where)
    question = _dig(row, columns.question, where)
    return {
        "id": _text(id) or "",
        "question": question.strip() if isinstance(question, str) else question,
        "golden_answers": _answers(row, columns, where),
        "metadata": {key: value for key, value in metadata.items() if value is not None},
    }


def _answers(row: Mapping[str, Any], columns: Columns, where: str) -> list[str]:
    column = columns.answers or next((name for name in _ANSWERS if name in row), _ANSWERS[0])
    found = _dig(row, column, where)
    if isinstance(found, str) and columns.separator is None:
        found = _list_in(found)
    items = [_text(item) for item in found] if isinstance(found, list) else [_text(found)]
    if None in items:
        raise DataError(
            f"{where}: column {column!r} holds {found!r}, not texts; give a path into it, e.g. --column answers={column}.text"
        )
    texts = [text.strip() for text in items if text is not None]
    if len(texts) > 1 and not all(texts):
        raise DataError(f"{where}: column {column!r} holds an empty answer ({found!r}); remove it")
    parts = (part for text in texts for part in (text.split(columns.separator) if columns.separator else [text]))
    return [part.strip() for part in parts if part.strip()]


def _list_in(cell: str) -> Any:
    """The list in a cell, written as JSON, Python or numpy do; any other text as it is (``[sic]`` is an answer)."""
    cell = cell.strip()
    if cell.startswith("["):
        with contextlib.suppress(ValueError):
            return json.loads(cell)
        with contextlib.suppress(ValueError, SyntaxError):
            if _LIST.fullmatch(cell):
                return [None if item in ("nan", "None") else ast.literal_eval(item) for item in re.findall(_ITEM, cell)]
    return cell


def _text(item: Any) -> str | None:
    """An answer as text, whole floats as integers; empty for null, ``None`` for what is neither a text nor a number."""
    if isinstance(item, bool) or not isinstance(item, str | int | float | None) or item in (math.inf, -math.inf):
        return None
    if isinstance(item, float) and math.isnan(item):
        return None
    return "" if item is None else _WHOLE_FLOAT.sub(r"\1", str(item))


def _dig(value: Any, path: str, where: str) -> Any:
    """The value at ``path``: the column of that name, else key by key; through a list, item by item."""
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
