"""Users' own question files: what is read of each kind, and what is refused."""

import csv
import gzip
import hashlib
import json
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from search_e1.data import prepare
from search_e1.data.prepare import Request
from search_e1.data.user_files import Columns, benchmark_name
from search_e1.errors import DataError
from test_prepare import jsonl, prepared, read, row

SAME = [
    {
        "id": "a",
        "question": "Wo liegt Oslo?",
        "golden_answers": ["Norwegen", "Norway"],
        "metadata": {"hops": 1, "t": "Geo"},
    },
    {"id": "b", "question": "Wer schrieb\nFaust?", "golden_answers": ["Goethe"], "metadata": {"hops": 2, "t": "Lit"}},
]
GERMAN = ("question=Frage", "answers=Antwort", "id=Nr", "hops=Schritte", "metadata.t=Thema")


def test_csv_parquet_and_nested_json_lines_hold_the_same(tmp_path: Path) -> None:
    table = tmp_path / "fragen.csv"
    table.write_bytes(
        "\ufeffNr;Frage;Antwort;Schritte;Thema\na;Wo liegt Oslo?;Norwegen | Norway|norwegen.;1;Geo\n\n"
        'b;"Wer schrieb\nFaust?";Goethe;2;Lit\n'.encode()
    )
    packed = tmp_path / "fragen.csv.gz"
    packed.write_bytes(gzip.compress(table.read_bytes()))
    rows = [
        {"Nr": q["id"], "Frage": q["question"], "Antwort": q["golden_answers"], "Schritte": q["metadata"]["hops"]}
        | {"Thema": q["metadata"]["t"]}
        for q in SAME
    ]
    columns = tmp_path / "fragen.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), columns)
    nested = jsonl(
        tmp_path / "fragen.jsonl",
        *({**r, "Antwort": {"labels": [{"text": answer} for answer in r["Antwort"]]}} for r in rows),
    )
    deep = tuple(m.replace("=Antwort", "=Antwort.labels.text") for m in GERMAN)
    for path, mapping, separator in (
        (table, GERMAN, "|"),
        (packed, GERMAN, "|"),
        (columns, GERMAN, None),
        (nested, deep, None),
    ):
        made = prepared(train=(str(path),), columns=Columns.parse(mapping, separator))
        out = tmp_path / "out"
        prepare.write(made, Request(), out, overwrite=True)
        assert read(out / "fragen.train.jsonl") == SAME, path


def test_what_json_has_no_word_for_becomes_text_or_nothing(tmp_path: Path) -> None:
    file = tmp_path / "mine.parquet"
    rows = [
        row("When?", asked=date(2026, 1, 2), price=float("nan"), hops=2.0),
        row("Who?", asked=None, price=1.5, hops=None),
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    made = prepared(train=(str(file),), columns=Columns.parse(["metadata.asked=asked", "metadata.price=price"]))
    prepare.write(made, Request(), tmp_path / "out")
    assert [r.get("metadata") for r in read(tmp_path / "out" / "mine.train.jsonl")] == [
        {"asked": "2026-01-02", "hops": 2},
        {"price": 1.5},
    ]


def test_made_ids_do_not_depend_on_the_order(tmp_path: Path) -> None:
    rows = [row("Who?", "Ann"), row("Where?", "Oslo"), row("Who?", "Bob"), row("Who?", "Ann")]
    one, two = jsonl(tmp_path / "mine.jsonl", *rows), jsonl(tmp_path / "other" / "mine.jsonl", *rows[::-1])
    ids = [
        {r.question.id: (r.question.text, r.question.answers) for r in prepared(train=(str(p),)).parts[0].rows}
        for p in (one, two)
    ]
    assert ids[0] == ids[1]
    first = "mine_" + hashlib.sha256(b'["Who?", ["Ann"]]').hexdigest()[:12]
    assert sorted(id for id in ids[0] if id.startswith(first)) == [first, f"{first}_2"]


def test_a_list_in_a_cell_and_numbers_are_answers(tmp_path: Path) -> None:
    table = tmp_path / "a.tsv"
    table.write_text('question\tanswers\tmetadata\nWhen?\t["1912", "in 1912"]\t{"hops": 2}\nWhat?\t[sic]\t\n')
    lines = jsonl(tmp_path / "b.jsonl", {"question": "When?", "answer": 1912})
    made = prepared(train=(str(table), f"other={lines}"))
    assert [r.question.answers for part in made.parts for r in part.rows] == [
        ("1912", "in 1912"),
        ("[sic]",),
        ("1912",),
    ]
    assert made.parts[0].rows[0].question.hops == 2
    assert benchmark_name(Path("my questions.v2.csv")) == "my-questions"


GOLDS = {
    """['Oslo', 'Kristiania']""": ("Oslo", "Kristiania"),
    """['Copenhagen' 'Kobenhavn']""": ("Copenhagen", "Kobenhavn"),
    """["l'Oslo"\n 'a "b"' 'it\\'s']""": ("l'Oslo", 'a "b"', "it's"),
    "[1969 1970.0]": ("1969", "1970"),
    "[1912, 1.5]": ("1912", "1.5"),
    "1969.0": ("1969",),
    "[sic]": ("[sic]",),
    "[1] and ['x']": ("[1] and ['x']",),
    "('Oslo', 'Kristiania')": ("Oslo", "Kristiania"),
    "{'Oslo'}": ("Oslo",),
    "array(['Oslo', 'Bergen'], dtype=object)": ("Oslo", "Bergen"),
    "['x', True]": ("x", "yes"),
    "[false]": ("no",),
    "true": ("true",),
    "(1969)": ("(1969)",),
    "(I Can't Get No) Satisfaction": ("(I Can't Get No) Satisfaction",),
    "['2.0']": ("2.0",),
    "Web 2.0": ("Web 2.0",),
}


def test_golds_in_a_cell_are_what_was_meant(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answers"), *((f"Which {i}?", cell) for i, cell in enumerate(GOLDS))])
    [part] = prepared(train=(str(table),)).parts
    assert [row.question.answers for row in part.rows] == list(GOLDS.values())


def test_whole_floats_of_parquet_are_integers(tmp_path: Path) -> None:
    columns = {"question": ["When?", "Where?"], "answers": [[1969.0, 1.5], [7.0]], "id": [1.0, 2.0]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    [part] = prepared(train=(str(tmp_path / "a.parquet"),)).parts
    assert [(row.question.id, row.question.answers) for row in part.rows] == [("1", ("1969", "1.5")), ("2", ("7",))]


def test_what_only_parquet_holds_is_what_was_meant(tmp_path: Path) -> None:
    golds = {"bytes": b"Oslo", "decimal": Decimal("1969.00"), "fraction": Decimal("2.50"), "day": date(1969, 7, 20)}
    texts = {"bytes": "Oslo", "decimal": "1969", "fraction": "2.50", "day": "1969-07-20"}
    for name, gold in golds.items():
        file = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([{"question": "W?", "answer": gold}]), file)
        [part] = prepared(train=(str(file),)).parts
        assert part.rows[0].question.answers == (texts[name],)
    parquet.write_table(pyarrow.Table.from_pylist([{"question": "W?", "answer": b"\xff\xfe"}]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet:1: a value of type bytes"):
        prepared(train=(str(tmp_path / "b.parquet"),))


def test_words_of_programs_in_cells_are_said(tmp_path: Path) -> None:
    """They may be meant (a film is called None), so they are kept, and said."""
    table = tmp_path / "a.csv"
    table.write_text("question,answers\nWhich film?,None\nWhich?,N/A\nIs it?,True\nWho?,Oslo\n")
    made = prepared(train=(str(table),))
    assert [row.question.answers for row in made.parts[0].rows] == [("None",), ("N/A",), ("True",), ("Oslo",)]
    notes = made.parts[0].loaded.notes
    assert f"2 answers are words that stand for a missing value ({table}:2: 'None'); if these are, remove them" in notes
    assert f"1 answers are true or false ({table}:4: 'True'), which a policy's yes or no does not match" in notes
    lines = jsonl(tmp_path / "b.jsonl", {"question": "Who?", "answers": ["null", "Oslo"]})
    assert (
        f"1 answers are words that stand for a missing value ({lines}:1: 'null'); if these are, remove them"
        in prepared(train=(str(lines),)).parts[0].loaded.notes
    )


def test_true_and_false_are_yes_and_no(tmp_path: Path) -> None:
    lines = jsonl(tmp_path / "a.jsonl", {"question": "Is it?", "answer": True}, {"question": "Was it?", "answers": [False]})
    [part] = prepared(train=(str(lines),)).parts
    assert [row.question.answers for row in part.rows] == [("yes",), ("no",)]


def test_a_text_of_json_stays_as_it_is(tmp_path: Path) -> None:
    lines = jsonl(tmp_path / "a.jsonl", row("Which version?", "2.0"), {"question": "Which?", "answer": "2.0"})
    [part] = prepared(train=(str(lines),)).parts
    assert [row.question.answers for row in part.rows] == [("2.0",), ("2.0",)]


def test_aliases_are_answers(tmp_path: Path) -> None:
    """MuSiQue's own file."""
    official = {"paragraphs": [], "question_decomposition": [], "answerable": True}
    lines = jsonl(
        tmp_path / "musique.jsonl",
        {"id": "2hop__1", **official, "question": "Where?", "answer": "Oslo", "answer_aliases": ["Kristiania", "Christiania"]},
        {"id": "2hop__2", **official, "question": "Who?", "answer": "Ann", "answer_aliases": []},
    )
    made = prepared(eval=(str(lines),))
    assert [row.question.answers for row in made.parts[0].rows] == [("Oslo", "Kristiania", "Christiania"), ("Ann",)]
    assert made.warnings == []
    chosen = prepared(eval=(str(lines),), columns=Columns.parse(["answers=answer"]))
    assert [row.question.answers for row in chosen.parts[0].rows] == [("Oslo",), ("Ann",)]


def test_several_answer_columns_can_be_given(tmp_path: Path) -> None:
    lines = jsonl(
        tmp_path / "a.jsonl",
        {"question": "Where?", "answer": {"value": "Oslo", "aliases": ["Kristiania"]}, "o_aliases": ["Oslo city"]},
    )
    columns = Columns.parse(["answers=answer.value", "answers=answer.aliases"])
    made = prepared(train=(str(lines),), columns=columns)
    assert made.parts[0].rows[0].question.answers == ("Oslo", "Kristiania")
    assert made.warnings == [
        "a.train.jsonl: not read: o_aliases; if they hold correct answers, name every column of answers with "
        "--column answers=COLUMN"
    ]


def test_what_a_cell_could_also_mean_is_said(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text('question,answers\nWhen?,1969.0\nWhich?,[sic]\nWhere?,"[Oslo, Bergen]"\n')
    made = prepared(train=(str(table),))
    assert [row.question.answers for row in made.parts[0].rows] == [("1969",), ("[sic]",), ("[Oslo, Bergen]",)]
    assert made.warnings == [
        f"a.train.jsonl: 1 answers are read as whole numbers ({table}:2: '1969.0')",
        f"a.train.jsonl: 2 answers in brackets are read as they are, not as lists ({table}:3: '[sic]')",
    ]


TSV = {
    "quoted as in CSV": ('q\ta\n"Who?"\t"Ann ""A"" B"\n', [("Who?", 'Ann "A" B')]),
    "quotes as characters": ('q\ta\nWho?\t"Weird Al" Yankovic\n', [("Who?", '"Weird Al" Yankovic')]),
    "an open quote": ('q\ta\nWho?\t"Ann\nWhere?\tOslo\n', [("Who?", '"Ann'), ("Where?", "Oslo")]),
    "a tab and a new line in quotes": (
        'q\ta\n"Who\tis?"\tAnn\n"Where\nis?"\tOslo\n',
        [("Who\tis?", "Ann"), ("Where\nis?", "Oslo")],
    ),
    "ends of lines of Windows": ("q\ta\r\nWho?\tAnn\r\n\r\n", [("Who?", "Ann")]),
}


@pytest.mark.parametrize("case", TSV)
def test_quotes_in_a_tsv(tmp_path: Path, case: str) -> None:
    content, rows = TSV[case]
    (tmp_path / "a.tsv").write_text(content, newline="")
    [part] = prepared(train=(str(tmp_path / "a.tsv"),), columns=Columns.parse(["question=q", "answers=a"])).parts
    assert [(row.question.text, row.question.answers[0]) for row in part.rows] == rows


@pytest.mark.parametrize("name", ["A.JSONL.GZ", "a.Jsonl.gz", "A.JSONL", "A.CSV", "A.Csv.GZ", "A.PARQUET"])
def test_a_suffix_in_any_case(tmp_path: Path, name: str) -> None:
    kind = name.lower()
    if kind.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist([row("Who?", "Ann")]), tmp_path / name)
    else:
        content = b"question,answers\nWho?,Ann\n" if ".csv" in kind else json.dumps(row("Who?", "Ann")).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    [part] = prepared(train=(str(tmp_path / name),)).parts
    assert part.rows[0].question.answers == ("Ann",)


def test_golds_that_normalise_to_nothing_are_a_warning(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", row("Which article?", "the", "The."), row("Who?", "The Who"))
    assert prepared(train=(str(file),)).warnings == [
        f"a.train.jsonl: 2 answers are only punctuation and articles ({file}:1: 'the'), which exact match strips "
        "entirely: no answer matches them"
    ]


BAD_FILES = {
    "no such file": ("none.csv", None, (), "none.csv: cannot be read (No such file or directory)"),
    "no column": ("a.csv", "Frage,answers\nW?,x\n", (), "a.csv:2: no column 'question'; there are 'Frage', 'answers'"),
    "misspelt column": (
        "a.csv",
        "Frage,answers\nW?,x\n",
        ("question=Fage",),
        "no column 'Fage'; did you mean 'Frage'?",
    ),
    "no answers": ("a.csv", "question,answers\nW?,x\nW?,\n", (), "a.csv:3: a question without answers"),
    "row of another width": ("a.csv", "question,answers\nW?,x,y\n", (), "a.csv:2: 3 cells under a header of 2"),
    "column twice": ("a.csv", "question,answers, answers\nW?,x,y\n", (), "a.csv:1: column 'answers' appears twice"),
    "open quote": ("a.csv", 'question,answers\nW?,"x\n', (), "a.csv:2: not CSV (unexpected end of data)"),
    "a quote in two lines": (
        "a.tsv",
        'question\tanswers\nW?\t"x\nV?\ty"\n',
        (),
        "a.tsv:2: a quote that is not closed, or not on",
    ),
    "a quoted line end": ("a.tsv", 'question\tanswers\nW?\t"\rx\t"\n', (), "a.tsv:2: a quote that is not closed, or not on"),
    "not UTF-8": ("a.csv", b"question,answers\nW\xff?,x\n", (), "a.csv: cannot be read ("),
    "header alone": ("a.csv", "question,answers\n", (), "a.csv: no questions in it"),
    "no Parquet": ("a.parquet", "question", (), "a.parquet: cannot be read ("),
    "cut .gz": ("a.csv.gz", gzip.compress(b"question,answers\nW?,x\n")[:-9], (), "a.csv.gz"),
    "unknown kind": ("./a.ods", "x", (), "a.ods: unknown kind of file; known: .jsonl"),
    "hops no number": (
        "a.csv",
        "question,answers,hops\nW?,x,two\n",
        (),
        "a.csv:2: column 'hops' holds 'two'; hops must be a whole number",
    ),
    "metadata no JSON": ("a.csv", "question,answers,metadata\nW?,x,{\n", (), "a.csv:2: column 'metadata' is not JSON"),
    "no such metadata": ("a.csv", "question,answers\nW?,x\n", ("metadata=more",), "a.csv:2: no column 'more'"),
    "metadata no object": ("a.jsonl", '{"question": "W?", "answers": "x", "metadata": [1]}', (), "'metadata' is list"),
    "answers no text": ("a.jsonl", '{"question": "W?", "answers": [{"t": "x"}]}', (), "--column answers=answers.text"),
    "an answer NaN": ("a.jsonl", '{"question": "W?", "answers": [NaN]}', (), "a.jsonl:1: column 'answers' holds [nan]"),
    "a question missing": (
        "a.csv",
        "question,answers\nnan,Oslo\n",
        (),
        "a.csv:2: column 'question' holds 'nan', not a question",
    ),
    "an answer missing": ("a.csv", "question,answers\nW?,['x' nan]\n", (), "a.csv:2: column 'answers' holds an empty"),
    "an answer empty": (
        "a.jsonl",
        '{"question": "W?", "answers": ["x", " "]}',
        (),
        "a.jsonl:1: column 'answers' holds an",
    ),
    "an object in a cell": ("a.csv", "question,answers\nW?,{'text': 'x'}\n", (), "not a list of strings; write ["),
    "a list with an object": ("a.csv", """question,answers\nW?,"['x', {'a': 1}]"\n""", (), "not a list of strings"),
    "NaN in a cell": (
        "a.csv",
        "question,answers\nW?,nan\n",
        (),
        "a.csv:2: column 'answers' holds 'nan', a missing value; write",
    ),
    "a key twice": (
        "a.jsonl",
        '{"question": "W?", "answer": "x", "answer": "y"}',
        (),
        "a.jsonl:1: key 'answer' appears twice",
    ),
    "an id that is a list": (
        "a.jsonl",
        '{"id": ["1"], "question": "W?", "answers": "x"}',
        (),
        "a.jsonl:1: column 'id' holds ['1']",
    ),
    "question no text": ("a.jsonl", '{"question": 3, "answers": "x"}', (), "a.jsonl:1: question = 3"),
    "empty question": ("a.jsonl", '{"question": " ", "answers": "x"}', (), "a.jsonl:1: question = ''"),
    "unknown field": ("a.csv", "q,a\n", ("anwsers=a",), "unknown field 'anwsers'; did you mean 'answers'?"),
    "half a mapping": ("a.csv", "q,a\n", ("answers",), "--column answers: write FIELD=COLUMN"),
    "mapped twice": ("a.csv", "q,a\n", ("question=a", "question=b"), "'question' is given twice"),
    "one column twice": ("a.csv", "q,a\n", ("answers=a", "answers=a"), "'answers' is given twice"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare_verb, case: str) -> None:
    name, content, mapping, said = BAD_FILES[case]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    status, out, err = prepare_verb("--out", "out", "--train", name, *(w for m in mapping for w in ("--column", m)))
    assert (status, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
