"""Rows of a spreadsheet (``.xlsx``). The only reader of questions that imports openpyxl."""

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from search_e1.data.tables import Cell
from search_e1.errors import ConfigError, DataError

SUFFIX = ".xlsx"


def sheet_rows(path: Path, question: str, notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Location and cells of each row of the first non-empty sheet; its first row names the columns.

    A cell merged over rows counts for each of them. Dates become ISO 8601 text, percentages text as displayed. ``question`` is
    the column of the questions; ambiguities are appended to ``notes``.

    Raises:
        ConfigError: openpyxl is not installed.
        DataError: the file cannot be read, or holds an unusable cell: an error, a formula without value, a cell merged over
            columns.
    """
    shown, formulas = _open(path, values=True), _open(path, values=False)
    filled = [sheet for sheet in shown.worksheets if any(cell.value is not None for row in sheet.iter_rows() for cell in row)]
    if not filled:
        return
    sheet = filled[0]
    if len(filled) > 1:
        notes.append(f"read from the first sheet, {sheet.title!r}; not from {', '.join(repr(s.title) for s in filled[1:])}")
    first, *rows = sheet.iter_rows()
    names = {cell.column: str(cell.value).strip() for cell in first if cell.value is not None}
    twice = next((cell for cell in first if list(names.values()).count(names.get(cell.column, "")) > 1), None)
    if twice is not None:
        raise DataError(f"{_place(path, twice)}: column {twice.value!r} appears twice; give each its own name")
    merged = _merged(path, sheet, names, question, first[0].row)
    dates: list[str] = []
    for row in rows:
        values = {}
        for cell in (merged.get((cell.row, cell.column), cell) for cell in row):
            value = _value(path, cell, formulas[sheet.title][cell.coordinate], dates)
            if value is not None and cell.column not in names:
                raise DataError(f"{_place(path, cell)}: its column has no name in the first row; give it one, or clear it")
            if cell.column in names:
                values[names[cell.column]] = value
        if any(value is not None for value in values.values()):
            yield f"{path}:{row[0].row}", values
    if dates:
        notes.append(
            f"{len(dates)} dates are written as 1969-07-20 ({dates[0]}); format the cells as text to keep them as displayed"
        )


def _open(path: Path, *, values: bool) -> Any:
    try:
        import openpyxl
    except ModuleNotFoundError:
        raise ConfigError(
            f"{path}: a spreadsheet needs openpyxl; install it with `pip install 'search-e1[documents]'`"
        ) from None
    try:
        return openpyxl.load_workbook(path, data_only=values)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); give the path of a spreadsheet") from None
    except (BadZipFile, KeyError, ValueError, TypeError, SyntaxError) as error:  # not an .xlsx file, or a damaged one
        problem = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: not a spreadsheet that can be read ({problem}); save it as .xlsx, or as CSV") from None


def _merged(path: Path, sheet: Any, names: dict[int, str], question: str, head: int) -> dict[tuple[int, int], Any]:
    """(Row, column) of each merged cell -> the cell that holds its value."""
    found: dict[tuple[int, int], Any] = {}
    for area in sheet.merged_cells.ranges:
        where = f"{path}:{sheet.title}!{area.coord}"
        if area.min_col != area.max_col:
            raise DataError(f"{where}: merged across columns, so its column is ambiguous; unmerge it")
        if area.min_row <= head or names.get(area.min_col) == question:
            raise DataError(f"{where}: merged across rows, each of which needs its own value; unmerge it")
        top = sheet.cell(area.min_row, area.min_col)
        found |= {(row, area.min_col): top for row in range(area.min_row, area.max_row + 1)}
    return found


def _value(path: Path, cell: Any, formula: Any, dates: list[str]) -> Any:
    value = cell.value
    if cell.data_type == "e":
        raise DataError(f"{_place(path, cell)}: holds the error {value}; fix it, or clear it")
    if value is None and formula.data_type == "f":
        raise DataError(f"{_place(path, cell)}: a formula without its value; save the file in a spreadsheet program first")
    if isinstance(value, datetime.datetime | datetime.date | datetime.time | datetime.timedelta):
        dates.append(f"{cell.parent.title}!{cell.coordinate}")
        midnight = isinstance(value, datetime.datetime) and value.time() == datetime.time()
        return str(value.date() if midnight else value)  # type: ignore[union-attr]
    if isinstance(value, int | float) and not isinstance(value, bool) and "%" in (cell.number_format or ""):
        return f"{value * 100:.15g}%"
    if isinstance(value, str):
        return Cell(value) if value.strip() else None
    return value


def _place(path: Path, cell: Any) -> str:
    return f"{path}:{cell.parent.title}!{cell.coordinate}"
