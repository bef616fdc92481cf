"""The collapse guard: keeps the weights that did best so far, and notices when training falls far below them."""

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
"""What is watched; both are means over a step's trajectories, between 0 and 1."""
_STANDARD_ERRORS = 5.5
"""The best and the worst of hundreds of windows that differ by chance alone are 4 to 5 standard errors apart."""

Steps = Sequence[Mapping[str, float]]


class Collapse(Record):
    """A fall far below what a figure was before."""

    figure: str
    """``reward`` or ``answered``."""
    best: float
    """Its highest mean over a window."""
    best_step: int
    """The last step of that window, from 1."""
    now: float
    """Its mean over the last window."""
    step: int
    """The last step of all."""
    kept: int
    """The step that the kept weights sampled."""


def collapse(steps: Steps, config: GuardConfig, questions: int) -> Collapse | None:
    """Whether the newest of ``steps`` have fallen far below an earlier window; follows from the figures alone.

    A window is the mean of ``config.window`` steps, or of all at the beginning. It is a fall if more than ``config.drop`` of an
    earlier window's mean is lost, and more than chance explains: 5.5 standard errors of the difference of two shares, where
    each of a step's ``questions`` questions is one draw, because the trajectories of a group resemble each other. A fall of the
    answered share counts only if the reward is no higher than it was then: a policy that learns to search longer answers less
    often, and rightly more often.
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
    """Whether the policy that sampled the last of ``steps`` is the best so far: no earlier window was as high, and its own step
    is not below the window, as the first one of a fall would be."""
    rewards = [step["reward"] for step in steps]
    *earlier, last = [mean for mean, _ in _windows(rewards, config.window)]
    return rewards[-1] >= last and all(last > mean for mean in earlier)


def _windows(values: Sequence[float], window: int) -> Iterator[tuple[float, int]]:
    """After each value, the mean of the newest ``window`` and how many there were."""
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        yield fmean(part), len(part)


def _chance(earlier: float, count: int, now: float, window: int, questions: int) -> float:
    """The largest difference between two windows, of ``count`` and ``window`` steps, that chance is taken to explain."""
    pooled = (earlier * count + now * window) / (count + window)
    variance = max(0.0, pooled * (1 - pooled))  # the largest that values between 0 and 1 with this mean can have
    return _STANDARD_ERRORS * math.sqrt(variance * (1 / count + 1 / window) / questions)


@dataclass(slots=True)
class Guard:
    """The guard of a stage at work. All ranks hold one and decide alike, by figures over all ranks."""

    config: GuardConfig
    questions: int
    """Of a step, on all ranks."""
    weights: dict[str, Tensor] | None = None
    """The weights that did best, whole, on the CPU of rank 0."""

    def before_update(self, policy: TrainedPolicy, steps: Steps) -> None:
        """``policy`` sampled the last of ``steps`` and is about to learn from it: keep its weights if it is the best so far."""
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
        """Give ``policy`` the kept weights back. All ranks call this."""
        for name, weight in policy.parameters.items():
            whole = ranks.broadcast_object(self.weights[name] if self.weights else None)
            assert whole is not None, "a step was sampled before any figure could fall"
            weight.copy_(shard_like(whole.to(weight.device), weight))
