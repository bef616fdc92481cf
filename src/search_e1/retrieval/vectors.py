"""Vectors on disk, written in chunks, so that preemption loses one chunk at most."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from search_e1.runs import write_atomically
from search_e1.runs.progress import Progress, silent

CHUNK = 4096
"""Passages that are encoded together, then synced. It affects the last bits of a vector, so it is no setting."""


def write(
    path: Path,
    mark: Path,
    header: bytes,
    shape: tuple[int, int],
    dtype: type[np.floating],
    encode: Callable[[int, int], np.ndarray],
    progress: Progress = silent,
) -> None:
    """Write ``header`` and rows of ``shape`` [n, d] to ``path``, resuming from an earlier call.

    ``encode(start, stop)`` returns float [stop - start, d]. The file ``mark`` holds the number of synced rows.
    """
    total, dimension = shape
    row = dimension * np.dtype(dtype).itemsize
    with path.open("r+b" if path.exists() else "w+b") as file:
        written = max(0, os.fstat(file.fileno()).st_size - len(header)) // row
        done = min(written, int(mark.read_text())) if mark.exists() else 0
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
    """Memory-mapped rows after ``offset`` bytes of ``path``."""
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
