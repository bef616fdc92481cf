"""Optimizers and the learning-rate schedule of all training stages."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from search_e1.config import TrainingConfig
from search_e1.training.sharding import full_tensor, shard_like


def make_optimizers(model: Any, config: TrainingConfig, learning_rate: float) -> list[torch.optim.Optimizer]:
    """The optimizers of ``config.optimizer`` over the trainable weights of ``model``.

    Under ``muon``, Muon optimizes the matrices inside the layers and AdamW the rest (embeddings, head, norms, convolutions).
    Muon's update is scaled to the root mean square of AdamW's, so that both share the learning rate.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if config.optimizer == "adamw":
        return [_adamw(trained, config, learning_rate)]
    ends = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    matrices = [weight for weight in trained if weight.ndim == 2 and id(weight) not in ends]
    inside = set(map(id, matrices))
    rest = [weight for weight in trained if id(weight) not in inside]
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(Muon(matrices, {"lr": learning_rate, "weight_decay": config.weight_decay}))
    if rest:
        made.append(_adamw(rest, config, learning_rate))
    return made


def _adamw(weights: Iterable[nn.Parameter], config: TrainingConfig, learning_rate: float) -> torch.optim.Optimizer:
    weights = list(weights)
    decayed = [weight for weight in weights if weight.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=learning_rate, betas=config.betas, fused=True)


def rate(step: int, steps: int, config: TrainingConfig) -> float:
    """Multiplier of the learning rate at update ``step`` (from 0) of ``steps``."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[config.schedule]


class Muon(torch.optim.Optimizer):
    """Momentum with updates orthogonalized by five Newton-Schulz steps (Jordan et al., 2024) and scaled by 0.2 sqrt(max(n, m))
    to the root mean square of AdamW's updates (Liu et al., arXiv:2502.16982).

    ``torch.optim.Muon`` computes in bfloat16, which many CPUs emulate: its step then costs more than the forward and backward
    pass of a small model. For a sharded matrix, each rank orthogonalizes the whole matrix and keeps its shard.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad.float()
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(gradient))
                momentum.lerp_(gradient, 0.05)
                nesterov = gradient.lerp(momentum, 0.95)
                update = shard_like(_orthogonal(full_tensor(nesterov)), nesterov)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Approximately the nearest matrix [n, m] with all singular values 1 (the result's are between 0.7 and 1.2)."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
