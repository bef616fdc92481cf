"""The collapse guard: keeps the best weights so far, and detects when training falls far below them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from search_e1.config import GuardConfig
from search_e1.runs import ranks
from search_e1.training.sharding import full_tensor, shard_like
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Record

FIGURES = ("reward", "answered")
"""The watched figures; both are means over a step's trajectories, between 0 and 1."""
_STANDARD_ERRORS = 5.5
"""By chance alone, the best and the worst of hundreds of windows are 4 to 5 standard errors apart."""

Steps = Sequence[Mapping[str, float]]


class Collapse(Record):
    """A fall of a figure far below its earlier value."""

    figure: str
    """``reward`` or ``answered``."""
    best: float
    """The figure's highest window mean."""
    best_step: int
    """The last step of that window, from 1."""
    now: float
    """The figure's mean over the last window."""
    step: int
    """The last step."""
    kept: int
    """The step that was sampled with the kept weights."""


def collapse(steps: Steps, config: GuardConfig, questions: int) -> Collapse | None:
    """The collapse of the latest of ``steps`` relative to an earlier window, if any; depends on the figures only.

    A window is the mean over ``config.window`` steps, or fewer at the start. A collapse loses more than the share
    ``config.drop`` of an earlier window's mean, and more than chance explains: 5.5 standard errors of the difference of two
    proportions, with one draw per question (``questions`` per step), because the trajectories of a group are correlated. A fall
    of the answered share counts only if the reward is no higher than it was then: a policy that learns to search longer answers
    less often but is correct more often.
    """
    if not config.drop or len(steps) <= config.window:
        return None
    means = {figure: list(_windows([step[figure] for step in steps], config.window)) for figure in FIGURES}
    falls = []
    for figure, windows in means.items():
        now, _ = windows[-1]
        for i, (earlier, count) in enumerate(windows[:-1]):
            far = now < (1 - config.drop) * earlier
            far = far and earlier - now > _chance(earlier, count, now, config.window, questions)
            if far and (figure == "reward" or means["reward"][-1][0] <= means["reward"][i][0]):
                falls.append((figure == "reward", earlier, i, figure, now))
    if not falls:
        return None
    _, best, at, figure, now = max(falls)
    kept = max(n for n in range(1, len(steps) + 1) if is_best(steps[:n], config))
    return Collapse(figure=figure, best=best, best_step=at + 1, now=now, step=len(steps), kept=kept)


def is_best(steps: Steps, config: GuardConfig) -> bool:
    """Whether the policy that sampled the last of ``steps`` is the best so far: its window exceeds all earlier ones, and its
    own step is not below the window's mean, as the first step of a fall would be."""
    rewards = [step["reward"] for step in steps]
    *earlier, last = [mean for mean, _ in _windows(rewards, config.window)]
    return rewards[-1] >= last and all(last > mean for mean in earlier)


def _windows(values: Sequence[float], window: int) -> Iterator[tuple[float, int]]:
    """After each value, the mean of the latest ``window`` values and their count."""
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        yield fmean(part), len(part)


def _chance(earlier: float, count: int, now: float, window: int, questions: int) -> float:
    """The largest difference between two windows, of ``count`` and ``window`` steps, that is attributed to chance."""
    pooled = (earlier * count + now * window) / (count + window)
    variance = max(0.0, pooled * (1 - pooled))  # the maximum for values in [0, 1] with this mean
    return _STANDARD_ERRORS * math.sqrt(variance * (1 / count + 1 / window) / questions)


@dataclass(slots=True)
class Guard:
    """The guard of a running stage. Every rank has one; all decide alike, from figures over all ranks."""

    config: GuardConfig
    questions: int
    """Questions per step, over all ranks."""
    weights: dict[str, Tensor] | None = None
    """The best weights, unsharded, on the CPU of rank 0."""

    def before_update(self, policy: TrainedPolicy, steps: Steps) -> None:
        """Keep the weights of ``policy``, which sampled the last of ``steps``, if it is the best so far."""
        if not (self.config.drop and is_best(steps, self.config)):
            return
        kept = {}
        for name, weight in policy.parameters.items():
            whole = full_tensor(weight)
            if ranks.is_first():
                kept[name] = whole.to("cpu", copy=True)
        self.weights = kept or None

    def collapsed(self, steps: Steps) -> Collapse | None:
        """See ``collapse``."""
        return collapse(steps, self.config, self.questions)

    @torch.no_grad()
    def restore(self, policy: TrainedPolicy) -> None:
        """Load the kept weights into ``policy``. All ranks must call this."""
        for name, weight in policy.parameters.items():
            whole = ranks.broadcast_object(self.weights[name] if self.weights else None)
            assert whole is not None, "a step was sampled before any figure could fall"
            weight.copy_(shard_like(whole.to(weight.device), weight))
