"""How the trajectories of a step are ordered and cut into micro-batches."""

import random
from collections.abc import Sequence
from typing import Any

import torch

from search_e1.config import GrpoConfig
from search_e1.errors import ConfigError
from search_e1.types import Question

_MICRO_BATCH = 16
"""Most trajectories in one forward pass, unless ``per_device_train_batch_size`` says otherwise."""


def split(total: int, processes: int, trainer: dict[str, Any]) -> tuple[int, int]:
    """Trajectories of one forward pass, and forward passes of one optimiser step, on each process."""
    share, rest = divmod(total, processes)
    if rest:
        raise ConfigError(
            f"grpo.questions_per_step x grpo.group_size = {total} trajectories cannot be shared by {processes} processes; "
            f"change one of them, or launch {_listed(_divisors(total))}"
        )
    divisors = _divisors(share)
    micro = trainer.get("per_device_train_batch_size", max(n for n in divisors if n <= _MICRO_BATCH))
    if micro not in divisors:
        nearest = min(divisors, key=lambda n: abs(n - micro))
        raise ConfigError(
            f"grpo.trainer.per_device_train_batch_size = {micro} does not divide the {share} trajectories of a step; "
            f"use {nearest}"
        )
    return micro, share // micro


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _listed(numbers: Sequence[int]) -> str:
    *rest, last = map(str, numbers)
    return f"{', '.join(rest)} or {last}" if rest else last


def order(questions: Sequence[Question], config: GrpoConfig, seed: int) -> list[str]:
    """Ids of the questions of all steps: pass after pass over the questions, each shuffled anew."""
    shuffler, ids, count = random.Random(seed), [q.id for q in questions], config.steps * config.questions_per_step
    asked: list[str] = []
    while len(asked) < count:
        asked += shuffler.sample(ids, len(ids))
    return asked[:count]


WEIGHED_BY = {
    **dict.fromkeys(("grpo", "sapo", "luspo", "dr_grpo"), "rows"),
    "bnpo": "tokens",
    **dict.fromkeys(("dapo", "cispo"), "nothing"),
}
"""What TRL's mean over a micro-batch is taken over, by ``loss_type``: what makes the losses of its parts add up."""


def weight(batch: dict[str, Any], by: str) -> float:
    """Of a micro-batch, or a part of one, in a mean over ``by``."""
    if by == "nothing":  # a sum over a number that all micro-batches share
        return 1.0
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    return float(mask.sum()) if by == "tokens" else float(len(mask))


def part(batch: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """Some rows of a micro-batch, padding cut to what they need."""
    prompt = int(batch["prompt_mask"][rows].sum(1).max())
    completion = int(batch["completion_mask"][rows].sum(1).max())
    return {key: _cut(key, value, rows, prompt, completion) for key, value in batch.items()}


def by_length(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of TRL's micro-batches dealt anew: like lengths together, longest first, padding cut to what each needs.

    Tensors are [rows], [rows, width] or scalars; ``prompt_*`` are padded on the left, all others on the right. The mean
    over the rows of all micro-batches, and with it the gradient of a step, stays the same up to rounding.
    """
    lengths = torch.cat([batch["completion_mask"].sum(1) for batch in batches])
    order = lengths.argsort(descending=True, stable=True).chunk(len(batches))
    whole = {
        key: torch.cat([batch[key] for batch in batches]) if isinstance(value, torch.Tensor) and value.ndim else value
        for key, value in batches[0].items()
    }
    return [part(whole, rows) for rows in order]


def _cut(key: str, value: Any, rows: torch.Tensor, prompt: int, completion: int) -> Any:
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    if value.ndim == 1:
        return value[rows]
    return value[rows, -prompt:] if key.startswith("prompt_") else value[rows, :completion]
