import gzip
import hashlib
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

import fake_hub
from search_e1.data import corpus as corpora
from search_e1.data import sources
from search_e1.data.corpus import Corpus
from search_e1.data.lines import checksum
from search_e1.errors import DataError
from search_e1.retrieval.passages import Passages
from search_e1.types import Passage

GOOD = {"id": "0", "contents": '"Bel"\nBel is a city.\nIt is old.'}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(Corpus(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_both_forms_of_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", GOOD, {"id": 1, "title": "Fen", "text": "A city."}, {"id": "2", "contents": "No title."})
    expected = [
        Passage(id="0", title="Bel", text="Bel is a city.\nIt is old."),
        Passage(id="1", title="Fen", text="A city."),
        Passage(id="2", title="", text="No title."),
    ]
    assert list(Corpus(path)) == expected
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(Corpus(packed)) == expected


def test_where_a_passage_comes_from_is_kept(tmp_path: Path) -> None:
    told = {"file": "a.pdf", "page": 3, "heading": None, "score": 0.5, "tags": ["x"]}
    lines = [GOOD | {"metadata": told, "url": "http://x/a"}, {"id": "1", "title": "B", "text": "b", "metadata": "all"}]
    first, second = Corpus(write(tmp_path / "c.jsonl", *lines))
    assert first.metadata == {"file": "a.pdf", "page": 3, "score": "0.5", "tags": '["x"]', "url": "http://x/a"}
    assert second.metadata == {}
    stored = Passages.write([first, second], tmp_path)
    assert list(stored) == [first, second]
    assert stored.hit(0, 1.0).metadata == first.metadata
    # Without metadata a passage is stored as before, and the checksum of an index stays.
    assert stored.path.read_text().splitlines()[1] == '{"id":"1","title":"B","text":"b"}'


def test_it_streams(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", GOOD, "{broken")
    assert [p.id for p in islice(Corpus(path), 1)] == ["0"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", "not JSON"),
        ("3", "int where a JSON object is needed"),
        ({"contents": "x"}, "field 'id' is missing"),
        ({"id": "1"}, "field 'contents' is missing"),
        ({"id": "1", "text": None}, "field 'text' is NoneType, not text"),
        ({"id": "1", "title": ["x"], "text": "x"}, "field 'title' is list, not text"),
        ({"id": 1.5, "text": "x"}, "field 'id' is float, not text"),
        ({"id": "1", "contents": None}, "field 'contents' is NoneType, not text"),
        ({"id": True, "contents": "x"}, "field 'id' is bool, not text"),
        ({"id": "", "contents": "x"}, "field 'id' is empty"),
        ({"id": "1", "contents": ""}, "passage '1' has no text"),
        ({"id": "1", "contents": '"Bel"\n  '}, "passage '1' has no text"),
        ({"id": "1", "title": "Bel", "text": "\t\n"}, "passage '1' has no text"),
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
    assert refusal(path).startswith(f"{path}:1: not UTF-8 (")


def test_a_duplicate_id_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", {**GOOD, "id": "a"}, GOOD, {**GOOD, "id": 0})
    assert refusal(path).startswith(f"{path}:3: id '0' was used in {path}:2;")


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    empty, missing = write(tmp_path / "c.jsonl"), tmp_path / "none.jsonl"
    assert refusal(empty).startswith(f"{empty}: no passages in it")
    assert refusal(missing).startswith(f"{missing}: cannot be read (No such file or directory)")
    assert refusal(tmp_path).startswith(f"{tmp_path}: no passages in it")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "README.md").write_text("x")
    assert refusal(tmp_path / "only").startswith(f"{tmp_path / 'only'}: no file in it that could be a corpus; give a file")


def test_the_checksum_is_of_the_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", GOOD)
    assert checksum(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=r"none: cannot be read"):
        checksum(tmp_path / "none")


def zst(path: Path, content: bytes) -> Path:
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)
    return path


def test_zstandard(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"id": i, "contents": f"stone {i * i}"}) + "\n" for i in range(3000)).encode()
    path = zst(tmp_path / "c.jsonl.zst", lines)
    assert [p.text for p in Corpus(path)] == [f"stone {i * i}" for i in range(3000)]
    (tmp_path / "two.jsonl.zst").write_bytes(
        path.read_bytes() + zst(tmp_path / "more.zst", b'{"id": "a", "contents": "x"}').read_bytes()
    )
    assert len(list(Corpus(tmp_path / "two.jsonl.zst"))) == 3001
    path.write_bytes(path.read_bytes()[:-9])
    assert "cannot be read (Truncated compressed stream); give the path of a JSON lines file" in refusal(path)
    path.write_bytes(b"no zstandard at all")
    assert refusal(path).startswith(f"{path}: cannot be read (")


def table(path: Path, rows: list[dict], **options: int) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def test_parquet(tmp_path: Path) -> None:
    rows = [{"id": i, "contents": f'"Bel"\nstone {i}', "embedding": [0.5]} for i in range(2500)]
    path = table(tmp_path / "c.parquet", rows, row_group_size=1000)
    assert list(Corpus(path)) == [Passage(id=str(i), title="Bel", text=f"stone {i}") for i in range(2500)]
    parts = table(tmp_path / "parts.parquet", [{"id": "a", "title": "Bel", "text": "A city."}])
    assert list(Corpus(parts)) == [Passage(id="a", title="Bel", text="A city.")]
    again = table(tmp_path / "again.parquet", [*rows[:1500], rows[3]])
    assert refusal(again).startswith(f"{again}:1501: id '3' was used in {again}:4;")
    none = table(tmp_path / "none.parquet", [{"id": "a", "contents": "x"}, {"id": "b", "contents": None}])
    assert refusal(none).startswith(f"{none}:2: field 'contents' is NoneType, not text;")
    other = table(tmp_path / "other.parquet", [{"docid": "a", "body": "x"}])
    assert refusal(other).startswith(f"{other}: its columns are docid, body; needed are id and contents, or id, title and text")
    path.write_bytes(path.read_bytes()[:-9])
    assert refusal(path).startswith(f"{path}: cannot be read (")
    assert "no.parquet: cannot be read (" in refusal(tmp_path / "no.parquet")


def test_bytes_that_are_not_utf8_in_parquet(tmp_path: Path) -> None:
    cells = pyarrow.array([b"fine", b"caf\xe9", b"fine"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"id": ["a", "b", "c"], "contents": cells}), tmp_path / "c.parquet")
    assert refusal(tmp_path / "c.parquet").startswith(f"{tmp_path / 'c.parquet'}:2: not UTF-8 (")
    kept = Corpus(tmp_path / "c.parquet", skip_bad_lines=True)
    assert [p.id for p in kept] == ["a", "c"]


def test_several_files_and_directories_are_one_corpus(tmp_path: Path) -> None:
    (tmp_path / "d" / "sub").mkdir(parents=True)
    write(tmp_path / "d" / "b.jsonl", {"id": "b", "contents": "x"})
    (tmp_path / "d" / "a.jsonl.gz").write_bytes(gzip.compress(b'{"id": "a", "contents": "x"}'))
    table(tmp_path / "d" / "sub" / "c.parquet", [{"id": "c", "contents": "x"}])
    write(tmp_path / "d" / "notes.txt", "not this")
    (tmp_path / "d" / ".hidden").mkdir()
    write(tmp_path / "d" / ".hidden" / "e.jsonl", "nor this")
    last = write(tmp_path / "last.jsonl", {"id": "d", "contents": "x"})
    assert [p.id for p in Corpus(tmp_path / "d", last)] == ["a", "b", "c", "d"]
    second = write(tmp_path / "second.jsonl", {"id": "b", "contents": "y"})
    with pytest.raises(DataError, match=r"second.jsonl:1: id 'b' was used in .*b.jsonl:1; give"):
        list(Corpus(tmp_path / "d", second))


def test_bad_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    good = [{"id": i, "contents": f"stone {i}"} for i in range(3)]
    bad = [
        "{",
        {"id": "x"},
        "[]",
        good[1],
        {"id": "y", "contents": " "},
        {"id": "z", "contents": "x" * 2000},
        "{",
        good[0],
    ]
    write(path, good[0], *bad[:2], good[1], *bad[2:], good[2])
    with path.open("ab") as file:
        file.write(b'{"id": "1", "contents": "caf\xe9"}\n')
    corpus = Corpus(path, skip_bad_lines=True, most_bytes=1000)
    for _ in range(2):
        assert [p.id for p in corpus] == ["0", "1", "2"]
        assert corpus.report() == (
            f"9 records left out: 2 not JSON (first {path}:2), 2 with a repeated id (first {path}:6), "
            f"1 without contents (first {path}:3), 1 not a JSON object (first {path}:5), 1 without text (first {path}:7), "
            f"1 too long (first {path}:8), 1 not UTF-8 (first {path}:12)"
        )
    with pytest.raises(DataError, match=r"no passages in it \(1 records left out: 1 not JSON"):
        list(Corpus(write(tmp_path / "bad.jsonl", "{"), skip_bad_lines=True))


@pytest.mark.parametrize(("text", "length"), [("x" * 10 * 2**20, "more than 6,356,992"), ("x" * 2**20 + "y", "1,048,577")])
def test_a_passage_of_megabytes(tmp_path: Path, text: str, length: str) -> None:
    path = write(tmp_path / "c.jsonl", GOOD, {"id": "1", "contents": text}, {"id": "2", "contents": "x"})
    message = refusal(path)
    assert message.startswith(f"{path}:2: a passage of {length} bytes exceeds the limit of 1,048,576; split it")
    assert len(message) < 300
    assert [p.id for p in Corpus(path, skip_bad_lines=True)] == ["0", "2"]
    assert len(list(Corpus(path, most_bytes=2**24))) == 3


def test_ids_are_told_apart_in_bounded_memory() -> None:
    seen = corpora._Seen()
    ids = [str(i) for i in range(20_000)]
    assert not any(map(seen.twice, ids))
    assert all(map(seen.twice, ids))
    assert len(seen) == 20_000
    assert len(seen._table) == 2**15


def test_two_ids_with_one_hash_are_not_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora._Seen, "twice", lambda self, text: True)
    path = write(tmp_path / "c.jsonl", GOOD, {"id": "1", "contents": "x"})
    monkeypatch.setattr(corpora._Seen, "__len__", lambda self: 2)
    assert [p.id for p in Corpus(path)] == ["0", "1"]


def test_the_checksum_is_of_all_that_decides(tmp_path: Path) -> None:
    def checksum_of(*places: Path, **options) -> str:
        return Corpus(*places, **options).checksum()

    (tmp_path / "d").mkdir()
    a, b = write(tmp_path / "d" / "a.jsonl", GOOD), write(tmp_path / "d" / "b.jsonl", {"id": "1", "contents": "x"})
    assert checksum_of(a) == checksum_of(a)
    found = {
        checksum_of(a), checksum_of(b), checksum_of(a, b), checksum_of(b, a), checksum_of(tmp_path / "d"),
        checksum_of(a, skip_bad_lines=True), checksum_of(a, most_bytes=10),
    }  # fmt: skip
    assert len(found) == 7
    before = checksum_of(tmp_path / "d")
    b.write_text(b.read_text() + "\n")
    assert checksum_of(tmp_path / "d") != before


def test_a_data_set_of_the_hub_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    lines = [{"id": i, "contents": f"stone {i}"} for i in range(500)]
    (tmp_path / "hub" / "train.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    with fake_hub.serve(tmp_path / "hub") as address:
        clean = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        environment = {**clean, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "COLUMNS": "200"}
        command = [sys.executable, "-c", "from search_e1.cli.main import main; main()", "index", "build"]
        words = ["--corpus", "some/repository", "--out", str(tmp_path / "made")]
        done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(Passages.open(tmp_path / "made")) == [Passage(id=str(i), title="", text=f"stone {i}") for i in range(500)]
    assert not list((tmp_path / "home").rglob("*.arrow"))  # nothing was copied first
    assert {path.name for path in tmp_path.iterdir()} == {"hub", "home", "made"}


def test_which_split_of_a_data_set() -> None:
    assert sources._only_split("a/b", ["test", "train"]) == "train"
    assert sources._only_split("a/b", ["corpus"]) == "corpus"
    with pytest.raises(DataError, match=r"a/b: has the splits dev, test; name one, as in a/b::dev"):
        sources._only_split("a/b", ["dev", "test"])


def test_a_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError) as caught:
        list(Corpus("some/corpus"))
    message = str(caught.value)
    assert message.startswith("some/corpus: no such file, and the Hub cannot be reached (")
    assert message.endswith(
        "; give a file of JSON lines, CSV or TSV (plain, .gz or .zst) or Parquet, or a directory of such files"
    )
    assert "\n" not in message


def test_a_missing_file_is_not_taken_for_a_data_set() -> None:
    with pytest.raises(DataError, match=r"corpora/wiki.jsonl.gz: cannot be read \(No such file or directory\)"):
        list(Corpus("corpora/wiki.jsonl.gz"))
