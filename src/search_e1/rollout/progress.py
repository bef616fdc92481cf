"""Progress of sampling: number of trajectories, their reward, and the rate."""

import time
from collections import Counter
from collections.abc import Mapping

from search_e1.rollout.loop import OnTrajectory, Spent
from search_e1.rollout.sampler import tally
from search_e1.runs.progress import Progress, tell_within
from search_e1.types import Trajectory

REWARD = "reward"


class RolloutProgress:
    """Reports trajectories as they end; with several processes, the first one reports its own."""

    def __init__(self, progress: Progress, total: int, name: str, *, before: int = 0, detailed: bool = False) -> None:
        """
        Args:
            name: label of EM; ``REWARD`` shows the reward instead.
            before: trajectories of earlier work that ``total`` includes.
            detailed: also show searches and stop reasons.
        """
        self._progress, self._total, self._name, self._before, self._detailed = progress, total, name, before, detailed
        self._tokens, self._seconds = 0, 0.0
        """Of this process only: a rate over several attempts would include the time between them."""

    def after(self, sums: Mapping[str, float]) -> OnTrajectory:
        """The callback for the next chunk; ``sums``: those of ``sampler.tally`` over the finished chunks."""
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
    """Progress of rollouts within a training step; estimates their share of a step from the previous step."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress, self._steps = progress, steps
        self._share, self._ended, self._sampling = 0.5, 0.0, 0.0

    def of(self, step: int, total: int) -> OnTrajectory:
        """The callback for the rollouts of ``step`` (from 0), with ``total`` trajectories."""
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
