"""Weights, gradients and optimizer states divided among ranks (FSDP2), as a whole again."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(weight: Tensor) -> Tensor:
    """All of ``weight``, of which each rank may hold a part. All ranks have to call this, in the same order."""
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_state_dict(state: Any, keep: bool) -> Any:
    """``state`` with whole tensors on the CPU, for those ranks that ``keep`` them; the others only do their part."""

    def gather(value: Any) -> Any:
        if isinstance(value, Tensor):
            whole = full_tensor(value)
            return whole.cpu() if keep else None
        if isinstance(value, dict):
            return {key: gather(part) for key, part in value.items()}
        return type(value)(map(gather, value)) if isinstance(value, list | tuple) else value

    return gather(state)


def shard_like(value: Tensor, part: Tensor) -> Tensor:
    """The part of ``value``, which is whole and the same on all ranks, that ``part`` is of its own whole."""
    if not isinstance(part, DTensor) or value.shape != part.shape:
        return value
    return distribute_tensor(value.to(part.device), part.device_mesh, part.placements, src_data_rank=None)


class UnshardedReplica:
    """A plain model with the weights of one that is about to be sharded: to sample from, to merge and to save.

    Made before the other is sharded. Between uses it holds no weights; filled, it holds all, on each rank.
    """

    def __init__(self, model: nn.Module) -> None:
        # Tied weights stay tied: they have one entry, and one empty tensor.
        empty = {id(weight): nn.Parameter(weight.new_empty(0), weight.requires_grad) for weight in model.parameters()}
        self.model: Any = copy.deepcopy(model, memo=empty)
        self._dtypes = {name: weight.dtype for name, weight in model.named_parameters()}

    def fill(self, sharded: Any, dtype: torch.dtype | None = None) -> Any:
        """The model with the weights of ``sharded``, as ``dtype`` if given. All ranks have to call this."""
        weights = dict(sharded.named_parameters())
        for name, weight in self.model.named_parameters():
            weight.data = full_tensor(weights[name]).to(dtype or self._dtypes[name])
        return self.model

    @contextmanager
    def filled(self, sharded: Any, dtype: torch.dtype | None = None) -> Iterator[Any]:
        """The same for as long as the context lasts."""
        try:
            yield self.fill(sharded, dtype)
        finally:
            for weight in self.model.parameters():
                weight.data = weight.new_empty(0)
