"""How training saves a step and goes on from it, to the bit: transformers' trainers, and loops of our own."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerState, trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from search_e1.runs import ranks
from search_e1.runs.checkpoints import Work
from search_e1.training import zero3
from search_e1.training.sharding import like, wholes

STEPS = "steps.jsonl"
_WEIGHTS, _STATE = "trained.safetensors", "trainer_state.json"


class ResumingTrainer(Trainer):
    """A trainer whose steps outlive a kill.

    A checkpoint holds the weights that are trained (the others are the policy's, which is on disk), optimiser, scheduler,
    random states, the trainer's own state, and the lines of the steps so far. Trainers must have nothing else that a later
    step depends on: an order of data that follows from seed and epoch, and no batch in store (``at_boundary``). Of several
    processes the first writes, and each its own random states. What they divide among them is saved whole, so that another
    number of them can go on, dividing otherwise.
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
                return
            complete = _complete(TrainerState.load_from_json(str(checkpoint / _STATE)))
            if complete or self.is_deepspeed_enabled:
                self._load_from_checkpoint(str(checkpoint))
            if not complete:
                with _no_checkpoint_of_deepspeeds():
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
        optimizer: Any = self.optimizer
        weights = wholes(_trained(self.model), keep=ranks.is_first())
        if self.is_deepspeed_enabled:
            states = zero3.state_dict(optimizer.optimizer)
        else:
            states = wholes(optimizer.state_dict(), keep=ranks.is_first())
        if not ranks.is_first():
            return
        save_file(weights, directory / _WEIGHTS)
        torch.save(states, directory / OPTIMIZER_NAME)
        assert self.lr_scheduler is not None
        torch.save(self.lr_scheduler.state_dict(), directory / SCHEDULER_NAME)
        self._save_scaler(str(directory))
        self.state.save_to_json(str(directory / _STATE))
        shutil.copyfile(self.steps, directory / STEPS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(model or self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer: Any = self.optimizer
        saved = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        if self.is_deepspeed_enabled:
            zero3.load_state_dict(optimizer.optimizer, saved)
        else:
            ids = [id for group in saved["param_groups"] for id in group["params"]]
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            for id, weight in zip(ids, weights, strict=True):
                state = saved["state"].get(id, {})
                state.update({name: like(value, weight) for name, value in state.items() if torch.is_tensor(value)})
            optimizer.load_state_dict(saved)
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


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
    save_file(wholes(_trained(model), keep=True), directory / _WEIGHTS)


def load_trained(model: Any, directory: Path) -> None:
    """Set the weights of ``model`` that are trained to those of ``save_trained``."""
    saved, there = load_file(directory / _WEIGHTS), _trained(model)
    assert saved.keys() == there.keys(), "the checkpoint is of another policy"
    for name, weight in there.items():
        weight.detach().copy_(like(saved[name], weight))


def _complete(state: TrainerState) -> bool:
    return state.global_step >= state.max_steps


def _trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@contextmanager
def _no_checkpoint_of_deepspeeds() -> Iterator[None]:
    """Transformers would look for one, which none but as many processes could go on from."""
    load, trainer.deepspeed_load_checkpoint = trainer.deepspeed_load_checkpoint, lambda *_, **__: None
    try:
        yield
    finally:
        trainer.deepspeed_load_checkpoint = load
