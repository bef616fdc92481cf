"""Demonstrations as references: read in words, made of the policy's own ids, refused where they teach nothing right."""

import json

import pytest

from made_pairs import make_pair
from search_e1.config import PairsConfig
from search_e1.errors import DataError
from search_e1.rollout.demonstrations.file import Demonstrations
from search_e1.selfdistill.pairs import select
from search_e1.text.prompts import plain_prompt
from search_e1.text.reference import RenderedReference
from search_e1.types import ActionKind, Group, Question

QUESTION = Question(id="q1", text="Mayor of Bel?", answers=("Cor Dun",))
OTHER = Question(id="q2", text="Mayor of Fen?", answers=("Gil Hor",))
SEARCH = "<think>who</think><search>mayor Bel</search>"
SEEN = "\n\n<information>\nDoc 1(Title: Bel) Bel is a city with mayor Cor Dun.\n</information>\n\n"
ANSWER = "<think>so</think><answer>Cor Dun</answer>"


@pytest.fixture
def written(tmp_path):
    def write(*rows):
        path = tmp_path / "demonstrations.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.mark.parametrize(
    "row",
    [
        {"text": SEARCH + SEEN + ANSWER},
        {"text": SEARCH + SEEN.strip() + "\n" + ANSWER + "\n"},  # blank lines are the environment's
        {"turns": [{"action_text": SEARCH, "observation_text": SEEN}, {"action_text": ANSWER}]},
    ],
)
def test_words_become_a_trajectory_as_a_rollout_would_leave_it(tiny_policy, written, row):
    tokenizer, prompts = tiny_policy.tokenizer, tiny_policy.prompts
    demonstrations = Demonstrations(written({"id": "q1", **row}), tokenizer, prompts)
    demonstrations.check([QUESTION, OTHER])
    [made] = demonstrations(QUESTION)
    assert [(t.kind, t.argument, t.action_text, t.observation_text) for t in made.turns] == [
        (ActionKind.SEARCH, "mayor Bel", SEARCH, SEEN),
        (ActionKind.ANSWER, "Cor Dun", ANSWER, ""),
    ]
    assert made.prompt_ids == plain_prompt(tokenizer, prompts, QUESTION.text)
    parts = [tokenizer.encode(text) for text in (SEARCH, SEEN, ANSWER)]
    assert made.response_ids == tuple(i for part in parts for i in part)
    assert made.action_mask == (1,) * len(parts[0]) + (0,) * len(parts[1]) + (1,) * len(parts[2])
    assert (made.answer, made.reward, made.searches, made.correct) == ("Cor Dun", 1.0, 1, True)
    assert demonstrations(OTHER) == []


def test_what_came_back_cannot_open_a_tag(tiny_policy, written):
    hostile = SEEN.replace("Cor Dun", "<search>x")
    path = written({"id": "q1", "text": SEARCH + hostile + ANSWER})
    [made] = Demonstrations(path, tiny_policy.tokenizer, tiny_policy.prompts)(QUESTION)
    assert "mayor (search)x." in made.turns[0].observation_text


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"id": "q1"}, "not a demonstration; each line holds"),
        ({"id": "q1", "text": 3}, "not a demonstration"),
        ({"id": "q1", "turns": [{"action": ANSWER}]}, "not a demonstration"),
        ({"id": "q1", "text": ANSWER, "turns": []}, "not a demonstration"),
        ({"id": ["q1"], "text": ANSWER}, "not a demonstration"),
        ({"id": "q1", "text": SEARCH}, "turn 1 is not an answer in the protocol's form"),
        ({"id": "q1", "text": "who?" + SEEN + ANSWER}, "turn 1 is not a search"),
        ({"id": "q1", "turns": [{"action_text": SEARCH}, {"action_text": ANSWER}]}, "nothing was found in turn 1"),
        ({"id": "q1", "text": ANSWER + SEEN}, "turn 1 is not a search"),
        ({"id": "q1", "turns": [{"action_text": ANSWER, "observation_text": SEEN}]}, "something follows the answer"),
        ({"id": "q1", "text": "<answer>Fen</answer>"}, r"answers 'Fen', and question 'q1' has \['Cor Dun'\]"),
        ({"id": "q9", "text": ANSWER}, "no demonstration of any training question; give a file whose ids match"),
    ],
)
def test_what_is_no_demonstration_is_one_line_that_names_the_place(tiny_policy, written, row, says):
    path = written(row)
    with pytest.raises(DataError, match=says) as refusal:
        Demonstrations(path, tiny_policy.tokenizer, tiny_policy.prompts).check([QUESTION])
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_text_is_for_tags_alone(tiny_policy, written, monkeypatch):
    monkeypatch.setattr("search_e1.rollout.demonstrations.file.protocol_of", lambda *_: None)
    tools = tiny_policy.prompts.model_copy(update={"protocol": "tools"})
    with pytest.raises(DataError, match=r'"text" is for prompts.protocol = "tags"; give "turns" instead'):
        Demonstrations(written({"id": "q1", "text": ANSWER}), tiny_policy.tokenizer, tools)


def test_demonstrations_are_the_references_and_questions_without_one_are_counted(tiny_policy, written):
    """Also where no trajectory of the pool is right; one that is may still be a student."""
    path = written({"id": "q1", "text": ANSWER}, {"id": "q1", "text": SEARCH + SEEN + ANSWER})
    gold = Demonstrations(path, tiny_policy.tokenizer, tiny_policy.prompts)
    first, second = make_pair(tiny_policy, QUESTION), make_pair(tiny_policy, OTHER)
    groups = [
        Group(question=QUESTION, trajectories=(first.student,)),
        Group(question=OTHER, trajectories=(second.student,)),
    ]
    pairs, health = select(
        groups,
        PairsConfig(references_by="gold"),
        lambda q, reference, s: RenderedReference(reference.text, (1,)),
        gold=gold,
    )
    assert [(p.reference.text, p.student) for p in pairs] == [(ANSWER, first.student)]  # the file's first
    assert (health.questions, health.usable, health.no_demonstration, health.never_correct) == (2, 1, 1, 0)
