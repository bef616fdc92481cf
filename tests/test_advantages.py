"""GRPO's figures and advantages by hand, shaped by length and by evidence."""

import math

import pytest
import torch

from search_e1.stages.token_advantages import correct_advantages, reweight_advantages
from search_e1.training.objectives.grpo import advantages, length_penalties
from search_e1.types import ActionKind, StopReason, Trajectory, Turn
from test_objectives import tiny as tiny
from trained import (
    gradients,
    grpo,
    logprobs,
    sample,
    token_logprobs,
)


def test_figures_of_grpo_by_hand(tiny):
    """Ratios 1, 1.5, 0.5 and 1.1 on tokens of advantage 1, and of -1."""
    ratios = torch.tensor([1.0, 1.5, 0.5, 9.0, 9.0, 9.0, 1.1, 1.0])
    samples = []
    for seed, gain in ((1, 1.0), (2, -1.0)):
        s = sample(seed, advantage=gain)
        now = token_logprobs(tiny, s).detach()
        old = tuple((now - ratios.log()).tolist())
        fields = {"old_logprobs": old, "ref_logprobs": tuple((now + math.log(2)).tolist())}
        samples.append(s.model_copy(update={**fields, "sampling_logprobs": tuple(one + 0.25 for one in old)}))
    _, _, figures = gradients(tiny, samples, grpo(kl_coefficient=0.1), prepared=True)
    assert figures["clip_ratio"] == pytest.approx(2 / 10)  # 1.5 at +1 and 0.5 at -1
    assert figures["kl"] == pytest.approx(2 - math.log(2) - 1, rel=1e-4)
    assert figures["sampling_gap"] == pytest.approx(0.25, rel=1e-4)
    entropy = torch.cat(
        [
            -(logprobs(tiny, s.prompt_ids, s.response_ids).exp() * logprobs(tiny, s.prompt_ids, s.response_ids)).sum(-1)[
                list(s.positions)
            ]
            for s in samples
        ]
    )
    assert figures["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)


def test_a_ratio_beyond_the_clip_has_no_gradient(tiny):
    """With 0.2, and an advantage that would push it further out."""

    def gradient(ratio: float) -> float:
        s = sample(1, advantage=1.0)
        old = tuple((token_logprobs(tiny, s).detach() - math.log(ratio)).tolist())
        found = gradients(tiny, [s.model_copy(update={"old_logprobs": old})], grpo(), prepared=True)[1]
        return sum(one.abs().sum().item() for one in found.values())

    assert gradient(1.19) > 0
    assert gradient(1.21) == 0
    assert gradient(0.5) > 0  # clipped from one side only: a good token that became rare is still pushed up


def test_advantages_by_hand():
    # Mean 1/3; sample deviation sqrt((4/9 + 1/9 + 1/9) / 2) = 0.577350.
    assert advantages([1.0, 0.0, 0.0]) == pytest.approx([2 / 3 / 0.577450, -1 / 3 / 0.577450, -1 / 3 / 0.577450], rel=1e-5)
    assert advantages([1.0, 0.0, 0.0], scaled=False) == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert advantages([0.1] * 3) == [0.0] * 3
    assert advantages([1.0]) == [0.0]


def trajectory(tokens: int, *, correct: bool = True, read: int = 0) -> Trajectory:
    """``tokens`` sampled ones, and ``read`` in an observation."""
    answer = Turn(action_ids=(1,) * (tokens - 2 * bool(read)), action_text="a", kind=ActionKind.ANSWER, argument="a")
    search = Turn(
        action_ids=(1, 1), action_text="s", kind=ActionKind.SEARCH, argument="s", observation_ids=(2,) * read,
    ) if read else None  # fmt: skip
    return Trajectory(
        question_id="q", prompt_ids=(1,), turns=(*([search] if search else []), answer), reward=float(correct),
        stop_reason=StopReason.ANSWERED, answer="a",
    )  # fmt: skip


def test_a_correct_trajectory_loses_by_its_standing_among_the_correct_ones():
    # Lengths 10, 20 and 60: mean 30, population deviation sqrt(1400 / 3) = 21.602.
    group = [trajectory(10), trajectory(20, read=500), trajectory(60), trajectory(5, correct=False)]
    by_hand = [-0.4 / (1 + math.exp(-(n - 30) / math.sqrt(1400 / 3))) for n in (10, 20, 60)]
    assert by_hand == pytest.approx([-0.113509, -0.154518, -0.320156], abs=1e-6)
    assert length_penalties(group, 0.4) == pytest.approx([*by_hand, 0.0])
    assert length_penalties([trajectory(1000)], 0.4) == [-0.2]
    assert length_penalties([trajectory(3, correct=False)], 0.4) == [0.0]
    assert length_penalties([trajectory(7)] * 3, 0.5) == [-0.25] * 3  # equal lengths lose equally


def test_a_correct_trajectory_stays_ahead_of_a_wrong_one():
    taken = length_penalties([trajectory(n) for n in [1] * 400 + [4000]], 0.99)
    assert min(taken) == taken[-1] > -1


def test_the_correction_of_evidence_by_hand():
    two = math.log(2)
    lead = [0.0, two, -two, 0.1]

    def made(gain):
        return reweight_advantages([gain] * 4, lead, strength=0.5, bound=0.2)

    assert made(2.0) == pytest.approx([2.0, 2.2, 1.8, 2.105171], abs=1e-6)
    assert made(-1.0) == pytest.approx([-1.0, -0.9, -1.1, -0.952419], abs=1e-6)
    assert made(0.0) == (0.0,) * 4


def test_the_correction_of_evidence_is_bounded_and_keeps_signs():
    lead = [1e4, -1e4, 3.0, -3.0]
    up = reweight_advantages([1.5] * 4, lead, strength=1.0, bound=0.99)
    assert [one / 1.5 for one in up] == pytest.approx([1.99, 0.01, 1.99, math.exp(-3)])
    down = reweight_advantages([-0.5] * 4, lead, strength=1.0, bound=0.99)
    assert [one / -0.5 for one in down] == pytest.approx([0.01, 1.99, math.exp(-3), 1.99])
    assert reweight_advantages([1.5] * 4, lead, strength=0.0, bound=0.5) == (1.5,) * 4


def test_a_correction_is_added_and_bounded():
    lead = [0.0, 1.0, -2.0, 1e4, -1e4]
    assert correct_advantages([0.5] * 5, lead, strength=0.2, bound=5.0) == pytest.approx([0.5, 0.7, 0.1, 1.5, -0.5])
    assert correct_advantages([0.0] * 5, lead, strength=0.2, bound=0.5) == pytest.approx([0.0, 0.1, -0.1, 0.1, -0.1])
