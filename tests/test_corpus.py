import gzip
import hashlib
import json
from itertools import islice
from pathlib import Path

import pytest

from search_e1.data.corpus import checksum, read_corpus
from search_e1.errors import DataError
from search_e1.types import Passage

GOOD = {"id": "0", "contents": '"Bel"\nBel is a city.\nIt is old.'}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_corpus(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_both_forms_of_a_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "c.jsonl", GOOD, {"id": 1, "title": "Fen", "text": "A city."}, {"id": "2", "contents": "No title."}
    )
    expected = [
        Passage(id="0", title="Bel", text="Bel is a city.\nIt is old."),
        Passage(id="1", title="Fen", text="A city."),
        Passage(id="2", title="", text="No title."),
    ]
    assert list(read_corpus(path)) == expected
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_corpus(packed)) == expected


def test_it_streams(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", GOOD, "{broken")
    assert [p.id for p in islice(read_corpus(path), 1)] == ["0"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", "not JSON"),
        ("3", "int found where a JSON object is needed"),
        ({"contents": "x"}, "field 'id' is missing"),
        ({"id": "1"}, "field 'contents' is missing"),
        ({"id": "1", "text": "x"}, "field 'title' is missing"),
        ({"id": "1", "contents": None}, "field 'contents' is NoneType, not text"),
        ({"id": True, "contents": "x"}, "field 'id' is bool, not text"),
        ({"id": "", "contents": "x"}, "field 'id' is empty"),
        ('{"id": "1", "contents": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_refused_by_file_and_line(tmp_path: Path, line: object, says: str) -> None:
    path = write(tmp_path / "c.jsonl", GOOD, "", line)
    message = refusal(path)
    assert message.startswith(f"{path}:3: ")
    assert says in message


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"id": "1", "contents": "caf\xe9"}\n')
    assert refusal(path).startswith(f"{path}:1: not JSON (")


def test_a_duplicate_id_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", {**GOOD, "id": "a"}, GOOD, {**GOOD, "id": 0})
    assert refusal(path).startswith(f"{path}:3: id '0' was used on line 2;")


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    empty, missing = write(tmp_path / "c.jsonl"), tmp_path / "none.jsonl"
    assert refusal(empty).startswith(f"{empty}: no passages in it")
    assert refusal(missing).startswith(f"{missing}: cannot be read (No such file or directory)")
    assert refusal(tmp_path).startswith(f"{tmp_path}: cannot be read (Is a directory)")


def test_the_checksum_is_of_the_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", GOOD)
    assert checksum(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=r"none: cannot be read"):
        checksum(tmp_path / "none")
