"""Per-token advantages for GRPO, whose advantage is otherwise shared by all tokens of a trajectory.

The teacher (the policy with the group's reference in its prompt) rates each token: its log-probability minus the plain
policy's, the token's lead, changes the token's advantage.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from search_e1.config import CorrectionConfig, EvidenceConfig, ReferenceConfig
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Sample

Taught = Sequence[Sample | None]
"""One sample per trajectory of a step, with its teacher's prompt; ``None`` if it has no teacher."""
_Lead = tuple[float, ...]


class Teach(Protocol):
    """Adds teachers' prompts to a step's trajectories; only tokens of ``classes`` are rated (default: all)."""

    def __call__(self, shown: ReferenceConfig, classes: Sequence[str] = ()) -> Taught: ...


def reweight_advantages(advantages: Sequence[float], lead: Sequence[float], strength: float, bound: float) -> tuple[float, ...]:
    """``A * (1 + strength * (clip(exp(sign(A) * lead), 1 - bound, 1 + bound) - 1))``: the weights of RLSD (arXiv:2604.03128).

    Tokens that the teacher prefers get more weight in a correct trajectory and less in a wrong one. With ``strength`` at most
    1 and ``bound`` below 1 no advantage changes sign. A lead of 0 changes nothing.
    """
    limit = math.log(1 + bound) + 1  # above this the ratio is clipped anyway, and exp could overflow
    ratios = (math.exp(min(limit, math.copysign(1, a) * gap)) for a, gap in zip(advantages, lead, strict=True))
    clipped = (min(max(ratio, 1 - bound), 1 + bound) for ratio in ratios)
    return tuple(a * (1 + strength * (ratio - 1)) for a, ratio in zip(advantages, clipped, strict=True))


def correct_advantages(advantages: Sequence[float], lead: Sequence[float], strength: float, bound: float) -> tuple[float, ...]:
    """``A + strength * clip(lead, -bound, bound)``, which also distinguishes tokens in groups whose rewards are equal."""
    return tuple(a + strength * min(max(gap, -bound), bound) for a, gap in zip(advantages, lead, strict=True))


def apply_evidence(
    policy: TrainedPolicy, samples: Sequence[Sample], teach: Teach, shown: ReferenceConfig, config: EvidenceConfig
) -> list[Sample]:
    """``samples`` with advantages reweighted by the lead of the teacher, whose reference is rendered as ``shown`` says."""
    return _with_advantages(
        samples, leads(policy, teach(shown)), lambda a, lead: reweight_advantages(a, lead, config.strength, config.bound)
    )


def apply_correction(
    policy: TrainedPolicy, samples: Sequence[Sample], teach: Teach, shown: ReferenceConfig, config: CorrectionConfig
) -> list[Sample]:
    """``samples`` with advantages corrected by two teachers.

    The teacher of search tokens sees the whole reference, the teacher of answer tokens only its answer.
    """
    for classes, shows in (("search",), "whole"), (("answer",), "answer"):
        seen = shown if shown.shows == "none" else shown.model_copy(update={"shows": shows})
        lead = leads(policy, teach(seen, classes))
        samples = _with_advantages(samples, lead, lambda a, lead: correct_advantages(a, lead, config.strength, config.bound))
    return list(samples)


def leads(policy: TrainedPolicy, taught: Taught) -> list[_Lead | None]:
    """``log p(token | teacher's prompt) - log p(token | plain prompt)`` of each response token, 0 for unrated tokens.

    All ranks must call it.
    """
    present = [sample for sample in taught if sample and sample.positions]
    plain = [sample.model_copy(update={"teacher_prompt_ids": None}) for sample in present]
    rows = zip(policy.logprobs(present, teacher="current"), policy.logprobs(plain), strict=True)
    found = {id(sample): tuple(a - b for a, b in zip(*row, strict=True)) for sample, row in zip(present, rows, strict=True)}
    return [found.get(id(sample)) for sample in taught]


def _with_advantages(
    samples: Sequence[Sample],
    leads: Sequence[_Lead | None],
    change: Callable[[Sequence[float], _Lead], tuple[float, ...]],
) -> list[Sample]:
    return [
        sample.model_copy(update={"advantages": change(sample.advantages or (), lead)}) if lead else sample
        for sample, lead in zip(samples, leads, strict=True)
    ]
