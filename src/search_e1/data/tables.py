"""Rows of CSV and TSV files, plain, ``.gz`` or ``.zst``."""

import csv
import io
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from search_e1.data.lines import BadRecordError, open_binary, raw_lines
from search_e1.errors import DataError

_TSV = (".tsv", ".tsv.gz", ".tsv.zst")
SUFFIXES = (".csv", ".csv.gz", ".csv.zst", *_TSV)
_MOST_CHARACTERS = 2**24  # per line
_QUOTED_CELL = re.compile(r'"((?:[^"]|"")*)"', re.DOTALL)
_NUMBERED_TEXT = re.compile(r"\ufeff?\d+\t[^\t]*\r?\n?")
"""First line of a file like MS MARCO's ``collection.tsv``: a number and a text instead of column names."""


class Cell(str):
    """Text of a table's cell, which may stand for a number or a list."""


def table_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV file with a header; the delimiter is the most frequent of ``, ; | tab`` in the header.

    Raises:
        DataError: the file cannot be read, is not a table, or a row has more or fewer cells than the header.
    """
    for where, row in _rows(path, _MOST_CHARACTERS, Cell):
        if isinstance(row, BadRecordError):
            raise row
        yield where, row


def corpus_rows(
    path: Path, most: int, choose: Callable[[list[str], str], object]
) -> Iterator[tuple[str, dict[str, Any] | BadRecordError]]:
    """Rows of a table of passages, streamed; an invalid row is yielded as its error.

    ``choose`` is called with the column names and their location, and raises if a corpus cannot have them. A TSV file without a
    header whose lines are a number, a tab and a text has the columns ``id`` and ``text``, without quoting. Lines and cells are
    limited to ``most`` characters.

    Raises:
        DataError: the file cannot be read, or is not a table.
    """
    csv.field_size_limit(max(most, csv.field_size_limit()))
    if path.name.lower().endswith(_TSV):
        number, first = next(raw_lines(path, most), (0, b""))
        if number == 1 and _NUMBERED_TEXT.fullmatch(first.decode(errors="replace")):
            for number, line in raw_lines(path, most):
                yield f"{path}:{number}", _numbered(line, f"{path}:{number}")
            return
    yield from _rows(path, most, str, choose)


def _numbered(line: bytes, where: str) -> dict[str, Any] | BadRecordError:
    try:
        id, tab, text = line.decode("utf-8-sig").rstrip("\r\n").partition("\t")
    except UnicodeDecodeError as error:
        return BadRecordError("not UTF-8", f"{where}: not UTF-8 ({error}); write the file in UTF-8")
    if not tab:
        return BadRecordError("without a tab", f"{where}: no tab in it; each line of this file is a number, a tab and a text")
    return {"id": id, "text": text}


def _rows(
    path: Path, most: int, cell: type[str], choose: Callable[[list[str], str], object] = lambda names, where: None
) -> Iterator[tuple[str, dict[str, Any] | BadRecordError]]:
    line = 0
    try:
        with _open_text(path) as file:
            header = file.readline(most)
        delimiter = max(",;\t|", key=header.count)
        plain = delimiter == "\t" and _is_line_a_row(path, most) and _is_plain(path, most)
        with _open_text(path) as file:
            lines = _bounded(file, most)
            reader = _TabReader(lines) if plain else csv.reader(lines, delimiter=delimiter, strict=True)
            names = [name.strip() for name in next(reader, [])]
            line = reader.line_num
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"{path}:1: column {twice!r} appears twice; give each its own name")
            if names:
                choose(names, str(path))
            for row in reader:
                where, line = f"{path}:{line + 1}", reader.line_num  # a row may span lines; the first is reported
                if not any(row):
                    continue
                if len(row) != len(names):
                    message = f"{where}: {len(row)} cells under a header of {len(names)}; quote cells that hold commas"
                    yield where, BadRecordError("with too many or too few cells", message)
                else:
                    yield where, dict(zip(names, map(cell, row), strict=True))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        problem = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path}{f':{line + 1}' if line else ''}: cannot be read ({problem}); give a CSV file in UTF-8, plain, .gz or .zst"
        ) from None
    except csv.Error as error:
        raise DataError(
            f"{path}:{line + 1}: not CSV ({error}); a cell that begins with a quote must end with one, with quotes inside it "
            'doubled: """Weird Al"" Yankovic"'
        ) from None


def _bounded(file: TextIO, most: int) -> Iterator[str]:
    while line := file.readline(most + 1):
        if len(line) > most:
            raise csv.Error(f"a line of more than {most:,} characters")
        yield line


def _is_line_a_row(path: Path, most: int) -> bool:
    """Whether every line has as many tabs as the header, so that no quoted cell spans tabs or lines."""
    with _open_text(path) as file:
        return len({line.count("\t") for line in _bounded(file, most) if line.strip("\r\n")}) == 1


def _is_plain(path: Path, most: int) -> bool:
    """Whether CSV rules cannot parse the file, because it does not use quoting: ``"Weird Al" Yankovic``.

    Raises:
        DataError: CSV rules parse it, but not into one row per line.
    """
    with _open_text(path) as file, _open_text(path) as again:
        lines = _TabReader(_bounded(file, most))
        try:
            rows = csv.reader(_bounded(again, most), delimiter="\t", strict=True)
            for row, other in zip_longest(lines, rows):
                if row != other:
                    deque(rows, maxlen=0)  # a later csv.Error may still show that it is not CSV
                    raise DataError(
                        f"{path}:{lines.line_num}: a quote that is not closed, or not on this line; double it, and put quotes "
                        'around the cell: """Weird Al"""'
                    )
        except csv.Error:
            return True
    return False


class _TabReader:
    """A ``csv.reader`` of one row per line, where quotes count only around a whole cell."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines, self.line_num = lines, 0

    def __iter__(self) -> "_TabReader":
        return self

    def __next__(self) -> list[str]:
        line = next(self._lines)
        self.line_num += 1
        if not line.strip("\r\n"):
            return []
        cells = ((_QUOTED_CELL.fullmatch(cell), cell) for cell in line.rstrip("\r\n").split("\t"))
        return [quoted[1].replace('""', '"') if quoted else cell for quoted, cell in cells]


def _open_text(path: Path) -> TextIO:
    return io.TextIOWrapper(open_binary(path), encoding="utf-8-sig", newline="")
