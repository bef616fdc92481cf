"""DeepSpeed's ZeRO-3: the configuration that it is given, and weights and states in whole. All that knows DeepSpeed."""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from search_e1.errors import ConfigError


def check() -> None:
    """
    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            'launch.sharding = "zero3" needs DeepSpeed, an extra: pip install --no-build-isolation "search-e1[deepspeed]"; or '
            'set "fsdp2"'
        )


def configuration(*, autocast: bool) -> dict[str, Any]:
    """For ``transformers.TrainingArguments(deepspeed=...)``, which fills in what is ``auto``.

    Weights and states keep their own type, float32: DeepSpeed's own mixed precision would round the frozen weights under
    adapters, which have no other copy. With ``autocast`` products are in bfloat16.
    """
    return {
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": autocast, "dtype": "bfloat16"},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def find(device: torch.device) -> None:
    """Let DeepSpeed work where the policy is: it looks for an accelerator when it is imported."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)


def divided(weight: Tensor) -> bool:
    """Whether ``weight`` is one of DeepSpeed's."""
    return hasattr(weight, "ds_id")


def whole(weight: Tensor) -> Tensor:
    """All of ``weight``. All processes have to call this."""
    import deepspeed  # takes seconds

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()


def state_dict(optimiser: Any) -> dict[str, Any]:
    """What the state of the optimiser would be if it were not divided. All processes have to call this."""
    states: dict[int, dict[str, Any]] = {}
    groups = [{**group, "params": []} for group in _inner(optimiser).param_groups]
    for group, flat, weights in _parts(optimiser):
        here = _inner(optimiser).state.get(flat, {})
        for weight in weights:
            groups[group]["params"].append(len(states))
            states[len(states)] = {
                name: optimiser.get_full_hp_param(weight, name).cpu() if _divided(value) else value
                for name, value in here.items()
            }
    return {"state": {number: state for number, state in states.items() if state}, "param_groups": groups}


def load_state_dict(optimiser: Any, saved: dict[str, Any]) -> None:
    """Go on from a ``state_dict``, of this or of an optimiser that is not divided."""
    for group, of in zip(_inner(optimiser).param_groups, saved["param_groups"], strict=True):
        group.update({name: value for name, value in of.items() if name != "params"})
    number = 0
    for _, flat, weights in _parts(optimiser):
        for weight in weights:
            state = saved["state"].get(number, {})
            number += 1
            here = _inner(optimiser).state[flat]
            for name, value in state.items():
                if not _divided(value):
                    here[name] = value
                    continue
                here.setdefault(name, torch.zeros_like(flat))
                rows = -(-value.numel() // weight.ds_world_size) * weight.ds_world_size
                padded = torch.nn.functional.pad(value.flatten(), (0, rows - value.numel()))
                part, _ = optimiser._get_fp32_opt_state_partition(weight, False, name)
                at = part.numel() * torch.distributed.get_rank()
                part.copy_(padded[at : at + part.numel()])


def _inner(optimiser: Any) -> Any:
    """The one of torch that DeepSpeed's works with."""
    return optimiser.optimizer


def _parts(optimiser: Any) -> Iterator[tuple[int, Tensor, list[Any]]]:
    """Number of the group, one tensor of all that this process holds, and whose parts these are: in the order of the model."""
    flats, weights = optimiser.fp32_partitioned_groups_flat, optimiser.fp16_groups
    for part, (flat, of) in enumerate(zip(flats, weights, strict=True)):
        yield optimiser.sub_group_to_group_id[part], flat, of


def _divided(value: Any) -> bool:
    """Whether it has an entry for each of a weight's, other than a count of steps."""
    return isinstance(value, Tensor) and value.ndim > 0
