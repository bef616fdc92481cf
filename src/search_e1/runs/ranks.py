"""The processes that work on a stage together, numbered as torchrun numbers them (``RANK``, ``WORLD_SIZE``).

One process alone is the first of one, and nothing here needs torch then.
"""

import os
from typing import TypeVar

Value = TypeVar("Value")


class Left(BaseException):
    """This rank's part of a stage is done; the first goes on alone. No ``Exception``: it is no error."""


def count() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which one this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def on_one_machine() -> bool:
    """Whether all of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count())) == count()


def is_first() -> bool:
    """Whether this is the one that writes."""
    return rank() == 0


def gathered(value: Value) -> list[Value]:
    """What each rank calls this with, in their order. Every rank has to call it."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Value] = [value] * count()
    dist.all_gather_object(found, value)
    return found


def of_first(value: Value) -> Value:
    """What the first rank calls this with. Every rank has to call it."""
    if count() == 1:
        return value
    import torch.distributed as dist

    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def first_goes_on() -> None:
    """Wait for all ranks; then only the first returns.

    Raises:
        Left: to all others.
    """
    gathered(None)
    if not is_first():
        raise Left
