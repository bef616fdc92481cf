"""Advantages of single tokens: GRPO gives a trajectory's tokens one advantage; who has seen a right one tells them apart."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from search_e1.config import CorrectionConfig, EvidenceConfig, ReferenceConfig
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Sample

Taught = Sequence[Sample | None]
"""Of each trajectory, it with the prompt of a teacher; ``None`` where there is no teacher."""
_Lead = tuple[float, ...]


class Teach(Protocol):
    """Makes ``Taught`` of a step's trajectories, for tokens of ``classes`` (all, if there are none)."""

    def __call__(self, shown: ReferenceConfig, classes: Sequence[str] = ()) -> Taught: ...


def weigh(advantages: Sequence[float], lead: Sequence[float], strength: float, bound: float) -> tuple[float, ...]:
    """``A * (1 + strength * (clip(exp(sign(A) * lead), 1 - bound, 1 + bound) - 1))``: the weights of RLSD (arXiv:2604.03128).

    What speaks for a right trajectory or against a wrong one counts for more, the rest for less. With ``strength`` at most 1
    and ``bound`` below 1 no sign changes; where the lead is 0 nothing does.
    """
    limit = math.log(1 + bound) + 1  # beyond it the clip holds, and exp could overflow
    ratios = (math.exp(min(limit, math.copysign(1, a) * gap)) for a, gap in zip(advantages, lead, strict=True))
    clipped = (min(max(ratio, 1 - bound), 1 + bound) for ratio in ratios)
    return tuple(a * (1 + strength * (ratio - 1)) for a, ratio in zip(advantages, clipped, strict=True))


def correct(advantages: Sequence[float], lead: Sequence[float], strength: float, bound: float) -> tuple[float, ...]:
    """``A + strength * clip(lead, -bound, bound)``: tokens are told apart where a group's rewards are equal, too."""
    return tuple(a + strength * min(max(gap, -bound), bound) for a, gap in zip(advantages, lead, strict=True))


def weighed_by_evidence(
    policy: TrainedPolicy, samples: Sequence[Sample], teach: Teach, shown: ReferenceConfig, config: EvidenceConfig
) -> list[Sample]:
    """``samples`` with advantages weighed by the lead of the policy that sees the reference as ``shown`` says."""
    return _changed(samples, leads(policy, teach(shown)), lambda a, lead: weigh(a, lead, config.strength, config.bound))


def corrected(
    policy: TrainedPolicy, samples: Sequence[Sample], teach: Teach, shown: ReferenceConfig, config: CorrectionConfig
) -> list[Sample]:
    """``samples`` with advantages corrected: of searches by who sees the whole reference, of answers by who sees its answer."""
    for classes, shows in (("search",), "whole"), (("answer",), "answer"):
        seen = shown if shown.shows == "none" else shown.model_copy(update={"shows": shows})
        lead = leads(policy, teach(seen, classes))
        samples = _changed(samples, lead, lambda a, lead: correct(a, lead, config.strength, config.bound))
    return list(samples)


def leads(policy: TrainedPolicy, taught: Taught) -> list[_Lead | None]:
    """``log p(token | teacher's prompt) - log p(token | plain prompt)`` of each response token, 0 where none is asked for.

    Every rank has to call it.
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
