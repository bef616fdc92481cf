"""The collapse guard: its rule on scripted figures, the weights it keeps, kills, ranks, and GRPO at an absurd learning rate."""

import copy
import json
import logging
import random
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import make_tiny_policy
from ranked import in_ranks
from search_e1.config import GuardConfig, TrainingConfig
from search_e1.runs.checkpoints import Checkpointer
from search_e1.runs.context import StageContext
from search_e1.runs.stopping import Stopped
from search_e1.training.guard import Guard, collapse, is_best
from search_e1.training.loop import Schedule, train
from search_e1.training.objectives.sft import Sft
from search_e1.training.trained import TrainedPolicy
from stages_run import run_grpo
from taught import teach
from trained import equal, sample, weights

GUARD = GuardConfig(drop=0.5, window=4)


def steps(rewards, answered=1.0):
    answered = answered if isinstance(answered, list) else [answered] * len(rewards)
    return [{"reward": r, "answered": a} for r, a in zip(rewards, answered, strict=True)]


def stops_at(rewards, answered=1.0, questions=64, guard=GUARD):
    """The step after which the guard first stops; None if it never does."""
    series = steps(rewards, answered)
    return next((n for n in range(1, len(series) + 1) if collapse(series[:n], guard, questions)), None)


def test_a_fall_is_noticed_once_the_window_lost_half_and_more_than_chance():
    # Windows of 4 after the fall: 0.325, 0.25, 0.175, 0.1. The third lost half of 0.4, and 0.225 is more than chance,
    # 5.5 x sqrt(0.2875 x 0.7125 x (1/4 + 1/4) / 64) = 0.22.
    rewards = [0.4] * 10 + [0.1] * 10
    assert stops_at(rewards) == 13
    found = collapse(steps(rewards[:13]), GUARD, 64)
    assert found is not None
    assert (found.figure, found.best, found.step) == ("reward", pytest.approx(0.4), 13)
    assert found.now == pytest.approx(0.175)
    assert found.kept == 1  # no later window was better
    # 8 questions a step: that is 0.55, and even a fall to nothing might be chance.
    assert stops_at([0.4] * 10 + [0.0] * 40, questions=8) is None
    assert stops_at([0.4] * 10 + [0.0] * 40, questions=8, guard=GuardConfig(window=32)) is not None


def test_a_smaller_fall_or_none_is_none():
    assert stops_at([0.4] * 10 + [0.21] * 30, questions=10_000) is None
    assert stops_at([0.4] * 10 + [0.19] * 30, questions=10_000) == 14
    assert stops_at([0.1] * 10 + [0.4] * 30) is None
    assert stops_at([0.0] * 40, answered=0.0) is None
    assert stops_at([0.4] * 10 + [0.0] * 10, guard=GuardConfig(drop=0)) is None


def test_the_first_steps_count_too():
    """The first update destroys the policy: what it sampled before is all that was ever good."""
    assert stops_at([0.5] + [0.0] * 20) == 5
    found = collapse(steps([0.5] + [0.0] * 4), GUARD, 64)
    assert found
    assert (found.best, found.best_step, found.kept) == (0.5, 1, 1)


def test_answering_less_counts_where_the_reward_did_not_rise():
    answered = [0.95] * 10 + [0.2] * 10
    assert stops_at([0.02] * 20, answered) == 13  # (0.95 + 3 x 0.2) / 4 = 0.39
    assert stops_at([0.1] * 10 + [0.3] * 10, answered) is None


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("questions", [8, 64])
def test_noise_never_stops_a_stage(rate, questions):
    """400 steps that stay as good, all five trajectories of a group alike: the noisiest that there can be."""
    draw = random.Random(questions)
    rewards = [sum(draw.random() < rate for _ in range(questions)) / questions for _ in range(400)]
    assert collapse(steps(rewards), GuardConfig(), questions) is None
    assert stops_at(rewards, questions=questions, guard=GuardConfig()) is None


def test_the_best_policy_is_one_that_was_not_falling():
    rising = [0.1, 0.2, 0.3, 0.4]
    assert [is_best(steps(rising[:n]), GUARD) for n in range(1, 5)] == [True] * 4
    assert not is_best(steps([*rising, 0.2]), GUARD)  # its window is the best so far, and its own step is below it
    assert is_best(steps([*rising, 0.2, 0.5]), GUARD)


class Scripted:
    """The same samples in every step, and figures by a script."""

    def __init__(self, figures):
        self.script, self.figures, self.asked = figures, {}, []

    def next(self, step):
        self.asked.append(step)
        self.figures = self.script[step]
        return {"sft": [sample(step), sample(step + 50)]}


FALL = steps([0.2, 0.4, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
STOPPED = 8  # windows of 4 after the fall: 0.375, 0.25, 0.125


def guarded(out, figures=FALL, checkpointer=None, mini_batches=1, sharding="none"):
    out.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(make_tiny_policy().model)
    policy = TrainedPolicy(model, TrainingConfig(), frozen_start=False, sharding=sharding)
    source, guard = Scripted(figures), Guard(GUARD, 64)
    context = StageContext(out, checkpointer=checkpointer or Checkpointer())
    schedule = Schedule(len(figures), 1e-3, mini_batches)
    records = train(policy, source, {"sft": Sft()}, TrainingConfig(), schedule, context, guard=guard)
    return records, weights(policy.finish()), source


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_training_ends_with_the_weights_that_sampled_the_best_window(tmp_path, mini_batches):
    records, found, source = guarded(tmp_path / "whole", mini_batches=mini_batches)
    assert len(records) == STOPPED
    assert source.asked == list(range(STOPPED))
    assert len((tmp_path / "whole" / "steps.jsonl").read_text().splitlines()) == STOPPED
    _, four, _ = guarded(tmp_path / "four", FALL[:4], mini_batches=mini_batches)
    assert equal(found, four)  # four updates: the policy that sampled the fifth step


def test_it_also_ends_well_where_the_fall_is_seen_after_the_last_step(tmp_path):
    records, found, _ = guarded(tmp_path / "whole", FALL[:STOPPED])
    assert len(records) == STOPPED
    assert equal(found, guarded(tmp_path / "four", FALL[:4])[1])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 4, 5, 7, STOPPED])
def test_killed_and_resumed_it_ends_the_same_to_the_bit(tmp_path, at, monkeypatch):
    expected, weights_expected, _ = guarded(tmp_path / "whole")

    def saving():
        return Checkpointer(tmp_path / "kept", every_seconds=0, share=1e9)

    class Deadly(Checkpointer):
        def on_step_end(self, step, write):
            super().on_step_end(step, write)
            if step == at:
                raise Killed

    with pytest.raises(Killed):
        guarded(tmp_path / "out", checkpointer=Deadly(tmp_path / "kept", every_seconds=0, share=1e9))
    found, resumed, source = guarded(tmp_path / "out", checkpointer=saving())
    assert source.asked == list(range(at, STOPPED))
    without = [[{k: v for k, v in r.items() if k != "seconds"} for r in rows] for rows in (found, expected)]
    assert without[0] == without[1]
    assert equal(resumed, weights_expected)


def test_stopped_in_the_pass_after_a_new_best_it_ends_the_same(tmp_path):
    """The checkpoint of a step that is interrupted takes weights over from the step before, which were not yet the best."""
    config = TrainingConfig(micro_batch_tokens=1)  # two passes a step
    results = {}
    for name in ("whole", "stopped"):
        out = tmp_path / name
        out.mkdir()
        checkpointer = Checkpointer(out / "kept", every_seconds=0, share=1e9)

        class Stops(Sft):
            left = 9  # the first pass of the fifth step

            def loss(self, states, batch):
                self.left -= 1
                if not self.left and name == "stopped":  # noqa: B023
                    checkpointer.stop.asked = signal.SIGTERM  # noqa: B023
                return super().loss(states, batch)

        def once(objective, checkpointer, out=out):
            policy = TrainedPolicy(copy.deepcopy(make_tiny_policy().model), config, frozen_start=False)
            context = StageContext(out, checkpointer=checkpointer)
            train(policy, Scripted(FALL), {"sft": objective}, config, Schedule(12, 1e-3), context, guard=Guard(GUARD, 64))
            return weights(policy.finish())

        if name == "stopped":
            with pytest.raises(Stopped):
                once(Stops(), checkpointer)
            checkpointer = Checkpointer(out / "kept")
        results[name] = once(Sft(), checkpointer)
    assert equal(results["whole"], results["stopped"])


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_ranks_stop_at_the_same_step_with_the_same_weights(tmp_path, sharding):
    def rank():
        records, found, _ = guarded(tmp_path / "out", sharding=sharding)
        return len(records), found, guarded(tmp_path / "four", FALL[:4], sharding=sharding)[1]

    (first, ours, four), (second, theirs, _) = in_ranks(2, rank, tmp_path / "ranks")
    assert first == second == STOPPED
    assert equal(ours, theirs)
    assert equal(ours, four)


def test_grpo_at_an_absurd_learning_rate_keeps_the_policy_it_began_with(tmp_path, caplog):
    policy = teach()
    start = copy.deepcopy(policy)
    grpo = {
        "steps": 40, "questions_per_step": 3, "group_size": 8, "learning_rate": 3.0, "keep_groups": True,
        "guard": {"window": 12},
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        figures = run_grpo(policy, tmp_path, grpo=grpo)
    fall = figures["stopped_early"]
    assert fall["step"] == figures["steps"] < 40
    assert fall["now"] < 0.5 * fall["best"]
    assert fall["kept"] < fall["step"]
    rewards = [json.loads(line)["reward"] for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert rewards[fall["kept"] - 1] > 0
    if fall["kept"] == 1:
        assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict(), start.model.state_dict())
    (said,) = [record.getMessage() for record in caplog.records if "collapsed" in record.getMessage()]
    assert f"stopped after step {fall['step']} of 40" in said
    assert "lower grpo.learning_rate (now 3)" in said
    assert "\n" not in said
    groups = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert groups
    assert len({group["question"]["id"] for group in groups}) == len(groups)


def test_a_stage_that_did_not_collapse_is_as_without_a_guard(tmp_path):
    found = {}
    for drop in (0.0, 0.5):
        policy = teach()
        torch.manual_seed(1)
        figures = run_grpo(policy, tmp_path / str(drop), grpo={
            "steps": 3, "questions_per_step": 3, "group_size": 6, "learning_rate": 1e-3, "guard": {"drop": drop},
        })  # fmt: skip
        assert "stopped_early" not in figures
        found[drop] = weights(policy.model)
    assert equal(found[0.0], found[0.5])
