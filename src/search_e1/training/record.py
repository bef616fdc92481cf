"""The record of a training stage: one line of figures per step."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from search_e1.runs import ranks
from search_e1.runs.context import StageContext
from search_e1.runs.progress import Progress, tell_within

STEPS = "steps.jsonl"


class StepLog:
    """Keeps each step's figures, writes them as a JSON line, and passes them to progress and trackers."""

    def __init__(self, context: StageContext, earlier: Sequence[dict[str, float]], total: int, headline: str = "loss") -> None:
        """``earlier``: steps before the first one of this process; written and tracked again."""
        self.steps = list(earlier)
        self._context, self._total, self._headline = context, total, headline
        self._path = context.out / STEPS if ranks.is_first() else Path(os.devnull)
        self._path.write_text("".join(json.dumps(step) + "\n" for step in earlier), encoding="utf-8")
        for step in earlier:
            context.track(int(step["step"]), _tracked(step))
        self._last = time.perf_counter()
        tell_within(context.progress, len(earlier), total)

    def add(self, figures: Mapping[str, float]) -> None:
        """Record the figures of a finished step."""
        now = time.perf_counter()
        step = {"step": len(self.steps) + 1, **figures, "seconds": round(now - self._last, 4)}
        self._last = now
        self.steps.append(step)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(step) + "\n")
        self._context.track(len(self.steps), _tracked(step))
        self._context.progress(len(self.steps), self._total, self._headline_text())

    def _headline_text(self) -> str:
        """The headline of the last step, and trained tokens per second if they are counted."""
        step = self.steps[-1]
        rate = f", {step['tokens'] / step['seconds']:.0f} tok/s" if "tokens" in step and step["seconds"] else ""
        return f"{self._headline} {step.get(self._headline, math.nan):.4g}{rate}"

    def passes(self, begun: float, updates: int) -> "Passes":
        """Progress of the next step's passes. The step began at ``begun`` (``perf_counter``); its samples are complete."""
        before = f"{self._headline_text()}, " if self.steps else ""
        return Passes(self._context.progress, len(self.steps), self._total, before, begun, updates)


class Passes:
    """Progress within a step, by passes.

    The completed share of a step is estimated in time: the sampling time, plus the passes at their current rate.
    """

    def __init__(self, progress: Progress, step: int, steps: int, before: str, begun: float, updates: int) -> None:
        self._progress, self._step, self._steps, self._before, self._updates = progress, step, steps, before, updates
        self._passes_begun = time.perf_counter()
        self._sampled = self._passes_begun - begun

    def tell(self, update: int, done: int, total: int) -> None:
        """Report that ``done`` of the ``total`` passes of an update (from 0) are complete."""
        taken = time.perf_counter() - self._passes_begun
        expected = taken / ((update + done / total) / self._updates)
        share = (self._sampled + taken) / (self._sampled + expected)
        shown = f"{self._before}pass {update * total + done}/{self._updates * total}"
        tell_within(self._progress, self._step + share, self._steps, shown)


def _tracked(step: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in step.items() if name not in ("step", "seconds")}


def ends(steps: Sequence[Mapping[str, float]], figure: str, share: float, name: str | None = None) -> dict[str, float]:
    """Means of a figure over the first and last ``share`` of the steps, as ``NAME_first`` and ``NAME_last``."""
    part = max(1, int(len(steps) * share))
    name = name or figure
    return {f"{name}_first": mean(steps[:part], figure), f"{name}_last": mean(steps[-part:], figure)}


def mean(steps: Sequence[Mapping[str, float]], figure: str) -> float:
    """Mean of a figure over the steps that have it; NaN if none has."""
    values = [step[figure] for step in steps if figure in step]
    return fmean(values) if values else math.nan
