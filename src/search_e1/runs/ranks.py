"""Ranks: processes that run the same program, numbered as by torchrun and ``accelerate launch``.

All ranks run the same stages; rank 0 decides and writes. A single process is rank 0 of 1 and needs no torch here.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

Value = TypeVar("Value")

_group: Any = None
"""Process group for exchanging objects: gloo, which needs no device and can detect a missing rank."""

_meetings: Any = None
"""Process group for ``meet`` alone: a meeting that is left must not shift the exchanges of the others."""

_left: Any = None
"""The meeting that this rank has left before all had come; it still counts as there."""

_POLL = 0.02
"""Seconds between looks whether all ranks have come to a meeting."""

_PATIENCE = timedelta(days=7)
"""Timeout of ranks waiting for one another: a stage on rank 0 alone may take hours. torchrun detects a dead rank."""


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
    """Whether this is rank 0, which decides and writes."""
    return rank() == 0


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the process group within the context; does nothing with one process.

    ``device``: device type of the policies; each rank uses the device with its local number.
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
    global _group, _meetings, _left
    dist.init_process_group(backend, timeout=_PATIENCE)
    _group, _meetings = (dist.new_group(backend="gloo", timeout=_PATIENCE) for _ in range(2))
    _left = None
    yield
    dist.destroy_process_group()  # not after an error, since it would wait for the other ranks


def all_gather_object(value: Value) -> list[Value]:
    """Every rank's value, in rank order. Every rank must call it."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    gathered: list[Value] = [value] * count()
    dist.all_gather_object(gathered, value, group=_group)
    return gathered


def broadcast_object(value: Value) -> Value:
    """Rank 0's value. Every rank must call it."""
    if count() == 1:
        return value
    import torch.distributed as dist

    held = [value]
    dist.broadcast_object_list(held, src=0, group=_group)
    return held[0]


def total(value: float) -> float:
    """Sum over ranks, added in rank order. Every rank must call it."""
    return sum(all_gather_object(value))


def leveled(items: Sequence[Value], costs: Sequence[int]) -> list[Value]:
    """The items of all ranks, with some moved from rank to rank so that the ranks' total costs are nearly equal.

    ``costs``: positive, one per item; the ranks' totals then differ by at most the smallest cost on the most expensive rank.
    Every rank must call it.
    """
    moves = _moves(all_gather_object(list(costs)))
    leaving = [(i, to) for (origin, i), to in moves.items() if origin == rank()]
    gone = {i for i, _ in leaving}
    kept = [item for i, item in enumerate(items) if i not in gone]
    arriving = all_gather_object([(to, items[i]) for i, to in leaving]) if moves else []
    return kept + [item for sent in arriving for to, item in sent if to == rank()]


def _moves(costs: Sequence[Sequence[int]]) -> dict[tuple[int, int], int]:
    """Items that change ranks: (rank, number there) -> new rank. ``costs``: one sequence per rank.

    From the most to the least expensive rank, the item closest to half of their difference, as long as that narrows it.
    """
    held = [{(origin, i): cost for i, cost in enumerate(own)} for origin, own in enumerate(costs)]
    totals = [sum(own) for own in costs]
    while True:
        most, least = totals.index(max(totals)), totals.index(min(totals))
        gap = totals[most] - totals[least]
        narrowing = [item for item, cost in held[most].items() if cost < gap]
        if not narrowing:
            return {item: to for to, own in enumerate(held) for item in own if item[0] != to}
        item = min(narrowing, key=lambda item: abs(2 * held[most][item] - gap))
        cost = held[least][item] = held[most].pop(item)
        totals[most] -= cost
        totals[least] += cost


def barrier() -> None:
    """Wait for all ranks."""
    all_gather_object(None)


def meet(leave: Callable[[], None]) -> None:
    """Wait for all ranks, like ``barrier``, but call ``leave`` again and again, which may raise to end the waiting.

    For ranks whose work takes unequal time: in any other exchange a rank that waits cannot react to a signal.
    """
    global _left
    if count() == 1:
        return
    import torch.distributed as dist

    _left = meeting = _left or dist.barrier(group=_meetings, async_op=True)
    while not meeting.is_completed():
        leave()
        time.sleep(_POLL)
    _left = None
    meeting.wait()


def all_come(seconds: float) -> bool:
    """Whether all ranks call this within ``seconds`` of one another."""
    if count() == 1:
        return True
    import torch.distributed as dist

    try:
        dist.monitored_barrier(group=_group, timeout=timedelta(seconds=seconds))
    except RuntimeError:
        return False
    return True


def is_joined() -> bool:
    """Whether this process has joined the process group."""
    return _group is not None
