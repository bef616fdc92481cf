import gzip
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from search_e1.config.inputs import DataConfig
from search_e1.data.corpus import Corpus
from search_e1.data.formats import arrays
from search_e1.data.formats.passages import CorpusColumns
from search_e1.errors import ConfigError, DataError
from search_e1.types import Passage

AARON = Passage(id="1", title="Aaron", text='Aaron ( or ; "Ahärôn") is a prophet.')
WEIRD = Passage(id="2", title='"Weird Al" Yankovic', text="A singer, a parodist.")
DPR = (
    'id\ttext\ttitle\n1\t"Aaron ( or ; ""Ahärôn"") is a prophet."\tAaron\n2\t"A singer, a parodist."\t"""Weird Al"" Yankovic"\n'
)


def read(*places: Path, columns: Sequence[str] = (), **options: bool) -> list[Passage]:
    return list(Corpus(*places, columns=CorpusColumns.parse(columns), **options))


def refusal(*places: Path, columns: Sequence[str] = (), **options: bool) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        read(*places, columns=columns, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    elif path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content.encode())
    else:
        path.write_bytes(content.encode())
    return path


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_dpr_s_passages(tmp_path: Path, packed: str) -> None:
    assert read(write(tmp_path / f"psgs_w100.tsv{packed}", DPR)) == [AARON, WEIRD]


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_ms_marco_s_collection_has_neither_header_nor_quotes(tmp_path: Path, packed: str) -> None:
    content = '0\t"Manhattan" was a project.\r\n1\t"An open quote, and a comma\n\n2\tA tab\tin it.\n'
    assert read(write(tmp_path / f"collection.tsv{packed}", content)) == [
        Passage(id="0", title="", text='"Manhattan" was a project.'),
        Passage(id="1", title="", text='"An open quote, and a comma'),
        Passage(id="2", title="", text="A tab\tin it."),
    ]
    broken = write(tmp_path / "c.tsv", "0\tOne.\nnone\n2\tTwo.\n")
    assert refusal(broken) == f"{broken}:2: no tab in it; each line of this file is a number, a tab and a text"
    assert [p.id for p in read(broken, skip_bad_lines=True)] == ["0", "2"]


def test_beir_flashrag_and_search_r1(tmp_path: Path) -> None:
    beir = {"_id": "MED-10", "title": "", "text": "Statins.", "metadata": {"url": "http://x"}}
    [passage] = read(write(tmp_path / "corpus.jsonl", json.dumps(beir)))
    assert passage == Passage(id="MED-10", title="", text="Statins.", metadata={"url": "http://x"})
    wiki = {"id": "0", "contents": '"Aaron"\nAaron is a prophet.'}
    assert read(write(tmp_path / "wiki-18.jsonl.zst", json.dumps(wiki))) == [
        Passage(id="0", title="Aaron", text="Aaron is a prophet.")
    ]


def test_titles_that_are_missing_and_numbers(tmp_path: Path) -> None:
    lines = [{"id": 1, "text": "a"}, {"id": 2.0, "title": None, "text": "b"}, {"id": "3", "title": 1984, "text": "c"}]
    content = "".join(json.dumps(line) + "\n" for line in lines) + '{"id": 4, "title": NaN, "text": "d"}'
    titles = [(p.id, p.title) for p in read(write(tmp_path / "c.jsonl", content))]
    assert titles == [("1", ""), ("2", ""), ("3", "1984"), ("4", "")]


def test_columns_of_other_names(tmp_path: Path) -> None:
    mapping = ["id=docid", "text=body", "title=meta.title", "url=meta.url", "metadata.year=jahr"]
    row = {"docid": 7, "body": "A city.", "meta": {"title": "Fen", "url": "http://f"}, "jahr": 1900, "contents": "unused"}
    expected = [Passage(id="7", title="Fen", text="A city.", metadata={"url": "http://f", "year": 1900})]
    parquet.write_table(pyarrow.Table.from_pylist([row | {"vector": [0.5]}]), tmp_path / "c.parquet")
    assert read(write(tmp_path / "c.jsonl", json.dumps(row)), columns=mapping) == expected
    assert read(tmp_path / "c.parquet", columns=mapping) == expected
    csv = write(tmp_path / "c.csv", 'docid;body;"Titel"\n7;"A city;\nold.";Fen\n8;"x";\n')
    assert read(csv, columns=["id=docid", "text=body", "text=content", "title=Titel"]) == [
        Passage(id="7", title="Fen", text="A city;\nold."),
        Passage(id="8", title="", text="x"),
    ]
    assert [p.id for p in read(csv, columns=["id=", "text=body"])] == ["c.csv:2", "c.csv:4"]
    assert refusal(csv, columns=["id=docid", "text=bdy"]) == (
        f"{csv}: no column 'bdy' for text; did you mean 'body'? its columns are docid, body, Titel"
    )
    assert refusal(csv).startswith(f"{csv}: its columns are docid, body, Titel; needed are id and contents, or id, title and")
    typo = refusal(tmp_path / "c.jsonl", columns=["id=docid", "text=body", "title=meta.titel"])
    assert typo.endswith("c.jsonl: no record has the column 'meta.titel' that 'title' is read from; correct its name")


def test_rows_of_a_table_that_are_none_can_be_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", 'id,text\n1,one\n2,two,more\n3,\n"4","four\nlines"\n1,again\n')
    assert refusal(path) == f"{path}:3: 3 cells under a header of 2; quote cells that hold commas"
    corpus = Corpus(path, skip_bad_lines=True)
    assert [p.id for p in corpus] == ["1", "4"]
    assert corpus.report() == (
        f"3 records left out: 1 with too many or too few cells (first {path}:3), 1 without text (first {path}:4), "
        f"1 with a repeated id (first {path}:7)"
    )


def test_a_cell_of_any_allowed_length_and_no_longer(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", "id,text\n1," + "x" * 2**20 + "\n")
    assert len(read(path)[0].text) == 2**20
    endless = write(tmp_path / "d.csv", "id,text\n1," + "x" * 2**23 + "\n")
    assert refusal(endless).startswith(f"{endless}:2: not CSV (a line of more than 6,356,992 characters)")


def test_an_array_is_read_item_by_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_CHUNK", 64)
    items = [{"id": i, "text": f"stöne {i} ]}}" * 9} for i in range(40)]
    for indent in (None, 2):
        path = write(tmp_path / "c.json", json.dumps(items, indent=indent, ensure_ascii=False))
        assert [(p.id, p.text) for p in read(path)] == [(str(item["id"]), item["text"]) for item in items]
    whole = path.read_text()
    assert refusal(write(path, whole[:-3])).startswith(f"{path}:40: not JSON (")
    assert refusal(write(path, "[1, 2]")).startswith(f"{path}:1: int where a JSON object is needed")
    monkeypatch.setattr(arrays, "_MOST", 1000)
    assert refusal(write(path, '[{"id": "' + "x" * 5000)) == f"{path}:1: an item of more than 0 MiB, or broken JSON"


def test_memory_does_not_grow_with_a_table(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        lines = "".join(f'{i}\t"stone {i} ""of"" many"\tStone {i}\n' for i in range(rows))
        path = write(tmp_path / f"{rows}.tsv", "id\ttext\ttitle\n" + lines)
        tracemalloc.start()
        try:
            assert sum(1 for _ in Corpus(path)) == rows
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(1000), peak(16_000)
    assert many - few < 24 * 2 * 16_000 + 2**16  # the table of ids, while it is copied


def test_ids_of_two_corpora(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, f"id,text\n1,{name}\n") for name in ("wiki.csv", "news.csv"))
    assert refusal(a, b) == (
        f"{b}:2: id '1' was used in {a}:2; give every passage its own, or prefix the ids with the corpus names "
        "(--prefix-ids; data.prefix_ids)"
    )
    assert [p.id for p in read(a, b, prefix_ids=True)] == ["wiki:1", "news:1"]
    again = write(tmp_path / "x" / "wiki.csv", "id,text\n1,a\n1,b\n")
    assert refusal(a, again, prefix_ids=True) == f"{again}:3: id 'x-wiki:1' was used in {again}:2; give every passage its own"
    assert refusal(a, a, prefix_ids=True).startswith("two corpora are called ")
    sums = {Corpus(a, b).checksum(), Corpus(a, b, prefix_ids=True).checksum(), Corpus(b, a).checksum()}
    sums.add(Corpus(a, b, columns=CorpusColumns.parse(["id="])).checksum())
    assert len(sums) == 4


def test_the_corpus_of_a_config() -> None:
    files = {"train": "t.jsonl", "eval": {"x": "e.jsonl"}}
    assert DataConfig(**files, corpus="a.tsv").corpus == (Path("a.tsv"),)
    data = DataConfig(**files, corpus=["a.tsv", "b.csv"], columns={"id": "", "text": ["body", "content"]})
    assert data.corpus == (Path("a.tsv"), Path("b.csv"))
    assert data.corpus_columns == CorpusColumns.parse(["id=", "text=body", "text=content"])
    for wrong, said in (
        ({"body": "text"}, "unknown field 'body' of a passage"),
        ({"text": ""}, "field 'text' of a passage: the column name is empty"),
        ({"text": "a", "contents": "b"}, "fields 'contents' and 'text' of a passage are both given"),
    ):
        with pytest.raises(ValueError, match=said):
            DataConfig(**files, columns=wrong)
    with pytest.raises(ConfigError, match="--column body: write FIELD=COLUMN"):
        CorpusColumns.parse(["body"])
