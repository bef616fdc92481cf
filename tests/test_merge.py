"""How much of an adapter is merged: the rule by hand, the share by its weights, the stage by what it finds."""

import copy
import json

import pytest
from pydantic import ValidationError

from conftest import make_tiny_policy
from made_pairs import pairs_of
from search_e1.config import DistillConfig, LoraConfig, TrainingConfig
from search_e1.stages.merge import Tried, best
from search_e1.training.policy import with_adapter
from search_e1.training.trained import TrainedPolicy
from stages_run import run_distill
from taught import QUESTIONS, teach
from test_objectives import spread
from trained import assert_near, equal, weights


def tried(strength: float, rewards: list[float], tokens: float) -> Tried:
    return Tried(strength, rewards, [tokens] * len(rewards))


@pytest.mark.parametrize(
    ("rewards", "chosen"),
    [
        ([1, 1, 1, 1, 0, 0, 0, 0], 1.0),  # as good, and shortest
        ([1, 1, 1, 0, 0, 0, 0, 0], 1.0),  # lower by 0.125, with a standard error of 0.125
        ([1, 1, 0, 0, 0, 0, 0, 0], 0.5),  # lower by 0.25, with one of 0.164
        ([1, 1, 1, 1, 1, 1, 1, 1], 1.0),
    ],
)
def test_the_fewest_tokens_among_those_as_good_by_one_standard_error(rewards, chosen) -> None:
    before = [1, 1, 1, 1, 0, 0, 0, 0]
    assert best([tried(0.0, before, 90), tried(0.5, before, 80), tried(1.0, rewards, 50)]) == chosen


def test_of_equals_the_shorter_and_a_gain_beats_tokens() -> None:
    low, high = [0.0] * 8, [1.0] * 8
    assert best([tried(0.0, low, 50), tried(1.0, high, 90)]) == 1.0
    assert best([tried(0.0, low, 50), tried(1.0, low, 50)]) == 0.0


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_share_of_the_adapter_is_a_share_of_the_change(strength) -> None:
    base = make_tiny_policy().model
    before = copy.deepcopy(weights(base))
    adapted = spread(with_adapter(base, LoraConfig(rank=4, alpha=8)))

    def merged(share: float) -> dict:
        trained = TrainedPolicy(copy.deepcopy(adapted), TrainingConfig(), frozen_start=False)
        trained.scale_adapter(0.25)  # what was set before does not matter
        trained.scale_adapter(share)
        return weights(trained.finish())

    whole = merged(1.0)
    expected = {name: before[name] + strength * (whole[name] - before[name]) for name in before}
    assert_near(merged(strength), expected, 1e-5)
    assert not equal(whole, before)


def test_the_stage_merges_what_answers_best(tmp_path, monkeypatch) -> None:
    """A policy that answers its questions; distilled on nonsense at a high rate it no longer does, and nothing is merged."""
    policy = teach()
    before = copy.deepcopy(weights(policy.model))
    figures = run_distill(
        policy, pairs_of(policy, 8), tmp_path, train_questions=QUESTIONS,
        merge={"strengths": [0.0, 0.5, 1.0], "questions": len(QUESTIONS)}, learning_rate=0.5, batch_size=2,
    )  # fmt: skip
    curve = figures["strengths"]
    assert list(curve) == ["0", "0.5", "1"]
    assert curve["1"]["em"] < curve["0"]["em"]
    assert figures["strength"] == 0.0
    assert_near(weights(policy.model), before, 1e-6)
    lines = (tmp_path / "merge-0.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["trajectories"][0]["reward"] for line in lines]
    assert sum(rewards) / len(rewards) == curve["0"]["em"]


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"weights": "all", "merge": {"strengths": [0.0, 1.0]}}, "other weights have no adapter"),
        ({"merge": {"strengths": [1.0, 1.0]}}, "a value is repeated"),
        ({"merge": {"strengths": []}}, "at least 1 item"),
        ({"merge": {"strengths": [1.5]}}, "less than or equal to 1"),
    ],
)
def test_impossible_sections_are_refused(section, says) -> None:
    with pytest.raises(ValidationError, match=says):
        DistillConfig(**section)
