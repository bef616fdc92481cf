"""Users' own questions: JSON lines, CSV, Parquet or spreadsheets, with columns of any name."""

import ast
import contextlib
import datetime
import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from search_e1.data import sources
from search_e1.data.formats import layouts, sheets
from search_e1.data.formats.arrays import array_items, is_array
from search_e1.data.lines import checksum, parse, read_lines
from search_e1.data.questions import ANSWERS, Loaded, to_question, whole_number
from search_e1.data.tables import SUFFIXES as TABLES
from search_e1.data.tables import Cell, table_rows
from search_e1.errors import ConfigError, DataError
from search_e1.runs import sha256_text
from search_e1.types import Question

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst")
PARQUET = (".parquet",)
SUFFIXES = (*JSON_LINES, *TABLES, *PARQUET, sheets.SUFFIX)

_FIELDS = ("question", "answers", "id", "hops", "metadata")
_LIKE_ANSWERS = re.compile(r"(?:^|[\W_])(?:answers?|alias|aliases|gold|golden)(?:$|[\W_])", re.IGNORECASE)
_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_ITEM = rf"{_QUOTED}|-?\d+(?:\.\d+)?|nan|None|True|False"
_SERIES = r"\s*(?:{0})(?:(?:\s*,\s*|\s+)(?:{0}))*\s*,?\s*"
_LIST = re.compile(rf"\[{_SERIES.format(_ITEM)}\]|\({_SERIES.format(_QUOTED)}\)|\{{{_SERIES.format(_QUOTED)}\}}", re.DOTALL)
_ARRAY = re.compile(r"(?:np\.|numpy\.)?array\((\[.*\])(?:,\s*dtype=[^)]*)?\)", re.DOTALL)
_BRACKETED = re.compile(r"""[\[({]\s*['"{\[(].*[\])}]|(?:np\.|numpy\.)?array\(.*\)""", re.DOTALL)
"""Text that only a program writes: a list, an object, an array."""
_UNANSWERABLE = "{} questions are unanswerable ({}); a run on them needs rollout.rewards.not_found"
_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_MISSING = frozenset(("none", "null", "nil", "nan", "nat", "<na>", "n/a", "#n/a"))
"""Words, in lower case, that programs write for a missing value."""
_WHOLE_FLOAT = re.compile(r"\A\s*(-?\d+)\.0\s*\Z")


@dataclass(frozen=True, slots=True)
class Columns:
    """The column of each field. A dotted path leads into nested objects, and into each item of a list."""

    question: str = "question"
    answers: tuple[str, ...] = ()
    """Columns whose answers are all correct. Empty: all of golden_answers, answers, answer, answer_aliases, possible_answers
    that the file has."""
    id: str | None = None
    """``None``: ``id`` if the file has it. Empty: no column. Missing ids are generated."""
    hops: str | None = None
    metadata: str | None = None
    """``None`` (both): the column of that name, if the file has it."""
    more: tuple[tuple[str, str], ...] = ()
    """Key of ``metadata`` -> column."""
    separator: str | None = None
    """Separator of several answers in one text."""

    @classmethod
    def parse(cls, mappings: Sequence[str], separator: str | None = None) -> "Columns":
        """Build from ``["question=Frage", "answers=Antwort", "id=", "metadata.topic=Thema"]``; ``id=`` generates ids.

        ``answers`` may be repeated.

        Raises:
            ConfigError: a mapping is malformed or repeated, or names an unknown field; or the separator is empty.
        """
        chosen: dict[str, Any] = {}
        answers: list[str] = []
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
            if key in where or column in answers:
                raise ConfigError(f"--column {mapping}: {field!r} is given twice; give one column for it")
            if field == "answers":
                answers.append(column)
            else:
                where[key] = column
        if separator == "":
            raise ConfigError("--separator is empty; give what separates the answers, e.g. --separator '|'")
        return cls(**chosen, answers=tuple(answers), more=tuple(more.items()), separator=separator)


def load(path: Path, name: str, columns: Columns, *, keep_unanswerable: bool = False) -> Loaded:
    """The questions of one file; ``name`` is their benchmark and the prefix of generated ids.

    A generated id is a hash of question and answers, independent of row order. Unless ``columns`` are given, a file in the
    layout of a published data set is read as such. Questions that it marks unanswerable are left out, and rows without an
    answer are refused; with ``keep_unanswerable`` both become unanswerable questions.

    Raises:
        DataError: the file cannot be read, lacks a column, or a row is not a question; names file and line (Parquet: row).
    """
    questions: list[tuple[str, Question]] = []
    made: dict[str, int] = {}
    read = _Published(path) if replace(columns, separator=None) == Columns() else None
    notes = _Notes(columns)
    sheet_notes: list[str] = []
    for where, row in _rows(path, columns.question, sheet_notes):
        if read and read.knows(row):
            record = read.record(row, where)
            if record["metadata"].get("unanswerable") and not keep_unanswerable:
                read.left_out.append(where)
                continue
        else:
            record = _record(row, columns, where)
            notes.add(row, where)
        if not record["id"]:
            text = json.dumps([record["question"], record["golden_answers"]], ensure_ascii=False)
            id = f"{name}_{sha256_text(text)[:12]}"
            made[id] = made.get(id, 0) + 1
            record["id"] = id if made[id] == 1 else f"{id}_{made[id]}"
        if not (record["golden_answers"] or keep_unanswerable):
            raise DataError(
                f"{where}: a question without answers; give at least one, or, if the documents hold none, keep it with "
                "--keep-unanswerable"
            )
        questions.append((where, to_question(record, name, where, may_lack_answers=keep_unanswerable)))
    unanswerable = [where for where, question in questions if question.unanswerable]
    marked = [_UNANSWERABLE.format(len(unanswerable), unanswerable[0])] if unanswerable else []
    said = (*(read.lines() if read else ()), *sheet_notes, *notes.lines(), *marked)
    if not questions:
        alone = " but unanswerable ones (--keep-unanswerable)" if read and read.left_out else ""
        raise DataError(f"{path}: no questions in it{alone}; give a file with one question per line")
    sums = checksum(path) if not (read and read.aliases) else sha256_text(checksum(path) + checksum(read.aliases_file))
    return Loaded(questions, str(path), sums, notes=said)


class _Published:
    """Reads a file in the layout of a published data set, recognized by its first row."""

    def __init__(self, path: Path) -> None:
        self.aliases_file = path.with_name(layouts.ALIASES)
        self.aliases: layouts.Aliases = {}
        self.left_out: list[str] = []
        """Locations of unanswerable questions."""
        self._layout: layouts.Layout | None = None
        self._first = True

    def knows(self, row: Mapping[str, Any]) -> bool:
        if self._first:
            self._first, self._layout = False, layouts.layout_of(row)
            if row.get("answer_id") and self.aliases_file.exists():
                self.aliases = layouts.read_aliases(self.aliases_file)
        return self._layout is not None

    def record(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        assert self._layout
        return layouts.read(self._layout, row, self.aliases, where)

    def lines(self) -> Iterable[str]:
        if self.aliases:
            yield f"answers include the aliases in {self.aliases_file}"
        if self.left_out:
            number = f"{len(self.left_out)} unanswerable questions are left out ({self.left_out[0]})"
            yield f"{number}; --keep-unanswerable keeps them"


class _Notes:
    """Collects ambiguities of a file, from the rows read."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self.used: Counter[tuple[str, ...]] = Counter()
        self.unused: dict[str, None] = {}
        self.seen: dict[str, tuple[int, str, str]] = {}

    def add(self, row: Mapping[str, Any], where: str) -> None:
        used = _answer_columns(row, self.columns)
        self.used[used] += 1
        mapped = {column.partition(".")[0] for column in (*used, self.columns.question, *(c for _, c in self.columns.more))}
        self.unused |= {name: None for name in row if _LIKE_ANSWERS.search(name) and name not in mapped}
        held = [row.get(column) for column in used]
        for cell in (cell for one in held for cell in (one if isinstance(one, list) else [one]) if isinstance(cell, str)):
            kinds = {
                "whole": isinstance(cell, Cell) and _WHOLE_FLOAT.match(cell),
                "list": cell[:1] == "[" and _list_in(cell) is cell,
                "missing": cell.strip().lower() in _MISSING,
                "truth": isinstance(cell, Cell) and cell.strip().lower() in ("true", "false"),
            }
            for kind in (kind for kind, holds in kinds.items() if holds and self.columns.separator is None):
                count, first, place = self.seen.get(kind, (0, cell, where))
                self.seen[kind] = count + 1, first, place

    def lines(self) -> Iterable[str]:
        several = max(self.used, key=len, default=())
        if len(several) > 1 and not self.columns.answers:
            yield f"answers are taken from the columns {', '.join(several)}; --column answers=COLUMN selects one"
        if self.unused:
            yield (
                f"not read: {', '.join(self.unused)}; if they hold correct answers, name every column of answers with "
                "--column answers=COLUMN"
            )
        for kind, said in (
            ("whole", "{0} answers are read as whole numbers ({2}: {1!r})"),
            ("list", "{0} answers in brackets are read as they are, not as lists ({2}: {1!r})"),
            ("missing", "{0} answers are words that stand for a missing value ({2}: {1!r}); if these are, remove them"),
            ("truth", "{0} answers are true or false ({2}: {1!r}), which a policy's yes or no does not match"),
        ):
            if kind in self.seen:
                count, first, place = self.seen[kind]
                yield said.format(count, first, place)


def benchmark_name(path: Path) -> str:
    """The default benchmark name of ``path``: the file name up to its first dot."""
    return re.sub(r"[^\w-]+", "-", path.name.partition(".")[0]).strip("-") or "mine"


def _rows(path: Path, question: str, notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Location and content of each row."""
    name = path.name.lower()
    if name.endswith(TABLES):
        yield from table_rows(path)
    elif name.endswith(PARQUET):
        yield from _parquet_rows(path)
    elif name.endswith(sheets.SUFFIX):
        yield from sheets.sheet_rows(path, question, notes)
    elif is_array(path):
        for number, item in array_items(path):
            yield f"{path}:{number}", parse(item, f"{path}:{number}", unique=True)
    elif name.endswith(JSON_LINES):
        for number, row in read_lines(path):
            yield f"{path}:{number}", row
    else:
        raise DataError(f"{path}: unknown kind of file; known: {', '.join(SUFFIXES)}")


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, row in sources.parquet_rows(path):
        # NaN, pandas' missing number, becomes null.
        plain = row if isinstance(row, bytes) else json.dumps(row, default=partial(_of_json, where)).encode()
        yield where, parse(plain, where, nan=None)


def _of_json(where: str, value: Any) -> Any:
    """Converts values that JSON lacks: dates become text, decimals numbers or text, bytes UTF-8 text.

    Raises:
        DataError: any other type, or bytes that are not UTF-8.
    """
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | UUID):
        return str(value)
    if isinstance(value, Decimal):
        return int(value) if value.is_finite() and value == value.to_integral_value() else str(value)
    with contextlib.suppress(UnicodeDecodeError):
        if isinstance(value, bytes):
            return value.decode()
    raise DataError(f"{where}: a value of type {type(value).__name__} ({str(value)[:40]!r}); give strings and numbers")


def _record(row: Mapping[str, Any], columns: Columns, where: str) -> dict[str, Any]:
    """The row as a record with this project's field names."""
    id = row.get("id") if columns.id is None else _dig(row, columns.id, where) if columns.id else None
    if isinstance(id, bool) or not isinstance(id, str | int | float | None) or _text(id) is None:
        raise DataError(
            f"{where}: column {columns.id or 'id'!r} holds {id!r}, not an id; give another with --column id=COLUMN, or "
            "have ids generated with --column id="
        )
    metadata = _dig(row, columns.metadata, where) if columns.metadata else row.get("metadata")
    if isinstance(metadata, str) and metadata.strip():
        try:
            metadata = json.loads(metadata)
        except ValueError as error:
            raise DataError(
                f"{where}: column {columns.metadata or 'metadata'!r} is not JSON ({error}); write an object"
            ) from None
    if metadata and not isinstance(metadata, dict):
        raise DataError(f"{where}: column {columns.metadata or 'metadata'!r} is {type(metadata).__name__}; write a JSON object")
    metadata = {**(metadata or {}), **{key: _dig(row, column, where) for key, column in columns.more}}
    if isinstance(marked := metadata.get("unanswerable"), str):  # tables hold only text
        metadata["unanswerable"] = _TRUTHS.get(marked.strip().lower(), marked) if marked.strip() else None
    if columns.hops or "hops" in row:
        metadata["hops"] = _whole(_dig(row, columns.hops or "hops", where), columns.hops or "hops", where)
    question = _dig(row, columns.question, where)
    if isinstance(question, Cell) and question.strip().lower() in _MISSING:
        raise DataError(f"{where}: column {columns.question!r} holds {question!r}, not a question; remove the row")
    return {
        "id": (_text(id) or "").strip(),
        "question": question.strip() if isinstance(question, str) else question,
        "golden_answers": _answers(row, columns, where),
        "metadata": {key: value for key, value in metadata.items() if value is not None},
    }


def _answer_columns(row: Mapping[str, Any], columns: Columns) -> tuple[str, ...]:
    return columns.answers or tuple(name for name in ANSWERS if name in row) or ANSWERS[:1]


def _answers(row: Mapping[str, Any], columns: Columns, where: str) -> list[str]:
    texts = []
    for column in _answer_columns(row, columns):
        texts += _answers_in(_dig(row, column, where), column, columns.separator, where)
    return texts


def _answers_in(found: Any, column: str, separator: str | None, where: str) -> list[str]:
    """The answers in one value; none if it is empty."""
    if isinstance(found, str) and separator is None:
        found = _list_in(found)
        if isinstance(found, str) and _BRACKETED.fullmatch(found):
            raise DataError(f'{where}: column {column!r} holds {found!r}, not a list of strings; write ["...", "..."]')
    items = [_text(item) for item in found] if isinstance(found, list) else [_text(found)]
    if None in items:
        if isinstance(found, Cell) and found.strip().lower() in _MISSING:
            raise DataError(f"{where}: column {column!r} holds {found!r}, a missing value; write the answer, or remove the row")
        nested = any(isinstance(item, dict) for item in (found if isinstance(found, list) else [found]))
        remedy = f"give a path into it, e.g. --column answers={column}.text" if nested else "write the answers as strings"
        raise DataError(f"{where}: column {column!r} holds {found!r}, not strings; {remedy}")
    texts = [text.strip() for text in items if text is not None]
    if len(texts) > 1 and not all(texts):
        raise DataError(f"{where}: column {column!r} holds an empty answer ({found!r}); remove it")
    parts = (part for text in texts for part in (text.split(separator) if separator else [text]))
    return [part.strip() for part in parts if part.strip()]


def _list_in(cell: str) -> Any:
    """The list in a cell, in JSON, Python or numpy notation; any other text unchanged (``[sic]`` is an answer)."""
    text = cell.strip()
    text = array[1] if (array := _ARRAY.fullmatch(text)) else text
    if text.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
    with contextlib.suppress(ValueError, SyntaxError):
        if _LIST.fullmatch(text):
            return [None if item in ("nan", "None") else ast.literal_eval(item) for item in re.findall(_ITEM, text)]
    return cell


def _text(item: Any) -> str | None:
    """An answer as text: whole floats as integers, true as yes, null as empty; ``None`` for any other type."""
    if item is None:
        return ""
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, float):
        return (str(int(item)) if item.is_integer() else str(item)) if math.isfinite(item) else None
    if isinstance(item, Cell):
        return None if item.strip() in ("nan", "NaN") else _WHOLE_FLOAT.sub(r"\1", item)
    return str(item) if isinstance(item, str | int) else None


def _dig(value: Any, path: str, where: str) -> Any:
    """The value at ``path``: the column with that name, else resolved key by key, and item by item in lists."""
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
    number = whole_number(value)
    if number is None:
        raise DataError(f"{where}: column {column!r} holds {value!r}; hops must be a whole number, at least 1")
    return number
