"""Rows of CSV and TSV files."""

import csv
import gzip
import re
import zlib
from collections import deque
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from search_e1.errors import DataError

_QUOTED_CELL = re.compile(r'"((?:[^"]|"")*)"', re.DOTALL)


class Cell(str):
    """Of a table, where numbers and lists are texts too."""


def table_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV file with a header; the delimiter is the one of ``, ; | tab`` that is most frequent in the header."""
    line = 0
    try:
        with _open_text(path) as file:
            header = file.readline()
            file.seek(0)
            delimiter = max(",;\t|", key=header.count)
            plain = delimiter == "\t" and _is_line_a_row(file) and _is_plain(path)
            reader = _TabReader(file) if plain else csv.reader(file, delimiter=delimiter, strict=True)
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
                yield where, dict(zip(names, map(Cell, row), strict=True))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        problem = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path}{f':{line + 1}' if line else ''}: cannot be read ({problem}); give a CSV file in UTF-8, plain or .gz"
        ) from None
    except csv.Error as error:
        raise DataError(
            f"{path}:{line + 1}: not CSV ({error}); a cell that begins with a quote ends with one, and quotes within it are "
            'doubled: """Weird Al"" Yankovic"'
        ) from None


def _is_line_a_row(file: TextIO) -> bool:
    """Whether each line has as many tabs as the header, so that no quote need hold a tab or the end of a line."""
    counts = {line.count("\t") for line in file if line.strip("\r\n")}
    file.seek(0)
    return len(counts) == 1


def _is_plain(path: Path) -> bool:
    """Whether the rules of CSV do not read the file, as of what knows no quotes: ``"Weird Al" Yankovic``.

    Raises:
        DataError: they do, and read another table than the lines are.
    """
    with _open_text(path) as file, _open_text(path) as again:
        lines = _TabReader(file)
        try:
            rows = csv.reader(again, delimiter="\t", strict=True)
            for row, other in zip_longest(lines, rows):
                if row != other:
                    deque(rows, maxlen=0)  # a later error may yet show that it is no CSV
                    raise DataError(
                        f"{path}:{lines.line_num}: a quote that is not closed, or in another line; double it, and put quotes "
                        'around the cell: """Weird Al"""'
                    )
        except csv.Error:
            return True
    return False


class _TabReader:
    """A ``csv.reader`` of lines, in whose cells quotes count only where one is quoted as a whole."""

    def __init__(self, file: TextIO) -> None:
        self._file, self.line_num = file, 0

    def __iter__(self) -> "_TabReader":
        return self

    def __next__(self) -> list[str]:
        line = next(self._file)
        self.line_num += 1
        if not line.strip("\r\n"):
            return []
        cells = ((_QUOTED_CELL.fullmatch(cell), cell) for cell in line.rstrip("\r\n").split("\t"))
        return [quoted[1].replace('""', '"') if quoted else cell for quoted, cell in cells]


def _open_text(path: Path) -> TextIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")
