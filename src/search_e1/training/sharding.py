"""Weights, gradients and optimiser states divided among the processes that train, through accelerate: FSDP2 and ZeRO-3."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from transformers import TrainingArguments

from search_e1.config import Sharding
from search_e1.errors import ConfigError
from search_e1.runs import ranks
from search_e1.training import zero3


def check(sharding: Sharding, dtype: str, trainers: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether a policy of ``dtype`` can be trained so, with the further arguments of ``trainers`` (by their section).

    Raises:
        ConfigError: it cannot; says what to change.
    """
    if sharding != "zero3":
        return
    zero3.check()
    if dtype != "float32":
        raise ConfigError(
            f'policy.dtype = "{dtype}": launch.sharding = "zero3" trains weights in float32; set that, and bf16 = true in '
            '[grpo.trainer] and [distill.trainer], or set launch.sharding = "fsdp2"'
        )
    for section, given in trainers.items():
        if given.get("fp16"):
            raise ConfigError(f'{section}.fp16: not with launch.sharding = "zero3"; set bf16 = true instead')


def dividing(sharding: Sharding, given: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Of ``transformers.TrainingArguments`` for ``sharding``, beside those ``given``; none with one process alone.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    if sharding == "none" or ranks.count() == 1:
        return {}
    by = DistributedType.MULTI_GPU if sharding == "fsdp2" else DistributedType.DEEPSPEED
    more = given.get("accelerator_config", {}) | (_taken_for_accelerators(by) if device.type == "cpu" else {})
    if sharding == "zero3":
        zero3.check()
        zero3.find(device)
        # Its own mixed precision would round weights; see there.
        chosen = zero3.configuration(autocast=bool(given.get("bf16")))
        return {"deepspeed": chosen, "bf16": False, "accelerator_config": more}
    # Gradients are divided after each micro-batch, instead of being held whole until the last.
    more |= {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    return {
        "fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}, "accelerator_config": more,
    }  # fmt: skip


def _taken_for_accelerators(by: DistributedType) -> dict[str, Any]:
    """Accelerate divides weights on accelerators only, and what it calls for that works on CPUs just as well."""
    AcceleratorState._reset_state(reset_partial_state=True)
    state: Any = PartialState(cpu=True)
    state.distributed_type = by
    return {"use_configured_state": True}


def settle(given: TrainingArguments) -> None:
    """What their own arguments cannot say, before a trainer is made with them."""
    if given.fsdp_plugin_args is not None and given.bf16:
        # Beside products in bfloat16, accelerate's own policy would also add up gradients and round losses and
        # log-probabilities to it.
        given.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def divides(given: TrainingArguments) -> bool:
    """Whether a trainer with these arguments divides weights."""
    return given.fsdp_plugin_args is not None or given.deepspeed is not None


def multiplied_in(given: TrainingArguments) -> torch.dtype | None:
    """The type of products in passes, where it is not the weights' own."""
    autocast = isinstance(given.deepspeed, dict) and given.deepspeed["torch_autocast"]["enabled"]
    return torch.bfloat16 if given.bf16 or autocast else None


def whole(weight: Tensor) -> Tensor:
    """All of ``weight``, of which each process may hold a part. All have to call this, in the same order."""
    if zero3.divided(weight):
        return zero3.whole(weight)
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def wholes(state: Any, keep: bool) -> Any:
    """``state`` with whole tensors, on the CPU, for those that ``keep`` them; others only do their part."""

    def gathered(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        found = whole(value)
        return found.cpu() if keep else None

    return tree_map(gathered, state)


def like(value: Tensor, part: Tensor) -> Tensor:
    """The same part of ``value``, which is whole and the same on all processes, that ``part`` is of its own whole."""
    if not isinstance(part, DTensor) or value.shape != part.shape:
        return value
    value = value.to(part.device)
    return distribute_tensor(value, part.device_mesh, part.placements, src_data_rank=None)


class Twin:
    """A plain model with the weights of one that is about to be divided: to sample from, to merge and to save.

    Made before the other is divided. Between uses it holds no weights; filled, it holds all, on each process.
    """

    def __init__(self, model: nn.Module) -> None:
        # Tied weights stay tied: they have one entry, and one empty tensor.
        empty = {id(weight): nn.Parameter(weight.new_empty(0), weight.requires_grad) for weight in model.parameters()}
        self.model: Any = copy.deepcopy(model, memo=empty)
        self._dtypes = {name: weight.dtype for name, weight in model.named_parameters()}

    def fill(self, divided: Any, dtype: torch.dtype | None = None) -> Any:
        """The model with the weights of ``divided``, as ``dtype`` if given. All processes have to call this."""
        weights = dict(divided.named_parameters())
        for name, weight in self.model.named_parameters():
            weight.data = whole(weights[name]).to(dtype or self._dtypes[name])
        return self.model

    @contextmanager
    def filled(self, divided: Any, dtype: torch.dtype | None = None) -> Iterator[Any]:
        """The same for as long as the context is."""
        try:
            yield self.fill(divided, dtype)
        finally:
            for weight in self.model.parameters():
                weight.data = weight.new_empty(0)
