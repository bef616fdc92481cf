"""Passages of an index: written once, read by number, never all in memory at once."""

import hashlib
import io
import json
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator, Sized
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from search_e1.errors import DataError, RetrievalError
from search_e1.retrieval.base import Hit
from search_e1.runs import write_atomically
from search_e1.runs.progress import Progress, silent
from search_e1.types import Passage

_LINES, _OFFSETS, _ABOUT = "passages.jsonl", "offsets.npy", "passages.json"
_PROGRESS_EVERY = 1000  # passages
_READ_TOGETHER = 256  # passages


def npy_header(dtype: Any, length: int) -> bytes:
    """The header of a 1-D ``.npy`` file. Writing the data by hand raises ENOSPC on a full disk; numpy does not."""
    header = io.BytesIO()
    description = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(header, {"descr": description, "fortran_order": False, "shape": (length,)})
    return header.getvalue()


def hash64(text: str) -> int:
    """64-bit hash; among ten million texts a collision has a probability of 3e-6."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


class Passages:
    """Memory-mapped passages in a directory, shared by processes.

    ``passages.jsonl`` holds one passage per line, ``offsets.npy`` (int64 [passages + 1]) the start of each, ``passages.json``
    number, size and checksum. ``passages.json`` is written last: without it the passages are incomplete.
    """

    def __init__(self, directory: Path) -> None:
        """Use ``open`` or ``write``."""
        about = json.loads((directory / _ABOUT).read_text(encoding="utf-8"))
        self.path = directory / _LINES
        self.checksum: str = about["sha256"]
        """sha256 of ``passages.jsonl``."""
        self.offsets = np.load(directory / _OFFSETS, mmap_mode="r", allow_pickle=False)
        """int64 [passages + 1]: start of each passage in ``path``, in bytes."""
        self._file = self.path.open("rb")  # kept open, since an index update replaces the file at this path
        self._lines = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        if self.offsets.shape != (about["passages"] + 1,) or self.offsets[-1] != len(self._lines):
            raise ValueError(f"{_LINES} differs in length from the manifest")

    @classmethod
    def write(cls, corpus: Iterable[Passage], directory: Path, progress: Progress = silent) -> Self:
        """Write the passages of ``corpus`` into ``directory``; takes 8 bytes of memory per passage.

        Raises:
            DataError: the corpus is empty.
        """
        (directory / _ABOUT).unlink(missing_ok=True)
        total = len(corpus) if isinstance(corpus, Sized) else 0
        offsets, digest = array("q", [0]), hashlib.sha256()
        with (directory / _LINES).open("wb") as file:
            for done, passage in enumerate(corpus, 1):
                line = passage.model_dump_json().encode() + b"\n"
                file.write(line)
                digest.update(line)
                offsets.append(offsets[-1] + len(line))
                if done % _PROGRESS_EVERY == 0:
                    progress(done, total, f"{done:,} passages")
            file.flush()
            os.fsync(file.fileno())
        passages = len(offsets) - 1
        if not passages:
            raise DataError("the corpus is empty; give one with at least one passage")
        progress(passages, total, f"{passages:,} passages")
        with (directory / _OFFSETS).open("wb") as file:
            file.write(npy_header(np.int64, len(offsets)))
            file.write(offsets)
        about = {"passages": passages, "bytes": offsets[-1], "sha256": digest.hexdigest()}
        write_atomically(directory / _ABOUT, json.dumps(about, indent=2) + "\n")
        return cls(directory)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Open the passages in ``directory``.

        Raises:
            DataError: the passages are missing, incomplete or damaged.
        """
        try:
            return cls(directory)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"{_ABOUT} is missing" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
            problem = f"{directory}: unreadable passages ({reason})"
            raise DataError(f"{problem}; build the index again with `search-e1 index build`") from None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Passage:
        return Passage.model_validate_json(self._line(range(len(self))[index]))

    def __iter__(self) -> Iterator[Passage]:
        return map(self.__getitem__, range(len(self)))

    def find(self, key: str) -> Passage | None:
        """The passage with the id ``key``, else the first one with this title, ignoring case and white space.

        The first call reads all passages and keeps 32 bytes of memory for each.
        """
        for (hashes, order), wanted in zip(self._keys, (key, _folded(key)), strict=True):
            begin, end = (hashes.searchsorted(np.uint64(hash64(wanted)), side) for side in ("left", "right"))
            for passage in (self[int(i)] for i in order[begin:end]):
                if wanted in (passage.id, _folded(passage.title)):
                    return passage
        return None

    @cached_property
    def _keys(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Sorted hashes of ids, then of titles, each with the passages that they belong to."""
        pairs = ((hash64(record["id"]), hash64(_folded(record["title"]))) for record in self._records())
        hashes = np.fromiter(pairs, dtype=np.dtype((np.uint64, 2)), count=len(self))
        return [(column[order], order) for column in hashes.T for order in [np.argsort(column, kind="stable")]]

    def hit(self, index: int, score: float) -> Hit:
        """Passage ``index`` as a hit with ``score``.

        Raises:
            RetrievalError: the line is damaged.
        """
        try:
            return Hit(**json.loads(self._line(index)), score=score)
        except (ValueError, TypeError):
            raise RetrievalError(f"{self.path}:{index + 1}: damaged; build the index again") from None

    def texts(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """Title and text of passages ``start`` to ``stop``, as BM25 indexes them."""
        return (f"{record['title']} {record['text']}" for record in self._records(start, stop))

    def contents(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """``Passage.contents`` of passages ``start`` to ``stop``, as encoders read them."""
        return (Passage.model_construct(None, **record).contents for record in self._records(start, stop))

    def _records(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
        """Reads from the file, not the memory map, whose pages would count as this process's memory."""
        stop = len(self) if stop is None else stop
        for first in range(start, stop, _READ_TOGETHER):
            last = min(first + _READ_TOGETHER, stop)
            begin, end = int(self.offsets[first]), int(self.offsets[last])
            yield from map(json.loads, os.pread(self._file.fileno(), end - begin, begin).splitlines())

    def _line(self, index: int) -> bytes:
        return self._lines[int(self.offsets[index]) : int(self.offsets[index + 1])]


def _folded(title: str) -> str:
    return " ".join(title.casefold().split())
