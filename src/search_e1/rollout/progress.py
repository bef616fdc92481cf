"""What is told while trajectories are sampled: how many there are, how they do, and how fast."""

import time
from collections import Counter
from collections.abc import Mapping

from search_e1.rollout.loop import OnTrajectory, Spent
from search_e1.rollout.sampler import tally
from search_e1.runs.progress import Progress, tell_within
from search_e1.types import Trajectory

REWARD = "reward"


class RolloutProgress:
    """Reports trajectories as they end; of several processes the first reports its own."""

    def __init__(self, progress: Progress, total: int, name: str, *, before: int = 0, detailed: bool = False) -> None:
        """
        Args:
            name: of EM, or ``REWARD`` for that in its place.
            before: trajectories of something else that ``total`` counts too.
            detailed: tell of searches and of how trajectories ended, as well.
        """
        self._progress, self._total, self._name, self._before, self._detailed = progress, total, name, before, detailed
        self._tokens, self._seconds = 0, 0.0
        """Of this process alone: a rate over attempts would count the time between them."""

    def after(self, sums: Mapping[str, float]) -> OnTrajectory:
        """For the next chunk; ``sums`` over the chunks that are done, as ``sampler.tally`` has them."""
        own, earlier, begun = Counter(sums), self._seconds, time.perf_counter()
        tell_within(self._progress, self._before + own["trajectories"], self._total)

        def on_trajectory(_: int, trajectory: Trajectory) -> None:
            own.update({**tally([trajectory], Spent()), REWARD: trajectory.reward})
            self._tokens += trajectory.sampled_tokens
            self._seconds = earlier + time.perf_counter() - begun
            self._progress(self._before + int(own["trajectories"]), self._total, ", ".join(self._figures(own)))

        return on_trajectory

    def _figures(self, sums: Counter[str]) -> list[str]:
        count = sums["trajectories"]
        mean = sums[REWARD if self._name == REWARD else "em"] / count
        figures = [f"{self._name} {mean:.3f}", f"{self._tokens / max(self._seconds, 1e-9):.0f} tok/s"]
        if not self._detailed:
            return figures
        stops = ((name.partition("stop.")[2], n) for name, n in sums.most_common())
        return [*figures, f"{sums['searches'] / count:.2f} searches", *(f"{name} {n:.0f}" for name, n in stops if name)]


class StepRollouts:
    """Tells within a training step of its rollouts, which take the share of a step that they took in the step before."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress, self._steps = progress, steps
        self._share, self._ended, self._sampling = 0.5, 0.0, 0.0

    def of(self, step: int, total: int) -> OnTrajectory:
        """For the rollouts of ``step`` (from 0), ``total`` trajectories."""
        begun = time.perf_counter()
        if self._ended:
            self._share = self._sampling / (self._sampling + begun - self._ended)

        tell_within(self._progress, step, self._steps, f"rollouts 0/{total}")

        def progress(done: int, total: int, figure: str = "") -> None:
            self._ended = time.perf_counter()
            self._sampling = self._ended - begun
            reward, _, rate = figure.partition(", ")
            shown = f"rollouts {done}/{total}, {rate}, {reward}"
            tell_within(self._progress, step + self._share * done / total, self._steps, shown)

        return RolloutProgress(progress, total, REWARD).after({})
