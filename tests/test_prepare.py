"""What `data prepare` makes of questions that were read: duplicates, leaks, subsets, and what it writes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from search_e1 import runs
from search_e1.data import prepare
from search_e1.data.prepare import Request, question_key, unique_answers
from search_e1.data.user_files import Columns
from search_e1.errors import ConfigError, DataError, RunError


def jsonl(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(question: str, *answers: str, **more: object) -> dict[str, Any]:
    return {"question": question, "answers": list(answers or ("x",)), **more}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prepared(**request: Any) -> prepare.Prepared:
    return prepare.prepare(Request(**request))


def texts(part: prepare.Part) -> list[str]:
    return [row.question.text for row in part.rows]


# Duplicates, leaks, subsets


def test_what_counts_as_the_same() -> None:
    assert question_key("Who’s the  King of “Arda”?") == question_key("whos king of arda") == "whos king of arda"
    assert question_key("Ｗo liegt STRAßE?") == "wo liegt strasse"
    assert question_key("???") == "???"
    assert unique_answers(["The Bel", "bel.", "Bel City", "BEL", "A", "a"]) == ("The Bel", "Bel City", "A", "a")


def test_duplicates_are_counted_dropped_or_refused(tmp_path: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", row("Who?", "Ann", id=1), row("The who", "Bob", id=2), row("Where?", id=3))
    b = jsonl(tmp_path / "b.jsonl", row("where", id=4), row("When?", id=5))
    keep, drop = (prepared(train=(str(a), str(b)), duplicates=how) for how in ("keep", "drop"))
    assert [part.repeated for part in keep.parts] == [part.repeated for part in drop.parts]
    assert [part.repeated for part in drop.parts] == [
        ((f"{a}:2", f"{a}:1", "The who"),),
        ((f"{b}:1", f"{a}:3", "where"),),
    ]
    assert [len(part.rows) for part in keep.parts] == [3, 2]
    assert [texts(part) for part in drop.parts] == [["Who?", "Where?"], ["When?"]]
    with pytest.raises(DataError, match=r"a.jsonl:2: 'The who' was already asked at .*a.jsonl:1; --duplicates drop"):
        prepared(train=(str(a),), duplicates="refuse")
    # Evaluation files are judged one by one.
    assert [len(part.repeated) for part in prepared(eval=(str(a), str(b))).parts] == [1, 0]


def test_an_id_that_comes_twice_is_refused_unless_it_is_the_same_question(tmp_path: Path) -> None:
    same = jsonl(tmp_path / "same.jsonl", row("Who?", id="q"), row("who", id="q"))
    other = jsonl(tmp_path / "other.jsonl", row("Who?", id="q"), row("Where?", id="q"))
    assert texts(prepared(train=(str(same),), duplicates="drop").parts[0]) == ["Who?"]
    with pytest.raises(DataError, match=r"same.jsonl:2: id 'q' was used at .*same.jsonl:1; --duplicates drop keeps"):
        prepared(train=(str(same),))
    for how in ("keep", "drop"):
        with pytest.raises(DataError, match=r"other.jsonl:2: id 'q' was used at .*; --column id= makes ids"):
            prepared(train=(str(other),), duplicates=how)
    assert len(prepared(train=(str(other),), columns=Columns.parse(["id="])).parts[0].rows) == 2


def test_leaks_are_found_by_normalised_question_and_dropped_when_told(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "t.jsonl", row("Who is the king?"), row("Where?"), row("When?"))
    one = jsonl(tmp_path / "one.jsonl", row("Who is king"), row("What?"))
    two = jsonl(tmp_path / "two.jsonl", row("WHERE"), row("who is the king"))
    sources = {"train": (str(train),), "eval": (str(one), str(two))}
    found = prepared(**sources)
    assert [(leak.train, leak.eval, leak.count) for leak in found.leaks] == [
        ("t.train.jsonl", "one.test.jsonl", 1),
        ("t.train.jsonl", "two.test.jsonl", 2),
    ]
    assert found.leaks[0].examples == ((f"{train}:1", f"{one}:1", "Who is the king?"),)
    assert (found.parts[0].leaked, len(found.parts[0].rows)) == (2, 3)
    dropped = prepared(**sources, drop_leaks=True, max_eval=1)
    assert texts(dropped.parts[0]) == ["When?"]
    assert [len(part.rows) for part in dropped.parts] == [1, 1, 1]
    with pytest.raises(DataError, match=r"nothing is left for one.train.jsonl \(0 repeated, 2 leaked\)"):
        prepared(train=(str(one),), eval=(f"same={one}",), drop_leaks=True)


def test_a_subset_does_not_depend_on_the_order(tmp_path: Path) -> None:
    rows = [row(f"What is {i}?", id=i) for i in range(50)]
    one, two = jsonl(tmp_path / "a.jsonl", *rows), jsonl(tmp_path / "b.jsonl", *rows[::-1])
    chosen = [texts(prepared(train=(str(p),), max_train=10, seed=1).parts[0]) for p in (one, two)]
    assert chosen[0] == chosen[1][::-1]
    assert len(chosen[0]) == 10
    assert set(texts(prepared(train=(str(one),), max_train=9, seed=1).parts[0])) < set(chosen[0])
    assert texts(prepared(train=(str(one),), max_train=10, seed=2).parts[0]) != chosen[0]
    expected = sorted(range(50), key=lambda i: hashlib.sha256(f"1/what is {i}".encode()).hexdigest())[:10]
    assert chosen[0] == [f"What is {i}?" for i in sorted(expected)]


def test_a_share_is_set_aside_and_no_question_is_on_both_sides(tmp_path: Path) -> None:
    rows = [row(f"{the}What is {i // 2}?", id=i) for i in range(40) for the in ("The " * (i % 2),)]
    mine = jsonl(tmp_path / "mine.jsonl", *rows)
    train, dev = prepared(train=(str(mine),), dev_share=0.25).parts
    assert (train.file, dev.file, dev.role) == ("mine.train.jsonl", "mine.dev.jsonl", "eval")
    assert (len(train.rows), len(dev.rows)) == (30, 10)
    assert not {question_key(t) for t in texts(train)} & {question_key(t) for t in texts(dev)}
    with pytest.raises(DataError, match="2 questions cannot be split with --dev-share"):
        prepared(train=(str(jsonl(tmp_path / "few.jsonl", *rows[:2])),), dev_share=0.1)
    with pytest.raises(ConfigError, match="--dev-share splits users' own training files"):
        prepared(eval=(str(mine),), dev_share=0.1)


def test_a_share_set_aside_does_not_overwrite_an_evaluation_file(tmp_path: Path) -> None:
    mine = jsonl(tmp_path / "nq.jsonl", *(row(f"What is {i}?", id=i) for i in range(10)))
    jsonl(tmp_path / "nq.dev.jsonl", {"id": "1", "question": "Who?", "golden_answers": ["x"]})
    with pytest.raises(ConfigError, match=r"nq\.dev\.jsonl would be written twice"):
        prepared(train=(str(mine),), eval=("nq:dev",), dev_share=0.2, directory=tmp_path)


# Writing


def test_nothing_is_overwritten_without_being_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare_verb) -> None:
    mine, out = jsonl(tmp_path / "mine.jsonl", row("Who?"), row("Where?")), tmp_path / "out"
    assert prepare_verb("--out", out, "--train", mine)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    status, _, err = prepare_verb("--out", out, "--train", mine, "--max", 1)
    assert (status, err) == (2, f"search-e1: {out} exists; --overwrite replaces it, or give another --out\n")
    jsonl(mine, row("Who?"), "{broken")
    assert prepare_verb("--out", out, "--train", mine, "--overwrite")[0] == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    jsonl(mine, row("What?"))
    assert prepare_verb("--out", out, "--train", mine, "--overwrite")[0] == 0
    assert [r["question"] for r in read(out / "mine.train.jsonl")] == ["What?"]
    monkeypatch.chdir(out)
    assert prepare_verb("--out", ".", "--train", mine, "--overwrite")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jsonl", "out"]


def test_what_is_no_prepared_data_is_never_overwritten(tmp_path: Path) -> None:
    mine = jsonl(tmp_path / "data" / "mine.jsonl", row("Who?"))
    made = prepared(train=(str(mine),))
    for place in (tmp_path / "data", mine):
        with pytest.raises(RunError, match="holds something other than prepared questions"):
            prepare.write(made, Request(), place, overwrite=True)
    with pytest.raises(RunError, match="cannot be written"):
        prepare.write(made, Request(), mine / "out")
    assert read(mine) == [row("Who?")]


def test_writing_that_is_cut_short_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepared(train=(str(jsonl(tmp_path / "mine.jsonl", row("Who?"), row("Where?"))),))
    out = tmp_path / "out"
    prepare.write(made, Request(), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "to_record", lambda question: {}[question.id])
        with pytest.raises(KeyError):
            prepare.write(made, Request(seed=1), out, overwrite=True)
        with pytest.raises(KeyError):
            prepare.write(made, Request(), tmp_path / "new")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not (tmp_path / "new").exists()
    prepare.write(made, Request(seed=1), out, overwrite=True)
    assert runs.read(out).manifest.seed == 1


MISTAKES = {
    "unknown benchmark": (["--eval", "hotpott"], "unknown benchmark 'hotpott'; did you mean 'hotpotqa'?"),
    "unknown split": (["--eval", "nq:tset"], "has no nq/tset.jsonl; for nq it has train, dev, test"),
    "no train split": (
        ["--train", "bamboogle"],
        "no train split of bamboogle; it has test: write --train bamboogle:test",
    ),
    "no such directory": (["--eval", "nq", "--from", "nowhere"], "--from nowhere: no such directory"),
    "a share of all": (["--dev-share", "1"], "--dev-share 1.0: give a share between 0 and 1"),
    "a name that is none": (["--eval", "a.b=mine.jsonl"], "'a.b' cannot be a name; use letters, digits, - and _"),
    "an empty separator": (["--eval", "mine.jsonl", "--separator", ""], "--separator is empty"),
    "twice the same": (["--eval", "mine.jsonl", "--eval", "mine.jsonl"], "mine.test.jsonl would be written twice"),
    "an empty directory": (["--from", "."], "no train split of nq; it has none"),
    "all of nothing": (["--eval", "all", "--from", "."], "no benchmark has 'all'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare_verb, case: str) -> None:
    flags, said = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "mine.jsonl", row("Who?"))
    status, out, err = prepare_verb("--out", "out", *flags)
    assert (status, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_kind_is_no_benchmark(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^faq\.docx: unknown kind of file; known: \.jsonl, "):
        prepared(train=("faq.docx",))
