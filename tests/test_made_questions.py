"""Questions made from passages by the verb: by rules, from an endpoint, from a policy; their review; and what can go wrong."""

import csv
import json
import random
import re
from pathlib import Path

import pytest
from tenacity import wait_none
from typer.testing import CliRunner

from search_e1.cli.main import app
from search_e1.data.questions import load_questions
from search_e1.errors import ConfigError, DataError, EndpointError, RunError
from search_e1.questions import make, review
from search_e1.questions.completions import journal
from search_e1.questions.draft import Draft
from search_e1.questions.opening import By
from search_e1.rollout.demonstrations import passages as demonstrations
from search_e1.types import Passage
from serving import misbehaving
from test_endpoint import completion

FILM = Passage(
    id="f", title="Red Dust", text="Red Dust is a 1932 American film directed by Ann Moss. It was released in 1932 in cinemas."
)
ANN = Passage(id="a", title="Ann Moss", text="Ann Moss (born 3 May 1901) is an American director. She worked for many years.")
TOWN = Passage(
    id="t", title="Belden", text="Belden is a town in Ohio. It has a population of 4,120 people. It was founded in 1811."
)
MANUAL = Passage(
    id="m",
    title="Model X100",
    text="- Version: 2.3\nWeight: 2 kg\nNote: see below for more about this and that and the other and so on\n\n"
    "| part | number |\n|---|---|\n| Filter | F-7 |\n| Pump | P-9 |",
    metadata={"file": "x100.md", "heading": "Specifications"},
)
WORLD = [FILM, ANN, TOWN, MANUAL]


def draft(text: str, *answers: str, passages=(TOWN,), queries=None) -> Draft:
    return Draft(text=text, answers=answers, passages=passages, queries=queries or (text,) * len(passages), made_by="test")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty films, and their directors, in documents of one passage."""
    rng = random.Random(0)
    names = [f"{a} {b}" for a in ("Ann", "Bo", "Cor", "Dee", "Eli") for b in ("Moss", "Lund", "Reyes", "Stone", "Quint")]
    lines = []
    for i, name in enumerate(names):
        lines.append(
            dict(id=f"p{i}", title=name, text=f"{name} (born 3 May {1900 + i}) is a director of many well known films.")
        )
        for j in range(2):
            film = f"{rng.choice(['Red', 'Blue', 'Old'])} {rng.choice(['Dust', 'River', 'Gate'])} {i}{'AB'[j]}"
            lines.append(
                dict(id=f"f{i}{j}", title=film, text=f"{film} is a film directed by {name}. It was released in {1940 + i}.")
            )
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*arguments: object) -> str:
    """What ``data questions`` prints; an error is raised."""
    result = CliRunner().invoke(app, ["data", "questions", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_rules_make_both_splits_which_prepare_reads_and_a_cold_start_learns_from(corpus: Path, tmp_path: Path):
    out = tmp_path / "questions"
    printed = run("--corpus", corpus, "--by", "rule", "--number", 30, "--out", out)
    assert re.search(r"kept +\d+ +\d+ +30", printed)
    train, held_out = load_questions(out / "train.jsonl"), load_questions(out / "eval.jsonl")
    assert (len(train), len(held_out)) == (24, 6)
    used = [{title for q in questions for title in q.metadata["supporting_titles"]} for questions in (train, held_out)]
    assert not used[0] & used[1]
    assert {q.metadata["made_by"] for q in train} == {"rule"}
    two = [q for q in train if q.hops == 2]
    assert two
    assert all(re.fullmatch(r"In what year was the director of .* born\?", q.text) for q in two)
    passages = {p["id"]: Passage(**p) for p in map(json.loads, corpus.read_text().splitlines())}
    for plan in demonstrations.plans(two, passages):
        assert [len(hop.passages) for hop in plan.hops] == [1, 1]
        assert plan.hops[0].name in plan.question.text
    prepared = CliRunner().invoke(
        app,
        [
            "data",
            "prepare",
            "--train",
            f"{out / 'train.jsonl'}",
            "--eval",
            f"made={out / 'eval.jsonl'}",
            "--out",
            f"{tmp_path / 'p'}",
        ],
    )
    assert prepared.exit_code == 0, prepared.output
    assert len(load_questions(tmp_path / "p" / "made.test.jsonl")) == 6


def test_the_same_seed_makes_the_same_questions(corpus: Path, tmp_path: Path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run("--corpus", corpus, "--by", "rule", "--number", 20, "--seed", seed, "--out", tmp_path / name)
    a, b, c = ((tmp_path / name / "train.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_fewer_questions_than_asked_for_are_said(corpus: Path, tmp_path: Path):
    printed = run("--corpus", corpus, "--by", "rule", "--number", 5000, "--out", tmp_path / "out")
    assert re.search(r"train: \d+ of 4000 questions requested; \d+ passages and \d+ linked pairs yielded no more", printed)


def answering(request: dict, number: int):
    """A stand-in for a model that knows how to write, to read, and nothing by heart but who directs 0A."""
    text = request["messages"][0]["content"]
    passages = re.findall(r"Passage(?: \d)? \((.*?)\):\n(.*)", text)
    question = re.search(r"^Question: (.*)$", text, re.MULTILINE)
    if question and question[1] != "...":
        director = re.search(r"Who directed (.*)\?", question[1])
        reply = "unknown"
        if passages:
            found = re.search(r"directed by (.*?)\.|born 3 May (\d+)", passages[-1][1])
            reply = (found[1] or found[2]) if found else "unknown"
        elif director and director[1].endswith(" 0A"):
            reply = "It is Ann Moss, I think"
    elif len(passages) == 2:
        (film, _), (name, told) = passages
        year = re.search(r"\d{4}", told)
        reply = f"Question: When was the maker of {film} born?\nFirst: Who directed {film}?\nSecond: When was {name} born?\n"
        reply += f"Answer: {year[0]}"
    elif "directed" in passages[0][1]:
        reply = f"Question: Who directed {passages[0][0]}?\nAnswer: {re.search('by (.*?)[.]', passages[0][1])[1]}"
    else:
        reply = "Question: When was the person in this passage born?\nAnswer: 1900"
    status, body = completion(reply)
    told = json.loads(body) | {"usage": {"prompt_tokens": 11, "completion_tokens": 5}}
    return status, json.dumps(told).encode()


def test_an_endpoint_writes_and_checks_its_own_questions(corpus: Path, tmp_path: Path):
    out = tmp_path / "out"
    with misbehaving(answering) as server:
        printed = run(
            "--corpus", corpus, "--endpoint", server.url, "--model", "m", "--number", 60, "--per-passage", 1, "--out", out
        )
    made = load_questions(out / "train.jsonl") + load_questions(out / "eval.jsonl")
    assert {q.metadata["made_by"] for q in made} == {"endpoint m"}
    assert {q.hops for q in made} == {1, 2}
    assert all(q.text.startswith("Who directed") for q in made if q.hops == 1)
    assert not any(q.text.endswith(" 0A?") for q in made if q.hops == 1)
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert {"well-formed", "not known without them"} <= {line["dropped_by"] for line in dropped}
    assert {line["reason"] for line in dropped if line["dropped_by"] == "well-formed"} == {"refers to a passage"}
    requests = len(server.requests)
    assert f"{requests} requests, {11 * requests:,} prompt and {5 * requests:,} completion tokens" in printed
    assert not journal(out).exists()


def test_an_interrupted_call_pays_for_no_reply_twice(corpus: Path, tmp_path: Path):
    out = tmp_path / "out"
    arguments = ("--corpus", corpus, "--model", "m", "--number", 12, "--per-passage", 1, "--concurrency", 1, "--out", out)

    def failing(request: dict, number: int):
        return answering(request, number) if number < 20 else (401, b"no credit")

    with misbehaving(failing) as server:
        url = server.url
        with pytest.raises(EndpointError, match="status 401"):
            run(*arguments, "--endpoint", url)
    assert not out.exists()
    assert len(journal(out).read_text().splitlines()) == 21
    with misbehaving(answering) as server:
        printed = run(*arguments, "--endpoint", server.url)
        rest = len(server.requests)
    assert "20 replies reused from an interrupted call" in printed
    with misbehaving(answering) as server:
        run(*arguments[:-1], tmp_path / "whole", "--endpoint", server.url)
    assert len(server.requests) == rest + 20
    assert (tmp_path / "whole" / "train.jsonl").read_bytes() == (out / "train.jsonl").read_bytes()


def test_an_endpoint_that_never_writes_a_question_ends_the_call(corpus: Path, tmp_path: Path):
    with misbehaving(lambda request, number: completion("As a language model,\nI like passages.")) as server:
        with pytest.raises(
            EndpointError, match=r"endpoint m: none of \d+ replies holds a usable question; one of them: 'As a lan"
        ):
            run("--corpus", corpus, "--endpoint", server.url, "--model", "m", "--out", tmp_path / "out")
        assert len(server.requests) < 80
    assert not (tmp_path / "out").exists()
    assert not journal(tmp_path / "out").exists()


def test_an_endpoint_that_is_down_is_said(corpus: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("search_e1.runs.http._wait_seconds", wait_none())
    with pytest.raises(EndpointError, match=r"no answer after 4 attempts.*is the server running"):
        run("--corpus", corpus, "--endpoint", "http://127.0.0.1:9", "--model", "m", "--out", tmp_path / "out")


def test_a_policy_writes_on_this_machine(tiny_policy, tmp_path: Path):
    """Its weights are random, so that what it writes is no question; that it was asked is all that can be seen."""
    tiny_policy.save(tmp_path / "policy")
    by = By(tmp_path / "out", None, None, str(tmp_path / "policy"), 0.7, 8, 1, 1.0, 1, 0)
    told: list[str] = []
    with by.open([], told.append) as writer:
        first = writer.completer.complete(["abc", "abd"], temperature=1.0, purpose="x", tell=told.append)
    with by.open([], told.append) as writer:
        again = writer.completer.complete(["abd", "abc"], temperature=1.0, purpose="x", tell=told.append)
        assert (writer.completer.costs.reused, writer.completer.costs.requests) == (2, 0)
    assert first == again[::-1]
    assert told[-1] == "x 2/2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--by", "rule"), "no passages; give --corpus"),
        (("--corpus", "CORPUS"), "nothing to write the questions with"),
        (("--corpus", "CORPUS", "--by", "rule", "--policy", "x"), "give one of"),
        (("--corpus", "CORPUS", "--endpoint", "http://x"), "--endpoint and --model belong together"),
        (("--corpus", "CORPUS", "--by", "rule", "--eval-share", "1"), "leaves no training questions"),
        (("--review", "r.csv", "--by", "rule"), "--review goes with --out alone"),
        (("--corpus", "EMPTY", "--by", "rule"), "no passages in it"),
        (("--corpus", "PLAIN", "--by", "rule"), "no question was written from 2 passages: no rule finds a fact"),
    ],
)
def test_a_mistake_is_one_line(corpus: Path, tmp_path: Path, arguments: tuple[str, ...], message: str):
    (tmp_path / "empty.jsonl").write_text("")
    plain = [dict(id=i, title="", text=f"nothing much is said here of anything at all {i}") for i in "ab"]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(line) + "\n" for line in plain))
    places = {"CORPUS": corpus, "EMPTY": tmp_path / "empty.jsonl", "PLAIN": tmp_path / "plain.jsonl"}
    with pytest.raises((ConfigError, DataError), match=re.escape(message)):
        run(*(places.get(a, a) for a in arguments), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_replaced(corpus: Path, tmp_path: Path):
    with pytest.raises(RunError, match="exists; give another --out"):
        run("--corpus", corpus, "--by", "rule", "--out", tmp_path)


def test_that_nothing_survives_is_said_with_an_example(tmp_path: Path):
    class Blind:
        def search(self, queries, topk):
            return [[] for _ in queries]

    by = By(tmp_path / "out", None, None, None, 0.0, None, 1, 1.0, 2, 0)
    request = make.Request(("c",), number=4, eval_share=0.2)
    films = [
        FILM.model_copy(update={"id": f"f{i}", "title": f"Red Dust {i}", "text": FILM.text.replace("Dust", f"Dust {i}")})
        for i in range(4)
    ]
    with pytest.raises(
        DataError, match=r"no question survives of \d+ written; \d+ were dropped by 'found within 10', e.g. '.*Red Dust"
    ):
        make.make_questions(request, films, tmp_path / "out", by.open, checksum="x", settings={}, retriever=Blind())


# Review


def edited(out: Path, change) -> Path:
    with (out / review.FILE).open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    rows = change(rows)
    with (out / review.FILE).open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, review.COLUMNS, delimiter=";")  # as a spreadsheet in many countries writes it
        table.writeheader()
        table.writerows(rows)
    return out / review.FILE


@pytest.fixture
def made(corpus: Path, tmp_path: Path) -> Path:
    run("--corpus", corpus, "--by", "rule", "--number", 10, "--out", tmp_path / "made")
    return tmp_path / "made"


def test_a_review_accepts_edits_and_drops(made: Path, tmp_path: Path):
    assert (made / review.FILE).read_bytes().startswith(b"\xef\xbb\xbfkeep?,question,")

    def change(rows):
        rows[0]["keep?"] = "no"
        rows[1]["question"], rows[1]["answers"] = "Who made it then?", "Ann Moss | A. Moss"
        return rows[:-1]  # a row that is removed is dropped

    printed = run("--review", edited(made, change), "--out", tmp_path / "reviewed")
    assert "7 accepted, 1 edited, 2 dropped" in printed
    before, after = (load_questions(place / "train.jsonl") for place in (made, tmp_path / "reviewed"))
    assert [q.id for q in after] == [q.id for q in before[1:]]
    assert (after[0].text, after[0].answers) == ("Who made it then?", ("Ann Moss", "A. Moss"))
    assert [q.metadata["review"] for q in after[:2]] == ["edited", "accepted"]
    assert after[1].metadata["gold_passage_ids"] == before[2].metadata["gold_passage_ids"]
    assert len(load_questions(tmp_path / "reviewed" / "eval.jsonl")) == 1


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("keep?", "perhaps", "keep? = 'perhaps'; write yes or no"),
        ("question", " ", "an empty question"),
        ("answers", "|", "an empty answer"),
        ("id", "made-0", "no question has the id 'made-0'"),
    ],
)
def test_a_row_that_cannot_be_understood_is_named(made: Path, tmp_path: Path, column: str, value: str, message: str):
    def change(rows):
        rows[0][column] = value
        return rows

    with pytest.raises(DataError, match=rf"review.csv:2: .*{re.escape(message)}"):
        run("--review", edited(made, change), "--out", tmp_path / "reviewed")


def test_no_cell_is_a_formula(tmp_path: Path):
    evil = draft("=HYPERLINK(1) is what town here?", "-4,120")
    review.write(tmp_path / review.FILE, {"train": [evil]}, ["a"])
    with (tmp_path / review.FILE).open(encoding="utf-8-sig", newline="") as file:
        [row] = csv.DictReader(file)
    assert (row["question"], row["answers"]) == ("'=HYPERLINK(1) is what town here?", "'-4,120")
    (tmp_path / "train.jsonl").write_text(
        json.dumps(dict(id=evil.id, question=evil.text, golden_answers=list(evil.answers))) + "\n"
    )
    [kept] = review.apply(tmp_path / review.FILE, tmp_path / "out").questions["train"]
    assert (kept.text, kept.answers, kept.metadata["review"]) == (evil.text, evil.answers, "accepted")
