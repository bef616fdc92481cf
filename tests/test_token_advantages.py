"""Advantages of single tokens against the lead, row by row from the whole model's logits."""

import copy
import math

import pytest
import torch

from conftest import make_tiny_policy
from search_e1.config import WHOLE, CorrectionConfig, EvidenceConfig, ReferenceConfig
from search_e1.stages.token_advantages import apply_correction, apply_evidence
from search_e1.training.trained import TrainedPolicy
from trained import CONFIG, opinionated, sample, token_logprobs

PROMPTS = {"whole": tuple(range(30, 50)), "searches": tuple(range(60, 66)), "answer": tuple(range(70, 79))}
"""What the teacher reads, by what is shown of the reference."""


@pytest.fixture(scope="module")
def policy():
    return TrainedPolicy(copy.deepcopy(opinionated(make_tiny_policy().model)), CONFIG, frozen_start=False)


@pytest.fixture(scope="module")
def samples():
    """A right trajectory, a wrong one, and one without a teacher."""
    return [sample(1, 4, 9, advantage=1.4), sample(2, 7, 12, advantage=-0.8), sample(7, advantage=0.6)]


def teaching(samples):
    """Of each sample's sampled tokens the first half is a search, the rest an answer."""

    def weights(s, classes):
        half = s.positions[: len(s.positions) // 2]
        own = {"search": half, "answer": s.positions[len(half) :]}
        return tuple(float(any(i in own[name] for name in classes)) for i in range(len(s.response_ids)))

    def teach(shown, classes=()):
        return [
            s.model_copy(
                update={
                    "teacher_prompt_ids": PROMPTS.get(shown.shows, s.prompt_ids),
                    "weights": weights(s, classes) if classes else None,
                }
            )
            for s in samples[:2]
        ] + [None]

    return teach


def lead_of(policy, s, shows):
    with_reference = s.model_copy(update={"prompt_ids": PROMPTS[shows]})
    return (token_logprobs(policy.model, with_reference) - token_logprobs(policy.model, s)).detach()


def test_evidence_weighs_each_token_by_the_lead_of_the_teacher(policy, samples):
    shown = ReferenceConfig(shows="searches")
    made = apply_evidence(policy, samples, teaching(samples), shown, EvidenceConfig(strength=0.5, bound=0.3))
    assert made[2] == samples[2]
    factors = set()
    for before, after in zip(samples[:2], made, strict=False):
        assert after.teacher_prompt_ids is None
        gain, at = before.advantages[0], list(before.positions)
        weight = (math.copysign(1, gain) * lead_of(policy, before, "searches")).exp().clamp(0.7, 1.3)
        expected = gain * (0.5 + 0.5 * weight)
        torch.testing.assert_close(torch.tensor(after.advantages)[at], expected[at], rtol=1e-4, atol=1e-5)
        factors.update((torch.tensor(after.advantages)[at] / gain).round(decimals=3).tolist())
    assert len(factors) > 2


def test_searches_are_corrected_by_who_sees_the_passages_and_answers_by_who_sees_the_answer(policy, samples):
    made = apply_correction(policy, samples, teaching(samples), WHOLE, CorrectionConfig(strength=0.2, bound=0.5))
    assert made[2] == samples[2]
    for before, after in zip(samples[:2], made, strict=False):
        assert after.teacher_prompt_ids is after.weights is None
        middle = before.positions[len(before.positions) // 2]
        lead = torch.cat([lead_of(policy, before, "whole")[:middle], lead_of(policy, before, "answer")[middle:]])
        expected = before.advantages[0] + 0.2 * lead.clamp(-0.5, 0.5)
        at = list(before.positions)
        torch.testing.assert_close(torch.tensor(after.advantages)[at], expected[at], rtol=1e-4, atol=1e-5)
        assert lead[at].abs().max() > 0.5 > lead[at].abs().min() > 0


def test_a_teacher_that_sees_nothing_corrects_nothing(policy, samples):
    nothing = ReferenceConfig(shows="none")
    assert apply_correction(policy, samples, teaching(samples), nothing, CorrectionConfig(strength=1.0)) == samples
