from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from search_e1.data import prepare
from search_e1.data.prepare import Request
from search_e1.data.questions import to_record
from search_e1.data.user_files import Columns
from search_e1.errors import DataError

HEAD = ["question", "answers", "topic"]


def book(path: Path, rows: list[list[Any]], change: Callable[[Any], object] = lambda sheet: None) -> Path:
    workbook = openpyxl.Workbook()
    sheet = workbook.active
    sheet.title = "Fragen"
    for row in rows:
        sheet.append(row)
    change(sheet)
    workbook.save(path)
    return path


def read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    made = prepare.prepare(Request(train=(str(path),), columns=Columns.parse(["metadata.topic=topic"])))
    return [to_record(row.question) for row in made.parts[0].rows], made.warnings


def test_cells_are_what_was_meant(tmp_path: Path) -> None:
    rows = [
        HEAD,
        ["Where is Oslo?", '["Norway", "Norge"]', "places"],
        ["When?", date(1969, 7, 20), None],
        ["When exactly?", datetime(1969, 7, 20, 20, 17), "moon"],
        [None, None, None],
        ["How many?", 12.0, "numbers"],
        ["Is it?", True, "numbers"],
        ["How much?", 0.5, "numbers"],
    ]

    def change(sheet: Any) -> None:
        sheet["B8"].number_format = "0%"
        sheet.merge_cells("C2:C3")
        sheet.parent.create_sheet("More")["A1"] = "x"

    records, warnings = read(book(tmp_path / "a.xlsx", rows, change))
    assert [record["golden_answers"] for record in records] == [
        ["Norway", "Norge"], ["1969-07-20"], ["1969-07-20 20:17:00"], ["12"], ["yes"], ["50%"],
    ]  # fmt: skip
    assert [record["metadata"]["topic"] for record in records] == ["places", "places", "moon", "numbers", "numbers", "numbers"]
    assert warnings == [
        "a.train.jsonl: read from the first sheet, 'Fragen'; not from 'More'",
        "a.train.jsonl: 2 dates are written as 1969-07-20 (Fragen!B3); format the cells as text to keep them as displayed",
    ]


@pytest.mark.parametrize(
    ("row", "change", "said"),
    [
        (
            ["Who?", "#N/A", "x"],
            lambda sheet: setattr(sheet["B2"], "data_type", "e"),
            ":Fragen!B2: holds the error #N/A; fix it",
        ),
        (["Who?", "=A2", "x"], lambda sheet: None, ":Fragen!B2: a formula without its value; save the file in a"),
        (["Who?", "x", "y"], lambda sheet: sheet.merge_cells("A2:B2"), ":Fragen!A2:B2: merged across columns, so"),
        (["Who?", "x", "y"], lambda sheet: sheet.merge_cells("A2:A3"), ":Fragen!A2:A3: merged across rows, each of which"),
        (["Who?", "x", "y", "z"], lambda sheet: None, ":Fragen!D2: its column has no name in the first row; give it one"),
        (
            ["Who?", "x", "y"],
            lambda sheet: setattr(sheet["C1"], "value", "answers"),
            ":Fragen!B1: column 'answers' appears twice",
        ),
        (
            ["Who?", "NaN", "y"],
            lambda sheet: None,
            ":2: column 'answers' holds 'NaN', a missing value; write the answer, or remove the row",
        ),
        (
            ["Who?", "['a', {'b': 1}]", "y"],
            lambda sheet: None,
            ":2: column 'answers' holds \"['a', {'b': 1}]\", not a list of strings",
        ),
    ],
)
def test_a_cell_that_cannot_be_read_is_named(
    tmp_path: Path, row: list[Any], change: Callable[[Any], object], said: str
) -> None:
    path = book(tmp_path / "a.xlsx", [HEAD, row], change)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}{said}")
    assert "\n" not in str(caught.value)


def test_what_is_no_spreadsheet(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("question,answers\n")
    with pytest.raises(DataError, match=r"a.xlsx: not a spreadsheet that can be read \(File is not a zip file\); save it as"):
        read(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match=r"none.xlsx: cannot be read \(No such file or directory\); give the path"):
        read(tmp_path / "none.xlsx")
