"""How training saves a step and goes on from it, to the bit: transformers' trainers, and loops of our own."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerState

from search_e1 import ranks
from search_e1.runs.checkpoints import Work

STEPS = "steps.jsonl"
_WEIGHTS, _STATE = "trained.safetensors", "trainer_state.json"


class ResumingTrainer(Trainer):
    """A trainer whose steps outlive a kill.

    A checkpoint holds the weights that are trained (the others are the policy's, which is on disk), optimiser, scheduler,
    random states, the trainer's own state, and the lines of the steps so far. Trainers must have nothing else that a later
    step depends on: an order of data that follows from seed and epoch, and no batch in store (``at_boundary``). Of several
    processes the first writes, and each its own random states.
    """

    work: Work = Work()
    steps: Path
    """The file with a line a step."""

    def train_on(self, work: Work, steps: Path, checkpoint: Path | None) -> None:
        """Train from ``checkpoint`` (of ``work.newest``) on, or from the beginning.

        Raises:
            Stopped: a signal has asked to stop; the step at hand is finished and saved.
        """
        self.work, self.steps = work, steps
        with work.finishing():
            if checkpoint is None:
                self.train()
            elif _complete(TrainerState.load_from_json(str(checkpoint / _STATE))):
                self._load_from_checkpoint(str(checkpoint))
            else:
                self.train(resume_from_checkpoint=str(checkpoint))

    def at_boundary(self) -> bool:
        """Whether nothing that was prepared for the steps to come would be lost."""
        return True

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """What transformers calls at the end of each step, when its figures are known."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.at_boundary():
            self.work.reached(self.state.global_step, self._write)

    def _write(self, directory: Path) -> None:
        self._save_rng_state(str(directory))  # each rank its own
        if not ranks.is_first():
            return
        save_trained(self.model, directory)
        self._save_optimizer_and_scheduler(str(directory))
        self._save_scaler(str(directory))
        self.state.save_to_json(str(directory / _STATE))
        shutil.copyfile(self.steps, directory / STEPS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(model or self.model, Path(resume_from_checkpoint))


def restored_steps(checkpoint: Path | None, path: Path) -> list[dict[str, float]]:
    """The steps up to ``checkpoint``, none without one; the first rank makes ``path`` hold their lines and no more."""
    lines = (checkpoint / STEPS).read_text(encoding="utf-8") if checkpoint else ""
    if ranks.is_first():
        path.write_text(lines, encoding="utf-8")
    return [json.loads(line) for line in lines.splitlines()]


def figures(step: Mapping[str, float]) -> dict[str, float]:
    """What is tracked of a line of ``steps.jsonl``."""
    return {name: value for name, value in step.items() if name not in ("step", "seconds")}


def save_trained(model: Any, directory: Path) -> None:
    """Write the weights of ``model`` that are trained."""
    save_file(_trained(model), directory / _WEIGHTS)


def load_trained(model: Any, directory: Path) -> None:
    """Set the weights of ``model`` that are trained to those of ``save_trained``."""
    saved, there = load_file(directory / _WEIGHTS), _trained(model)
    assert saved.keys() == there.keys(), "the checkpoint is of another policy"
    for name, weight in there.items():
        weight.copy_(saved[name])


def _complete(state: TrainerState) -> bool:
    return state.global_step >= state.max_steps


def _trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
