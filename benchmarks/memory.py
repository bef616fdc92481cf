"""Peak memory of a piece of work, for benchmarks."""

import ctypes
import gc
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak rise of memory in a context: the process's resident size on a CPU (Linux), the allocator's on a GPU."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self.mib = 0.0

    def __enter__(self) -> Self:
        gc.collect()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**20
        else:
            # Freed memory that is still held would not count as new.
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            _CLEAR.write_text("5")  # resets VmHWM
            self._before = _kib("VmRSS") / 1024
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            peak = _kib("VmHWM") / 1024
        self.mib = peak - self._before


def _kib(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])
