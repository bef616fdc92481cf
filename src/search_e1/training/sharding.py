"""Sharded weights, gradients and optimizer states (FSDP2), unsharded and sharded again."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(weight: Tensor) -> Tensor:
    """The unsharded ``weight``. All ranks must call this, in the same order."""
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of ``tensor``; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_state_dict(state: Any, keep: bool) -> Any:
    """``state`` with unsharded tensors on the CPU on ranks that ``keep`` them; other ranks only take part in the gather."""

    def gather(value: Any) -> Any:
        if isinstance(value, Tensor):
            whole = full_tensor(value)
            return whole.cpu() if keep else None
        if isinstance(value, dict):
            return {key: gather(part) for key, part in value.items()}
        return type(value)(map(gather, value)) if isinstance(value, list | tuple) else value

    return gather(state)


def shard_like(value: Tensor, part: Tensor) -> Tensor:
    """``value``, unsharded and equal on all ranks, sharded in the same way as ``part``."""
    if not isinstance(part, DTensor) or value.shape != part.shape:
        return value
    return distribute_tensor(value.to(part.device), part.device_mesh, part.placements, src_data_rank=None)


class UnshardedReplica:
    """An unsharded copy of a model, for sampling, merging and saving.

    Create it before the model is sharded. Between uses it holds no weights, unless told to keep them; when filled, every
    rank holds all of them.
    """

    def __init__(self, model: nn.Module) -> None:
        # Tied weights stay tied: they share one entry, and one empty tensor.
        empty = {id(weight): nn.Parameter(weight.new_empty(0), weight.requires_grad) for weight in model.parameters()}
        self.model: Any = copy.deepcopy(model, memo=empty)
        self._dtypes = {name: weight.dtype for name, weight in model.named_parameters()}

    def fill(self, sharded: Any, dtype: torch.dtype | None = None) -> Any:
        """The model with the weights of ``sharded``, cast to ``dtype`` if given; kept weights are overwritten in place.

        All ranks must call this.
        """
        weights = dict(sharded.named_parameters())
        for name, weight in self.model.named_parameters():
            whole, kind = full_tensor(weights[name]), dtype or self._dtypes[name]
            if (weight.shape, weight.dtype) == (whole.shape, kind):
                weight.data.copy_(whole)
            else:
                weight.data = whole.to(kind)
        return self.model

    @contextmanager
    def filled(self, sharded: Any, dtype: torch.dtype | None = None, *, keep: bool = False) -> Iterator[Any]:
        """``fill`` within the context; drops the weights at its end, unless ``keep``."""
        try:
            yield self.fill(sharded, dtype)
        finally:
            if not keep:
                for weight in self.model.parameters():
                    weight.data = weight.new_empty(0)
