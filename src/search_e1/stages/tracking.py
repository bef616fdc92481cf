"""Live tracking: every stage's figures to TensorBoard, Weights & Biases, Trackio, ..., through transformers' integrations.

A stage is a run of the tracker, so that the rounds lie over one another in one chart. Figures have the names that they have in
``steps.jsonl``, in manifests and in the report, behind the prefix that transformers gives to all of them: ``train/reward``.
But for EM, of which charts hold two kinds: an evaluation's ``em`` is ``eval/em_greedy``, a pool's ``train/pool/em_sampled``.
"""

import difflib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from search_e1.config import TrackingConfig
from search_e1.errors import ConfigError
from search_e1.runs import ranks
from search_e1.runs.progress import Track, untracked
from search_e1.runs.stage_id import StageId

DIRECTORY = "tracking"
_EM = re.compile(r"(^|macro_|/)em(?=$|_(?!sampled))")
_PACKAGES = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "tensorboard"}


def check(config: TrackingConfig) -> None:
    """Find out before any work whether the trackers are there.

    Raises:
        ConfigError: a tracker that transformers does not know, or whose package is not installed.
    """
    for name in config.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            close = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            raise ConfigError(f"tracking.report_to: no tracker {name!r}; {hint}")
        package = _PACKAGES.get(name)
        if package and find_spec(package) is None:
            raise ConfigError(f"tracking.report_to: {name!r} needs the package {package}; pip install {package}")


@contextmanager
def tracked(config: TrackingConfig, run: Path, name: str, settings: Mapping[str, Any], *, anew: bool = True) -> Iterator[Track]:
    """What tells the trackers a step's figures, as the tracker's run ``name`` in ``config.project``.

    TensorBoard's files go to ``run / "tracking" / name``. ``anew`` removes those of a stage that was killed.

    Raises:
        ConfigError: see ``check``.
    """
    if not config.report_to or not ranks.is_first():  # one process of several tells
        yield untracked
        return
    check(config)
    directory = run / DIRECTORY / name
    if anew:
        shutil.rmtree(directory, ignore_errors=True)
    os.environ.setdefault("WANDB_PROJECT", config.project)
    arguments = _Arguments(settings, output_dir=str(directory), run_name=f"{run.name} {name}", project=config.project)
    state, control = TrainerState(is_world_process_zero=True, is_local_process_zero=True), TrainerControl()
    trackers = [INTEGRATION_TO_CALLBACK[tracker]() for tracker in config.report_to]
    for tracker in trackers:
        if hasattr(tracker, "logging_dir"):  # TensorBoard's; its own default would be lost with an artifact in the making
            tracker.logging_dir = str(directory)
        tracker.on_train_begin(arguments, state, control, model=None)

    def track(step: int, figures: Mapping[str, float]) -> None:
        state.global_step = step
        for tracker in trackers:
            tracker.on_log(arguments, state, control, model=None, logs=dict(figures))

    try:
        yield track
    finally:
        for tracker in trackers:
            tracker.on_train_end(arguments, state, control, model=None)
        if "wandb" in config.report_to:
            import_module("wandb").finish()  # transformers leaves it open, and the next stage would go on in it


def run_of(stage: StageId) -> tuple[str, int]:
    """The tracker's run that a stage belongs to, and the stage's step in it.

    A stage that trains is a run of its own. Evaluated policies are the steps of one run (0 is base, then two a round), and so
    are the rounds, with what pool, pairs and lead came to.
    """
    if stage.kind in ("pool", "pairs", "lead"):
        return "rounds", stage.round or 0
    if stage.kind in ("recall", "preflight") or str(stage) == "evaluation-base":
        return "evaluation", 0
    subject = stage.subject
    if stage.kind == "evaluation" and subject.kind in ("grpo", "ofsd") and subject.round:
        return "evaluation", 2 * subject.round - (subject.kind == "grpo")
    return str(stage), 0


def figures_of(stage: StageId, result: Mapping[str, Any]) -> dict[str, float]:
    """What trackers get of a stage when it is complete; nothing of one that tracked its steps. ``eval_`` becomes ``eval/``.

    Side by side in one place, every EM says whether it is greedy or sampled: an evaluation's ``em`` is the one, a pool's the
    other.
    """
    if stage.kind == "evaluation":
        parts = {f"{name}/em": scores["em"] for name, scores in result.get("by_benchmark", {}).items()}
        return _numbers({**result, **parts}, "eval_", "greedy")
    if stage.kind not in ("pool", "pairs", "lead"):
        return {}
    lead = {"lead": result["em_privileged"] - result["em_plain"]} if stage.kind == "lead" else {}
    return _numbers({**result, **lead}, f"{stage.kind}/", "sampled")


def _numbers(figures: Mapping[str, Any], prefix: str, em: str) -> dict[str, float]:
    """What of ``figures`` is a number; EM that does not say it is greedy or sampled is ``em``."""
    named = {_EM.sub(rf"\1em_{em}", name): value for name, value in figures.items()}
    return {f"{prefix}{name}": value for name, value in named.items() if isinstance(value, int | float)}


class _Arguments(TrainingArguments):
    """What trackers ask of a trainer's arguments; as settings they get the run's own."""

    def __init__(self, settings: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(report_to="none", use_cpu=True, **kwargs)
        self._settings = dict(settings)

    def to_dict(self) -> dict[str, Any]:
        return self._settings

    def to_sanitized_dict(self) -> dict[str, Any]:
        return self._settings

    def to_json_string(self) -> str:
        return json.dumps(self._settings, indent=2)
