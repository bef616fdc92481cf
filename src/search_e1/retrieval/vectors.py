"""Vectors on disk, written chunk by chunk so that a kill loses one chunk at most."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from search_e1.runs import write_atomically
from search_e1.runs.progress import Progress, silent

CHUNK = 4096
"""Passages that are encoded together and then made durable. Part of what decides a vector's last bits, so never a setting."""


def write(
    path: Path,
    mark: Path,
    header: bytes,
    shape: tuple[int, int],
    dtype: type[np.floating],
    encode: Callable[[int, int], np.ndarray],
    progress: Progress = silent,
) -> None:
    """Write ``header`` and rows of ``shape`` [n, d] to ``path``, or what an earlier call left to write.

    ``encode(start, stop)`` gives float [stop - start, d]. The file ``mark`` says how many rows are on disk for good.
    """
    total, dimension = shape
    row = dimension * np.dtype(dtype).itemsize
    with path.open("r+b" if path.exists() else "w+b") as file:
        there = max(0, os.fstat(file.fileno()).st_size - len(header)) // row
        done = min(there, int(mark.read_text())) if mark.exists() else 0
        file.write(header)
        file.truncate(file.seek(done * row, os.SEEK_CUR))
        for start in range(done, total, CHUNK):
            stop = min(start + CHUNK, total)
            file.write(encode(start, stop).astype(dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())
            write_atomically(mark, str(stop))
            progress(stop, total, f"{stop:,} encoded")


def read(path: Path, offset: int, shape: tuple[int, int], dtype: type[np.floating]) -> np.ndarray:
    """The rows that ``write`` wrote after ``offset`` bytes, memory-mapped."""
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
