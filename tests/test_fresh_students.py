"""On-policy students: sampled from the policy as it is at each step, taught by the policy as the stage began."""

import copy
import json
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from made_pairs import make_pair
from search_e1.config import DistillConfig
from search_e1.errors import ConfigError
from search_e1.selfdistill.samples import classes_of, sample_of
from search_e1.stages import fresh_students
from search_e1.stages.distill import Distill
from search_e1.stages.fresh_students import FreshStudents
from search_e1.training.policy import Policy
from search_e1.types import Pair, Sample
from stages_run import run_distill
from taught import QUESTIONS, teach
from trained import config_of, equal, weights

FRESH = {"students": "fresh", "batch_size": 2, "learning_rate": 3e-3, "epochs": 2, "lora": {"rank": 4, "alpha": 8}}


@pytest.fixture(scope="module")
def taught() -> Policy:
    return teach()


@pytest.fixture
def policy(taught) -> Policy:
    return copy.deepcopy(taught)


def pairs_for(policy: Policy) -> list[Pair]:
    """A pair for each question, the first of them twice with another student: one reference, so one fresh student."""
    pairs = [make_pair(policy, question) for question in QUESTIONS[:3]]
    return [pairs[0], *pairs]


@pytest.fixture
def seen(monkeypatch) -> list[list[Sample]]:
    """The samples of each step."""
    steps: list[list[Sample]] = []
    honest = FreshStudents.next

    def next_(source: FreshStudents, step: int) -> Any:
        found = honest(source, step)
        steps.append(list(found["distill"]))
        return found

    monkeypatch.setattr(FreshStudents, "next", next_)
    return steps


def test_each_reference_has_a_new_student_once_an_epoch(policy, tmp_path, seen) -> None:
    before, pairs = copy.deepcopy(weights(policy.model)), pairs_for(policy)
    figures = run_distill(policy, pairs, tmp_path, **FRESH)
    assert figures["steps"] == 4  # three references, two a step, two epochs
    assert [len(step) for step in seen] == [2, 1, 2, 1]
    for epoch in (seen[:2], seen[2:]):
        assert {s.question_id for step in epoch for s in step} == {p.question.id for p in pairs}
    shown = {p.question.id: p.teacher_prompt_ids for p in pairs}
    assert all(s.teacher_prompt_ids == shown[s.question_id] for step in seen for s in step)
    stored = {p.student.response_ids for p in pairs}
    assert not any(s.response_ids in stored for step in seen for s in step)
    assert not equal(weights(policy.model), before)
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert all(step["masked"] == 0 and step["sampled_tokens"] > 0 and step["divergence"] > 0 for step in steps)
    drawn = [s for step in seen for s in step]  # the figures are those of the students trained on, not of the stored ones
    assert (figures["pairs"], figures["students"], figures["students_too_long"]) == (3, len(drawn), 0)
    assert figures["positions"] == round(sum(len(s.positions) for s in drawn) / 2)
    assert (figures["masked"], figures["sampled_tokens"]) == (0, sum(sum(s.action_mask) for s in drawn))


def test_a_student_that_does_not_fit_is_in_no_loss(policy) -> None:
    pairs = pairs_for(policy)[1:3]
    samples = [sample_of(pair, classes_of(policy.tokenizer, policy.prompts, pair.student)) for pair in pairs]
    figures = fresh_students._figures(pairs, samples, samples[:1])
    assert (figures["students"], figures["too_long"], figures["masked"]) == (2, 0.5, 0)
    assert figures["positions"] == len(samples[0].positions)


def test_easiest_first(policy, tmp_path, seen) -> None:
    hard, *pairs = [make_pair(policy, question, reference_searches=i == 0) for i, question in enumerate(QUESTIONS[:3])]
    run_distill(policy, [hard, *pairs], tmp_path, **FRESH, order="easiest_first")
    easy = [pair.question.id for pair in sorted(pairs, key=lambda pair: pair.reference.sampled_tokens)]
    assert [[s.question_id for s in step] for step in seen] == 2 * [easy, [hard.question.id]]


def test_students_are_the_policys_own_at_each_step(policy, taught, tmp_path, seen, monkeypatch) -> None:
    """With a rate of 0 in effect they would be the first policy's in every step; the engine is handed the trained weights."""
    sampled_by: list[dict[str, torch.Tensor]] = []
    honest = fresh_students.rollout

    def rollout(engine: Any, *args: Any, **kwargs: Any) -> Any:
        lora = {n: w.detach().clone() for n, w in engine.model.named_parameters() if "lora_B" in n}
        sampled_by.append(lora)
        return honest(engine, *args, **kwargs)

    monkeypatch.setattr(fresh_students, "rollout", rollout)
    run_distill(policy, pairs_for(policy), tmp_path, **FRESH)
    assert all(not value.any() for value in sampled_by[0].values())  # adapters begin at 0
    assert all(not equal(sampled_by[i], sampled_by[i + 1]) for i in range(3))


def test_the_same_seed_gives_the_same_policy_and_another_other_students(taught, tmp_path, seen) -> None:
    made = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        policy = copy.deepcopy(taught)
        run_distill(policy, pairs_for(policy), tmp_path / name, seed=seed, **FRESH)
        made.append(weights(policy.model))
    assert equal(made[0], made[1])
    assert not equal(made[0], made[2])
    assert seen[:4] == seen[4:8]


def test_fresh_students_need_a_teacher_and_an_engine_that_takes_weights(policy, tmp_path) -> None:
    with pytest.raises(ValidationError, match='students = "fresh" needs a teacher'):
        DistillConfig(students="fresh", objective="sft")
    config = config_of(tmp_path, distill=FRESH, rollout={"engine": "made:engine"})
    with pytest.raises(ConfigError, match="distillation with fresh students needs an engine that takes each step's weights"):
        Distill("start", tmp_path, None, 1).check(type("Run", (), {"config": config})())
