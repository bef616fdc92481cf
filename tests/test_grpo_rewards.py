"""What may be added to GRPO's reward and loss: a penalty of length, and of the distance from the policy as it began."""

import copy
import json
import math
import os

import pytest
import torch

from conftest import PASSAGES, TinyRetriever
from ranked import in_ranks
from search_e1.config import GrpoConfig, LoraConfig
from search_e1.grpo import brevity, rollouts
from search_e1.grpo import trainer as grpo
from search_e1.training.policy import Policy
from search_e1.types import ActionKind, StopReason, Trajectory, Turn
from taught import LIMITS, QUESTIONS, teach

CONFIG = GrpoConfig(steps=2, questions_per_step=2, group_size=6, learning_rate=3e-3)


@pytest.fixture(scope="module")
def taught() -> Policy:
    return teach()


def run(policy: Policy, out, config: GrpoConfig) -> list[dict[str, float]]:
    grpo.train(policy, QUESTIONS, TinyRetriever(PASSAGES), config, LIMITS, seed=3, out=out)
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


def trajectory(question: str, tokens: int, *, correct: bool = True, read: int = 0) -> Trajectory:
    """``tokens`` sampled ones, and ``read`` in an observation."""
    answer = Turn(action_ids=(1,) * (tokens - 2 * bool(read)), action_text="a", kind=ActionKind.ANSWER, argument="a")
    search = Turn(
        action_ids=(1, 1), action_text="s", kind=ActionKind.SEARCH, argument="s", observation_ids=(2,) * read,
    ) if read else None  # fmt: skip
    return Trajectory(
        question_id=question, prompt_ids=(1,), turns=(*([search] if search else []), answer), reward=float(correct),
        stop_reason=StopReason.ANSWERED, answer="a",
    )  # fmt: skip


def test_a_correct_trajectory_loses_by_its_standing_among_the_correct_ones():
    # Lengths 10, 20 and 60: mean 30, population deviation sqrt(1400 / 3) = 21.602.
    group = [trajectory("q", 10), trajectory("q", 20, read=500), trajectory("q", 60), trajectory("q", 5, correct=False)]
    by_hand = [-0.4 / (1 + math.exp(-(n - 30) / math.sqrt(1400 / 3))) for n in (10, 20, 60)]
    assert by_hand == pytest.approx([-0.113509, -0.154518, -0.320156], abs=1e-6)
    assert brevity.penalties(group, 0.4) == pytest.approx([*by_hand, 0.0])
    other = [trajectory("one", 1000), trajectory("none", 3, correct=False)]  # of other questions: nothing changes
    assert brevity.penalties([other[0], *group, other[1]], 0.4) == pytest.approx([-0.2, *by_hand, 0.0, 0.0])


def test_equal_lengths_lose_equally():
    assert brevity.penalties([trajectory("q", 7)] * 3, 0.5) == [-0.25] * 3


def test_a_correct_trajectory_stays_ahead_of_a_wrong_one():
    lengths = [1] * 400 + [4000]
    taken = brevity.penalties([trajectory("q", n) for n in lengths], 0.99)
    assert min(taken) == taken[-1] > -1


def test_parts_of_groups_are_penalised_as_whole_ones(tmp_path):
    group = [trajectory("q", n) for n in (10, 20, 60)] + [trajectory("r", n) for n in (5, 9, 9)]

    def of_rank() -> list[float]:
        part = (group[:2], group[2:])[int(os.environ["RANK"])]
        return rollouts.length_penalty(0.4)(trajectory=part)

    first, second = in_ranks(2, of_rank, tmp_path)
    assert first + second == brevity.penalties(group, 0.4)


def test_grpo_sees_the_shaped_reward_and_the_records_do_not(taught, tmp_path, monkeypatch):
    seen: list[list[tuple[Trajectory, float]]] = []
    honest = rollouts.brevity.penalties

    def spying(trajectories, strength):
        taken = honest(trajectories, strength)
        seen.append(list(zip(trajectories, taken, strict=True)))
        return taken

    monkeypatch.setattr(rollouts.brevity, "penalties", spying)
    advantages: list[torch.Tensor] = []
    honest_loss = grpo.GRPOTrainer._compute_loss
    monkeypatch.setattr(
        grpo.GRPOTrainer, "_compute_loss",
        lambda trainer, model, inputs: advantages.append(inputs["advantages"]) or honest_loss(trainer, model, inputs),
    )  # fmt: skip
    config = CONFIG.model_copy(update={"steps": 1, "length_penalty": 0.5})
    (line,) = run(copy.deepcopy(taught), tmp_path, config)
    (step,) = seen
    assert {t.reward for t, _ in step} == {0.0, 1.0}
    assert line["reward"] == pytest.approx(sum(t.reward for t, _ in step) / 12)
    assert line["shaped_reward"] == pytest.approx(sum(t.reward + taken for t, taken in step) / 12)
    assert line["shaped_reward"] < line["reward"]
    expected = []
    for at in (0, 6):
        shaped = torch.tensor([t.reward + taken for t, taken in step[at : at + 6]])
        expected += ((shaped - shaped.mean()) / (shaped.std() + 1e-4)).tolist()
    assert sorted(torch.cat(advantages).tolist()) == pytest.approx(sorted(expected), abs=1e-4)


def test_without_a_penalty_there_is_no_shaped_reward(taught, tmp_path):
    lines = run(copy.deepcopy(taught), tmp_path, CONFIG)
    assert all("shaped_reward" not in line and "kl" not in line for line in lines)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, alpha=8)])
def test_a_kl_penalty_is_to_the_policy_as_the_stage_began(taught, tmp_path, monkeypatch, lora):
    assert taught.model.config._name_or_path == ""  # nothing to load it from once more
    inputs: list[dict[str, torch.Tensor]] = []
    honest = grpo.GRPOTrainer._compute_loss
    monkeypatch.setattr(
        grpo.GRPOTrainer, "_compute_loss",
        lambda trainer, model, batch: inputs.append(batch) or honest(trainer, model, batch),
    )  # fmt: skip
    config = CONFIG.model_copy(update={"lora": lora, "trainer": {"beta": 0.5}, "learning_rate": 1e-2})
    policy = copy.deepcopy(taught)
    first, second = run(policy, tmp_path, config)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 1e-3
    for batch in inputs:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        width = batch["completion_ids"].shape[1]
        with torch.no_grad():
            logits = taught.model(ids, attention_mask=mask).logits[:, -width - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(2, batch["completion_ids"][:, :, None])[:, :, 0]
        kept = (batch["completion_mask"] * batch["tool_mask"]).bool()
        torch.testing.assert_close(batch["ref_per_token_logps"][kept], expected[kept], rtol=1e-4, atol=1e-4)
    assert type(policy.model) is type(taught.model)
    assert all(parameter.requires_grad for parameter in policy.model.parameters())
