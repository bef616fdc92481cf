"""The stage runner: makes a stage's artifact, or returns it if it is complete."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from search_e1 import runs
from search_e1.config import default_of
from search_e1.data.answers import in_language
from search_e1.errors import ConfigError, SearchE1Error
from search_e1.runs import Artifact, ranks
from search_e1.runs.checkpoints import Checkpointer
from search_e1.runs.context import StageContext
from search_e1.runs.devices import device
from search_e1.runs.progress import untracked
from search_e1.runs.safe import masked
from search_e1.runs.stopping import Stop
from search_e1.stages import tracking
from search_e1.stages.inputs import Inputs
from search_e1.stages.stage import Stage, sections
from search_e1.training import memory
from search_e1.training import policy as policies


class StageRunner:
    """Makes the artifacts of a run. Under torchrun every rank has a runner, and all run the same stages in the same order."""

    def __init__(self, run: Inputs, stop: Stop | None = None) -> None:
        """``stop`` says when to stop; see ``stopping.on_signals``."""
        self.run = run
        self.stop = stop or Stop()

    def check(self) -> None:
        """Check that the trackers are installed and that each rank has its own device.

        Raises:
            ConfigError: a tracker is missing, or a rank has no device of its own.
        """
        tracking.check(self.run.config.tracking)
        if ranks.count() == 1:
            return
        name = self.run.config.policy.device
        chosen = device(name)
        if chosen.index is not None:
            raise ConfigError(
                f"policy.device = {name!r}: each of {ranks.count()} processes takes its own device; write {chosen.type!r}"
            )
        if chosen.type != "cpu" and ranks.local_rank() >= (gpus := torch.accelerator.device_count()):
            raise ConfigError(
                f"process {ranks.local_rank()} of this machine has no {chosen.type} device: {gpus} are visible; start fewer "
                "(torchrun --nproc-per-node), or correct CUDA_VISIBLE_DEVICES"
            )

    def make(self, stage: Stage, out: Path | None = None) -> Artifact:
        """The artifact of ``stage`` in ``out`` (default: its place in the run); made unless it is complete already.

        Raises:
            RunError: the directory holds another artifact, or a damaged one.
            SearchE1Error: from the stage.
        """
        with in_language(self.run.config.rollout.answer_language):
            return self._make(stage, out)

    def _make(self, stage: Stage, out: Path | None) -> Artifact:
        config = self.run.config
        stage.check(self.run)
        if stage.parallel and ranks.count() > 1:
            _ = self.run.retriever  # opened by all ranks together, before rank 0 alone computes its checksum
        devices = ranks.count() if stage.parallel else 1
        settings = {**stage.settings(config), **sections(config, "prompts", "policy")}
        if "rollout" in settings and config.rollout.engine == "vllm":
            settings |= sections(config, "vllm.engine")
        return runs.artifact(
            out or self.run.root / str(stage.id),
            stage=str(stage.id),
            settings=masked(settings),
            inputs=self._inputs(stage),
            seed=self._seed(stage),
            make=lambda to: self._work(stage, to),
            defaults=default_of,
            parallel=stage.parallel,
            gpus=policies.accelerators(config.policy, devices) if stage.uses_device else 0,
        )

    def _inputs(self, stage: Stage) -> Mapping[str, str]:
        """The stage's inputs, which rank 0 computes; its error is raised on all ranks, since some are no end of the run."""
        found: Mapping[str, str] = {}
        error: SearchE1Error | None = None
        if ranks.is_first():
            try:
                found = stage.inputs(self.run)
            except SearchE1Error as raised:
                error = raised
        if error := ranks.broadcast_object(error):
            raise error
        return found

    def _work(self, stage: Stage, out: Path) -> Mapping[str, Any]:
        config, seed = self.run.config, self._seed(stage)
        name, step = tracking.run_of(stage.id)
        shown = masked(config.model_dump(mode="json"))
        tracker = tracking.tracked(config.tracking, self.run.root, name, shown, anew=name == str(stage.id))
        checkpointer = Checkpointer(out / runs.WORK, **config.checkpoints.model_dump(), stop=self.stop)
        with self.run.watch(str(stage.id)) as progress, tracker as track, memory.translate_oom(str(stage.id)):
            set_seed(seed)
            # Only rank 0 tracks.
            context = StageContext(out, seed, progress, track if ranks.is_first() else untracked, checkpointer)
            result = stage.work(self.run, context)
            if figures := tracking.figures_of(stage.id, result):
                track(step, figures)
            return result

    def _seed(self, stage: Stage) -> int:
        return runs.derived_seed(self.run.config.seed, stage.seed_name)
