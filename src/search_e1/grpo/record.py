"""What a GRPO stage tells about itself: a line a step, and a summary."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from search_e1.runs.progress import Progress, Track
from search_e1.training.resuming import figures


class Recorder:
    """Keeps each step's figures, writes them as a JSON line, and tells ``progress`` and ``track``."""

    def __init__(
        self, file: TextIO, total: int, progress: Progress, track: Track, earlier: Sequence[dict[str, float]] = ()
    ) -> None:
        """``earlier``: the steps before the first, which ``file`` holds already; they are tracked once more."""
        self.steps = list(earlier)
        for step in earlier:
            track(int(step["step"]), figures(step))
        self._file, self._total, self._progress, self._track = file, total, progress, track
        self._last = time.perf_counter()

    def __call__(self, step: int, told: Mapping[str, float]) -> None:
        now = time.perf_counter()
        self.steps.append({"step": step, **told, "seconds": round(now - self._last, 3)})
        self._last = now
        self._file.write(json.dumps(self.steps[-1]) + "\n")
        self._file.flush()
        self._track(step, told)
        self._progress(step, self._total, f"reward {told.get('reward', math.nan):.3f}")


def summarize(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the first and the last quarter of the steps (``_first``, ``_last``), or over all of them."""
    if not steps:
        return {"steps": 0}
    quarter = max(1, len(steps) // 4)
    first, last = steps[:quarter], steps[-quarter:]
    return {
        "steps": len(steps),
        "seconds": round(sum(step["seconds"] for step in steps), 3),
        "reward_first": _mean(first, "reward"),
        "reward_last": _mean(last, "reward"),
        "mixed": _mean(steps, "mixed"),
        "searches_last": _mean(last, "searches"),
        "sampled_tokens_last": _mean(last, "sampled_tokens"),
        "halved": sum(step.get("halved", 0) for step in steps),
    }


def _mean(steps: Sequence[Mapping[str, float]], figure: str) -> float:
    values = [step[figure] for step in steps if figure in step]  # absent where a step trains on an earlier one's groups
    return round(sum(values) / len(values), 4) if values else math.nan
