"""Per-token advantages for GRPO, which gives all tokens of a trajectory the same one.

The policy that sees a correct trajectory of the group (the teacher) rates each token; its lead over the plain policy changes
the token's advantage.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from search_e1.config import CorrectionConfig, EvidenceConfig, ReferenceConfig
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Sample

Taught = Sequence[Sample | None]
"""Each trajectory of a step with its teacher's prompt; ``None`` where it has no teacher."""
_Lead = tuple[float, ...]


class Teach(Protocol):
    """Adds teachers' prompts to the step's trajectories; only tokens of ``classes`` are rated (default: all)."""

    def __call__(self, shown: ReferenceConfig, classes: Sequence[str] = ()) -> Taught: ...


def reweight_advantages(advantages: Sequence[float], lead: Sequence[float], strength: float, bound: float) -> tuple[float, ...]:
    """``A * (1 + strength * (clip(exp(sign(A) * lead), 1 - bound, 1 + bound) - 1))``: the weights of RLSD (arXiv:2604.03128).

    Tokens that the teacher prefers count for more in a correct trajectory and for less in a wrong one. With ``strength`` at
    most 1 and ``bound`` below 1 no advantage changes sign. A lead of 0 changes nothing.
    """
    limit = math.log(1 + bound) + 1  # beyond it the clip holds, and exp could overflow
    ratios = (math.exp(min(limit, math.copysign(1, a) * gap)) for a, gap in zip(advantages, lead, strict=True))
    clipped = (min(max(ratio, 1 - bound), 1 + bound) for ratio in ratios)
    return tuple(a * (1 + strength * (ratio - 1)) for a, ratio in zip(advantages, clipped, strict=True))


def correct_advantages(advantages: Sequence[float], lead: Sequence[float], strength: float, bound: float) -> tuple[float, ...]:
    """``A + strength * clip(lead, -bound, bound)``, which also distinguishes tokens in groups whose rewards are equal."""
    return tuple(a + strength * min(max(gap, -bound), bound) for a, gap in zip(advantages, lead, strict=True))


def apply_evidence(
    policy: TrainedPolicy, samples: Sequence[Sample], teach: Teach, shown: ReferenceConfig, config: EvidenceConfig
) -> list[Sample]:
    """``samples`` with advantages reweighted by the lead of the teacher, who sees the reference as ``shown`` says."""
    return _changed(
        samples, leads(policy, teach(shown)), lambda a, lead: reweight_advantages(a, lead, config.strength, config.bound)
    )


def apply_correction(
    policy: TrainedPolicy, samples: Sequence[Sample], teach: Teach, shown: ReferenceConfig, config: CorrectionConfig
) -> list[Sample]:
    """``samples`` with advantages corrected by two teachers.

    Search tokens are rated by the policy that sees the whole reference, answer tokens by the one that sees only its answer.
    """
    for classes, shows in (("search",), "whole"), (("answer",), "answer"):
        seen = shown if shown.shows == "none" else shown.model_copy(update={"shows": shows})
        lead = leads(policy, teach(seen, classes))
        samples = _changed(samples, lead, lambda a, lead: correct_advantages(a, lead, config.strength, config.bound))
    return list(samples)


def leads(policy: TrainedPolicy, taught: Taught) -> list[_Lead | None]:
    """``log p(token | teacher's prompt) - log p(token | plain prompt)`` of each response token, 0 for unrated ones.

    Every rank must call it.
    """
    present = [sample for sample in taught if sample and sample.positions]
    plain = [sample.model_copy(update={"teacher_prompt_ids": None}) for sample in present]
    rows = zip(policy.logprobs(present, teacher="current"), policy.logprobs(plain), strict=True)
    found = {id(sample): tuple(a - b for a, b in zip(*row, strict=True)) for sample, row in zip(present, rows, strict=True)}
    return [found.get(id(sample)) for sample in taught]


def _changed(
    samples: Sequence[Sample],
    leads: Sequence[_Lead | None],
    change: Callable[[Sequence[float], _Lead], tuple[float, ...]],
) -> list[Sample]:
    return [
        sample.model_copy(update={"advantages": change(sample.advantages or (), lead)}) if lead else sample
        for sample, lead in zip(samples, leads, strict=True)
    ]
