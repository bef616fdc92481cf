"""Live tracking: logs stage figures to TensorBoard, Weights & Biases, Trackio, ..., through transformers' integrations.

Each stage that trains is its own tracker run, so that one chart overlays the rounds. Figures are named as in ``steps.jsonl``,
manifests and the report, with the prefix that transformers adds: ``train/reward``. Only EM is renamed, since charts hold two
kinds: an evaluation's ``em`` becomes ``eval/em_greedy``, a pool's ``train/pool/em_sampled``.
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
    """Check that the trackers are known and installed.

    Raises:
        ConfigError: transformers does not know a tracker, or its package is not installed.
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
    """A function that logs a step's figures to the trackers, as tracker run ``name`` in ``config.project``.

    TensorBoard writes to ``run / "tracking" / name``. ``anew`` first removes the files of an interrupted stage.

    Raises:
        ConfigError: see ``check``.
    """
    if not config.report_to or not ranks.is_first():  # only rank 0 tracks
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
        if hasattr(tracker, "logging_dir"):  # TensorBoard; its default directory is lost with an unfinished artifact
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
            import_module("wandb").finish()  # transformers leaves the run open, and the next stage would continue it


def run_of(stage: StageId) -> tuple[str, int]:
    """The tracker run that a stage belongs to, and its step there.

    A stage that trains is a tracker run of its own. Evaluations are steps of one run: 0 is the base policy, 1 the cold start,
    then two per round. The figures of pool, pairs and lead are in one run whose steps are the rounds.
    """
    if stage.kind in ("pool", "pairs", "lead"):
        return "rounds", stage.round or 0
    if stage.kind in ("recall", "preflight") or str(stage) == "evaluation-base":
        return "evaluation", 0
    subject = stage.subject
    if stage.kind == "evaluation" and str(subject) == "coldstart":
        return "evaluation", 1
    if stage.kind == "evaluation" and subject.kind in ("grpo", "ofsd") and subject.round:
        return "evaluation", 2 * subject.round + (subject.kind == "ofsd")
    return str(stage), 0


def figures_of(stage: StageId, result: Mapping[str, Any]) -> dict[str, float]:
    """The figures logged when a stage completes; none for a stage that logs its steps.

    transformers turns the prefix ``eval_`` into ``eval/``. Every EM is named greedy or sampled, since charts show both: an
    evaluation's is greedy, a pool's sampled.
    """
    if stage.kind == "evaluation":
        parts = {f"{name}/em": scores["em"] for name, scores in result.get("by_benchmark", {}).items()}
        return _numbers({**result, **parts}, "eval_", "greedy")
    if stage.kind not in ("pool", "pairs", "lead"):
        return {}
    lead = {"lead": result["em_privileged"] - result["em_plain"]} if stage.kind == "lead" else {}
    return _numbers({**result, **lead}, f"{stage.kind}/", "sampled")


def _numbers(figures: Mapping[str, Any], prefix: str, em: str) -> dict[str, float]:
    """The numbers in ``figures``, with ``prefix``; ``em`` is appended to EM names unless they say "sampled"."""
    named = {_EM.sub(rf"\1em_{em}", name): value for name, value in figures.items()}
    return {f"{prefix}{name}": value for name, value in named.items() if isinstance(value, int | float)}


class _Arguments(TrainingArguments):
    """The trainer arguments that trackers read; reports the run's settings as its own."""

    def __init__(self, settings: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(report_to="none", use_cpu=True, **kwargs)
        self._settings = dict(settings)

    def to_dict(self) -> dict[str, Any]:
        return self._settings

    def to_sanitized_dict(self) -> dict[str, Any]:
        return self._settings

    def to_json_string(self) -> str:
        return json.dumps(self._settings, indent=2)
