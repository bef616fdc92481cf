"""The processes that run the same program, numbered as torchrun and ``accelerate launch`` number them.

All ranks run the same stages; rank 0 decides and writes. One process alone is rank 0 of one, and nothing here needs torch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

Value = TypeVar("Value")

_group: Any = None
"""What objects are exchanged in: gloo, which needs no device and can tell that a rank does not come."""

_PATIENCE = timedelta(days=7)
"""How long ranks wait for one another: a stage of rank 0 alone may take hours. A dead rank is noticed by torchrun."""


def count() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this is the rank that decides and writes."""
    return rank() == 0


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the process group for as long as the context lasts; with one process, nothing happens.

    ``device``: type of the device that policies are on; each rank takes the one with its local number.
    """
    if count() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if device != "cpu":
        torch.accelerator.set_device_index(local_rank())
        backend = f"cpu:gloo,{device}:{dist.get_default_backend_for_device(device)}"
    global _group
    dist.init_process_group(backend, timeout=_PATIENCE)
    _group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    yield
    dist.destroy_process_group()  # not after an error: the other ranks would be waited for


def all_gather_object(value: Value) -> list[Value]:
    """Every rank's value, in the order of ranks. Every rank has to call it."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    gathered: list[Value] = [value] * count()
    dist.all_gather_object(gathered, value, group=_group)
    return gathered


def broadcast_object(value: Value) -> Value:
    """Rank 0's value. Every rank has to call it."""
    if count() == 1:
        return value
    import torch.distributed as dist

    held = [value]
    dist.broadcast_object_list(held, src=0, group=_group)
    return held[0]


def total(value: float) -> float:
    """Sum over ranks, added up in their order. Every rank has to call it."""
    return sum(all_gather_object(value))


def barrier() -> None:
    """Wait for all ranks."""
    all_gather_object(None)


def all_come(seconds: float) -> bool:
    """Whether all ranks call this within some seconds of one another."""
    if count() == 1:
        return True
    import torch.distributed as dist

    try:
        dist.monitored_barrier(group=_group, timeout=timedelta(seconds=seconds))
    except RuntimeError:
        return False
    return True


def is_joined() -> bool:
    """Whether this process has joined its group."""
    return _group is not None
