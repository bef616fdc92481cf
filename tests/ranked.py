"""A function in several processes that are ranks of one group, as under the launcher, but forked: nothing is imported again."""

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState

from forking import end, fork
from search_e1.runs import ranks


def in_ranks(count: int, function: Callable[[], Any], directory: Path) -> list[Any]:
    """What each rank's ``function`` returns, in their order; ``None`` of one that has left."""
    directory.mkdir(parents=True, exist_ok=True)
    assert end([fork(_rank, i, count, function, directory) for i in range(count)]) == [0] * count
    return [pickle.loads((directory / f"result-{i}").read_bytes()) for i in range(count)]  # noqa: S301


def _rank(rank: int, count: int, function: Callable[[], Any], directory: Path) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    AcceleratorState._reset_state(reset_partial_state=True)  # of tests before
    status = 1
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(directory / "store"), count), rank=rank, world_size=count
        )
        try:
            result = function()
        except ranks.Left:
            result = None
        (directory / f"result-{rank}").write_bytes(pickle.dumps(result))
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)  # nothing of pytest's is to end here
