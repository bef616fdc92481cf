"""A function in several processes that are ranks of one group, as under torchrun, but forked: nothing is imported again."""

import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forking import end, fork
from search_e1.runs import ranks


def in_ranks(count: int, function: Callable[[], Any], directory: Path) -> list[Any]:
    """What each rank's ``function`` returns, in their order."""
    directory.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert end([fork(_rank, i, count, port, function, directory) for i in range(count)]) == [0] * count
    return [pickle.loads((directory / f"result-{i}").read_bytes()) for i in range(count)]  # noqa: S301


def _rank(rank: int, count: int, port: int, function: Callable[[], Any], directory: Path) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status = 1
    try:
        with ranks.joined("cpu"):
            (directory / f"result-{rank}").write_bytes(pickle.dumps(function()))
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)  # nothing of pytest's is to end here
