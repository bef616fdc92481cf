"""Checkpoints of training: everything that a step depends on, restored bit for bit."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from search_e1.runs import ranks
from search_e1.runs.checkpoints import RANK
from search_e1.training.guard import Guard
from search_e1.training.sharding import full_state_dict, local_part, shard_like
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Sample

_WEIGHTS, _OPTIMIZERS, _STEPS = "trained.safetensors", "optimizers.pt", "steps.json"
_BEST = "best.safetensors"


@dataclass(slots=True)
class Unfinished:
    """A step that was interrupted between two passes: its samples and its progress. Each rank has its own."""

    samples: dict[str, list[Sample]]
    update: int = 0
    """Completed updates."""
    passes: int = 0
    """Completed passes of the current update, accumulated in the gradients."""
    halvings: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    """The step's figures so far."""
    sums_before: dict[str, float] = field(default_factory=dict)
    """The same before the current update, which restarts if memory runs out."""
    source_figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Trained weights (the frozen ones are on disk with the policy), optimizers, schedules, random states and records.

    Rank 0 saves sharded state unsharded, so that a run can resume with another number of ranks. An unfinished step and random
    states are saved per rank: with another number of ranks, the step restarts.
    """

    policy: TrainedPolicy
    optimizers: Sequence[Optimizer]
    schedules: Sequence[LRScheduler]
    guard: Guard | None = None

    def save(self, directory: Path, records: Sequence[dict[str, float]], unfinished: Unfinished | None) -> None:
        torch.save(self._of_rank(unfinished), directory / f"{RANK}{ranks.rank()}.pt")
        if (directory / _STEPS).exists():
            return  # copied from the previous step's checkpoint; see `Checkpointer.between_passes`
        weights = full_state_dict(dict(self.policy.parameters), keep=ranks.is_first())
        states = full_state_dict([o.state_dict() for o in self.optimizers], keep=ranks.is_first())
        if not ranks.is_first():
            return
        save_file(weights, directory / _WEIGHTS)
        if self.guard and self.guard.weights:
            save_file(self.guard.weights, directory / _BEST)
        torch.save({"optimizers": states, "schedules": [s.state_dict() for s in self.schedules]}, directory / _OPTIMIZERS)
        (directory / _STEPS).write_text(json.dumps(list(records)), encoding="utf-8")

    def _of_rank(self, unfinished: Unfinished | None) -> dict[str, Any]:
        state: dict[str, Any] = {
            "leveled_over": ranks.count(),  # a step interrupted when ranks still kept their own samples restarts
            "passes": (self.policy.fitted, self.policy.micro_batch_tokens, self.policy.checkpointing),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        if unfinished:
            state["unfinished"] = {
                "samples": {name: [s.model_dump_json() for s in part] for name, part in unfinished.samples.items()},
                "update": unfinished.update,
                "passes": unfinished.passes,
                "halvings": unfinished.halvings,
                "sums": unfinished.sums,
                "sums_before": unfinished.sums_before,
                "source_figures": unfinished.source_figures,
            }
            if unfinished.passes:
                gradients = {n: w.grad for n, w in self.policy.parameters.items() if w.grad is not None}
                # Before the last pass of an update, DDP and FSDP gradients are local to each rank.
                state["gradients"] = {name: local_part(gradient) for name, gradient in gradients.items()}
        return state

    def restore(self, directory: Path | None) -> tuple[list[dict[str, float]], Unfinished | None]:
        """The records of the completed steps, and the current step if it was interrupted."""
        if directory is None:
            return [], None
        saved, trained = load_file(directory / _WEIGHTS), self.policy.parameters
        shapes = [{name: weight.shape for name, weight in weights.items()} for weights in (saved, trained)]
        assert shapes[0] == shapes[1], "the checkpoint is of another policy"
        for name, weight in trained.items():
            weight.detach().copy_(shard_like(saved[name], weight))
        if self.guard and (directory / _BEST).exists() and ranks.is_first():
            self.guard.weights = load_file(directory / _BEST)
        shared = torch.load(directory / _OPTIMIZERS, map_location="cpu", weights_only=True)
        for optimizer, state in zip(self.optimizers, shared["optimizers"], strict=True):
            _load_optimizer(optimizer, state)
        for schedule, state in zip(self.schedules, shared["schedules"], strict=True):
            schedule.load_state_dict(state)
        records: list[dict[str, float]] = json.loads((directory / _STEPS).read_text(encoding="utf-8"))
        own = directory / f"{RANK}{ranks.rank()}.pt"
        mine: dict[str, Any] = torch.load(own, map_location="cpu", weights_only=True) if own.exists() else {}
        if any(n != ranks.count() for n in ranks.all_gather_object(mine.get("leveled_over"))):
            return records, None
        torch.set_rng_state(mine["random"])
        self.policy.fitted, self.policy.micro_batch_tokens, checkpointing = mine["passes"]
        if checkpointing and not self.policy.checkpointing:
            self.policy.enable_checkpointing()
        if mine["random_cuda"]:
            torch.cuda.set_rng_state_all(mine["random_cuda"])
        return records, self._unfinished(mine)

    def _unfinished(self, mine: dict[str, Any]) -> Unfinished | None:
        if "unfinished" not in mine:
            return None
        for name, gradient in mine.get("gradients", {}).items():
            weight = self.policy.parameters[name]
            weight.grad = torch.zeros_like(weight)
            local_part(weight.grad).copy_(gradient)
        kept = mine["unfinished"]
        samples = {name: [Sample.model_validate_json(s) for s in part] for name, part in kept.pop("samples").items()}
        return Unfinished(samples, **kept)


def _load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    ids = [id for group in saved["param_groups"] for id in group["params"]]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for id, weight in zip(ids, weights, strict=True):
        state = saved["state"].get(id, {})
        state.update({name: shard_like(value, weight) for name, value in state.items() if torch.is_tensor(value)})
    optimizer.load_state_dict(saved)
    for id, weight in zip(ids, weights, strict=True):  # torch casts states to the weight's dtype; Muon's momentum is float32
        for name, value in saved["state"].get(id, {}).items():
            if name != "step" and torch.is_tensor(value):
                optimizer.state[weight][name] = value.to(weight.device)
