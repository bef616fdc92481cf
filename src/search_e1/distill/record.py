"""What a distillation tells about itself: a line a step, and a summary."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from search_e1.runs.progress import Progress, Track
from search_e1.training.resuming import figures


class StepLog(TrainerCallback):
    """Writes a line a step and tells progress and track."""

    def __init__(
        self, path: Path, progress: Progress, track: Track, earlier: Sequence[dict[str, float]], name: str
    ) -> None:
        """``earlier``: the steps before the first, which ``path`` holds already; they are tracked once more. ``name`` is what
        the loss is called."""
        self.path = path
        self.name = name
        self.progress = progress
        self.track = track
        self.steps = list(earlier)
        self._started = time.monotonic()
        for step in earlier:
            track(int(step["step"]), figures(step))

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.monotonic()

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        now = time.monotonic()
        told = {k: logs[k] for k in ("loss", "grad_norm", "learning_rate", "halved") if k in logs}
        self.steps.append({"step": state.global_step, **told, "seconds": round(now - self._started, 4)})
        if not state.is_world_process_zero:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(self.steps[-1]) + "\n")
        self._started = now
        self.track(state.global_step, told)
        self.progress(state.global_step, state.max_steps, f"{self.name} {logs['loss']:.4f}")


def summarize(steps: Sequence[Mapping[str, float]], loss: str) -> dict[str, float]:
    """How many steps, and how long; means of the loss, which is called ``loss``, over their first and their last tenth."""
    losses = [step["loss"] for step in steps]
    tenth = max(1, len(losses) // 10)
    return {
        "steps": len(losses),
        "halved": sum(int(step.get("halved", 0)) for step in steps),
        f"{loss}_first": fmean(losses[:tenth]),
        f"{loss}_last": fmean(losses[-tenth:]),
        "seconds": sum(step["seconds"] for step in steps),
    }
