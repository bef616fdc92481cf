"""A reward for brevity: what GRPO may be given beside exact match, so that it asks for shorter trajectories by itself."""

import math
from collections.abc import Sequence
from statistics import fmean, pstdev

from search_e1.types import Trajectory


def penalties(trajectories: Sequence[Trajectory], strength: float) -> list[float]:
    """What length takes from the reward of each trajectory; 0 or less, and more than ``-strength``.

    After Arora and Zanette, "Training Language Models to Reason Efficiently" (arXiv:2502.04463): the reward of a correct
    trajectory is multiplied by ``1 - strength * sigmoid((length - mean) / deviation)``, with mean and standard deviation
    (of a population) over the correct trajectories of its question; one that is wrong keeps its 0. Length is sampled
    tokens, so that what was read costs nothing. Where the correct ones are equally long, a deviation of 0, the sigmoid is
    that of 0.

    ``trajectories`` hold all those of each question that is among them.
    """
    lengths: dict[str, list[int]] = {}
    for t in trajectories:
        if t.correct:
            lengths.setdefault(t.question_id, []).append(t.sampled_tokens)
    return [
        -t.reward * strength * _sigmoid(_standing(t.sampled_tokens, lengths[t.question_id])) if t.correct else 0.0
        for t in trajectories
    ]


def _standing(length: int, lengths: Sequence[int]) -> float:
    """In standard deviations from the mean of ``lengths``."""
    deviation = pstdev(lengths)
    return (length - fmean(lengths)) / deviation if deviation else 0.0


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
