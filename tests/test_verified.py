"""Teachers that follow their reference: which pairs are left, and what happens where none is."""

import json

import pytest

from conftest import PASSAGES, TinyRetriever
from search_e1.errors import NoLeadError
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import starts
from search_e1.training.policy import Policy
from search_e1.types import Pair, Question
from stages_run import run_distill
from taught import LIMITS, QUESTIONS, scripted, teach

TEXT = QUESTIONS[0].text
RIGHT, DIRECT, WRONG = (Question(id=id, text=TEXT, answers=("?",)) for id in ("right", "direct", "wrong"))
SEARCH, ANSWER = "<search>Arda</search>", "<answer>Bel</answer>"


def pairs(policy: Policy) -> list[Pair]:
    """Three questions in the same words, whose teacher sees no more than they: it searches, and answers what it answers.

    For `right` it is right after as many searches as the reference, for `direct` the reference took one fewer, and to `wrong`
    the answer is another. `right` has two students.
    """
    begin = starts(policy.tokenizer, policy.prompts, [RIGHT])
    engine = TorchEngine(policy.model, policy.tokenizer)
    [own] = rollout(engine, TinyRetriever(PASSAGES), begin, LIMITS, temperature=0.0, seed=0, prompts=policy.prompts)
    assert own.answer
    assert own.searches
    answers = {"right": own.answer, "direct": own.answer, "wrong": f"not {own.answer}"}
    searches = {"right": own.searches, "direct": own.searches - 1, "wrong": own.searches}
    made = []
    for question in (RIGHT, DIRECT, WRONG, RIGHT):
        asked = question.model_copy(update={"answers": (answers[question.id],)})
        [reference] = scripted(policy, asked, [[SEARCH] * searches[question.id] + [f"<answer>{answers[question.id]}</answer>"]])
        [student] = scripted(policy, asked, [[SEARCH, SEARCH, ANSWER]])
        made.append(Pair(question=asked, reference=reference, student=student, teacher_prompt_ids=own.prompt_ids))
    return made


def test_only_pairs_are_left_whose_teacher_is_right_in_the_searches_of_its_reference(tmp_path) -> None:
    policy = teach()
    figures = run_distill(policy, pairs(policy), tmp_path, teachers="verified", batch_size=2)
    asked = {name: figures[f"teachers{name}"] for name in ("", "_right", "_beyond", "_verified")}
    assert asked == {"": 3, "_right": 2, "_beyond": 1, "_verified": 1}
    assert figures["pairs"] == 2
    rows = [json.loads(line) for line in (tmp_path / "teachers.jsonl").read_text().splitlines()]
    assert [(row["id"], row["right"], row["searches"] - row["reference"]) for row in rows] == [
        ("right", True, 0), ("direct", True, 1), ("wrong", False, 0)
    ]  # fmt: skip


def test_all_teach_unless_that_is_asked(tmp_path) -> None:
    policy = teach()
    figures = run_distill(policy, pairs(policy), tmp_path, batch_size=2)
    assert figures["pairs"] == 4
    assert "teachers" not in figures


def test_nothing_is_distilled_where_no_teacher_follows(tmp_path) -> None:
    policy = teach()
    with pytest.raises(NoLeadError, match=r"none of 2 teachers follows its reference: 1 answer right, and 1 search beyond it"):
        run_distill(policy, pairs(policy)[1:3], tmp_path, teachers="verified")


def test_an_objective_without_a_teacher_asks_none(tmp_path) -> None:
    policy = teach()
    figures = run_distill(policy, pairs(policy), tmp_path, objective="sft", teachers="verified")
    assert figures["pairs"] == 3
    assert "teachers" not in figures
