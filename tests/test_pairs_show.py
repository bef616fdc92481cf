"""``search-e1 pairs show``: a pair in 80 columns, and what is said about a place that holds none."""

from pathlib import Path

import pytest

from search_e1.selfdistill import files
from search_e1.text.prompts import observation
from search_e1.types import Pair, Passage, Question, Turn
from test_cli import project, run  # noqa: F401
from test_pairs import MALFORMED, QUESTION, answer, search, trajectory
from test_prompts import TOKENIZER


def found(query: str, *titles: str) -> Turn:
    """A search, with a thought before it, that brought passages of these titles."""
    text, ids = observation(TOKENIZER, [Passage(id=t, title=t, text="Text of it.") for t in titles], 500)
    thought = f"<think>I need {query}</think>\n<search>{query}</search>"
    return search(query).model_copy(update={"action_text": thought, "observation_text": text, "observation_ids": ids})


REFERENCE = trajectory(found("mayor Bel", "Bel", "Bel (river)"), answer("Cor Dun"))
STUDENT = trajectory(found("land Arda", "Arda"), MALFORMED, found("mayor Bel", "Bel", "Bel (river)"), answer("Gil Hor"))
PAIR = Pair(question=QUESTION, reference=REFERENCE, student=STUDENT)
SIDE_BY_SIDE = """\
pair 1 of 2 in pairs-2, to distill on
question    Who is the mayor of Bel?
answers     Cor Dun
id          q
divergence  0.75
teacher     sees the whole reference

reference: right                         student: wrong
1 search, 6 tokens                       2 searches, 11 tokens
--------------------------------------   ---------------------------------------
                                       > think  I need land Arda
                                         search land Arda
                                         found  Arda

                                       > think  hm
                                         -      (neither a search nor an answer)

think  I need mayor Bel                  think  I need mayor Bel
search mayor Bel                         search mayor Bel
found  Bel                               found  Bel
       Bel (river)                              Bel (river)

answer Cor Dun                         | answer Gil Hor
"""


def write(directory: Path, train: list[Pair], held_out: list[Pair]) -> Path:
    directory.mkdir(parents=True)
    for name, pairs in (("train", train), ("held_out", held_out)):
        (directory / f"{name}.jsonl").write_text("".join(pair.model_dump_json() + "\n" for pair in pairs))
    return directory


@pytest.fixture
def pairs(tmp_path) -> Path:
    """The newest pairs of a run in ``tmp_path``."""
    hostile = Question(id="bad\x1b[2J", text="Who \x1b[31mis\x1b[0m it?\r\nErase\b\b [bold]", answers=("\x9b2J",))
    terror = search("a\x1b]0;title\x07b").model_copy(update={"action_text": "\x1b[2J<search>a</search>"})
    other = Pair(
        question=hostile,
        reference=REFERENCE.model_copy(update={"question_id": hostile.id}),
        student=trajectory(terror, answer("\x1b[41mGil"), question=hostile.id),
        reference_shown="<answer>Cor\x1b[0m Dun</answer>",
    )
    write(tmp_path / "pairs-1", [], [])
    return write(tmp_path / "pairs-2", [PAIR], [other])


def show(monkeypatch, capsys, *words: object) -> tuple[int, str, str]:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run(monkeypatch, capsys, "pairs", "show", *words)
    return status, "\n".join(line.rstrip() for line in out.splitlines()) + "\n", err


def test_a_pair_side_by_side_fits_80_columns(pairs, monkeypatch, capsys):
    status, out, _ = show(monkeypatch, capsys, pairs.parent)  # a run: its newest pairs
    assert status == 0
    assert out.rstrip() == SIDE_BY_SIDE.rstrip()
    assert show(monkeypatch, capsys, pairs, "--number", 1)[1] == out
    assert show(monkeypatch, capsys, pairs, "--question", "q")[1] == out


def test_what_texts_hold_never_steers_the_terminal(pairs, monkeypatch, capsys):
    status, out, _ = show(monkeypatch, capsys, pairs, "--number", 2)
    assert status == 0
    assert not [c for c in out if c < " " and c != "\n"]
    assert "\x9b" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert "pair 2 of 2 in pairs-2, held out" in out
    assert "[bold]" in out
    assert "sees only <answer>Cor\N{REPLACEMENT CHARACTER}[0m Dun</answer>" in out


@pytest.mark.parametrize(
    ("update", "said"),
    [
        ({"reference_shown": ""}, "teacher     sees nothing of the reference"),
        (
            {"reference_shown": REFERENCE.text[: len(REFERENCE.text) // 2], "shortened": True},
            "teacher     sees 50% of the reference: passages were cut so that it fits",
        ),
    ],
)
def test_what_the_teacher_sees_is_told(tmp_path, monkeypatch, capsys, update, said):
    place = write(tmp_path / "mined", [PAIR.model_copy(update=update)], [])
    assert said in show(monkeypatch, capsys, place)[1].splitlines()


MISTAKES = {
    "number too large": (["--number", 3], "pairs-2: no pair 3; give a --number from 1 to 2"),
    "number zero": (["--number", 0], "pairs-2: no pair 0; give a --number from 1 to 2"),
    "no such question": (
        ["--question", "x"],
        "pairs-2: no pair of question 'x'; its 2 questions are 'q', 'bad\\x1b[2J'",
    ),
    "both": (["--number", 1, "--question", "q"], "give --question or --number, not both"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(pairs, monkeypatch, capsys, mistake):
    words, said = MISTAKES[mistake]
    status, _, err = show(monkeypatch, capsys, pairs, *words)
    assert status == 2
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_text_may_hold_any_separator(tmp_path):
    odd = Question(id="q", text="Who\u2028is\x85it?", answers=("Cor Dun",))
    place = write(tmp_path / "mined", [PAIR.model_copy(update={"question": odd})], [])
    (read,) = files.read(place / files.TRAIN)
    assert read.question == odd


def test_a_place_without_pairs_is_named(pairs, monkeypatch, capsys):
    run_directory = pairs.parent
    assert "pairs-1: no pairs in it" in show(monkeypatch, capsys, run_directory / "pairs-1")[2]
    assert "neither a run with pairs nor a directory of pairs" in show(monkeypatch, capsys, run_directory / "nothing")[2]
    (pairs / "train.jsonl").write_text("{}\n")
    status, _, err = show(monkeypatch, capsys, pairs)
    assert (status, err) == (
        2,
        f"search-e1: {pairs}/train.jsonl:1: not a pair; make the pairs with `search-e1 pairs`\n",
    )


@pytest.mark.parametrize("words", [["pairs"], ["pairs", "mine"]])
def test_mining_needs_no_verb(project, monkeypatch, capsys, words):  # noqa: F811
    status, _, err = run(monkeypatch, capsys, *words, "--config", project / "config.toml", "--pairs.students", 2)
    assert status == 2
    assert "grpo-1: does not exist yet" in err or "pool-1: does not exist yet" in err
    assert "unexpected" not in err


def test_help_names_both_verbs(monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "pairs", "--help")
    assert status == 0
    assert "mine" in out
    assert "show" in out
