"""Line files written by all ranks together, chunk by chunk, identical in order and content to those of one process.

Chunks depend on the config, never on the number of ranks. They are assigned to ranks round-robin, each is written to its own
file, and rank 0 joins them. Chunks that a killed attempt finished are reused, by any number of ranks.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from search_e1.runs import JOURNAL, ranks
from search_e1.runs.checkpoints import Checkpointer, Lines

Chunk = TypeVar("Chunk")
Sums = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Part(Generic[Chunk]):
    """A file to write."""

    path: Path
    chunks: Sequence[Chunk]
    make: Callable[[Chunk, Sums], tuple[Iterable[str], Sums]]
    """Maps a chunk, and the sums over this process's earlier chunks, to the chunk's lines and sums."""


def write_parts(checkpointer: Checkpointer, parts: Sequence[Part]) -> list[Counter[str]]:
    """Write the files of ``parts``, or their missing chunks. All ranks must call this; afterwards all can read the files.

    Returns:
        The sums over the chunks of each part.

    Raises:
        Stopped: a signal requested a stop; finished chunks are on disk.
    """
    if ranks.count() > 1:
        _make_pieces(checkpointer, parts)
    sums = [_write(checkpointer, part) for part in parts] if ranks.is_first() else []
    return ranks.broadcast_object(sums)


def _write(checkpointer: Checkpointer, part: Part) -> Counter[str]:
    """Write one file; chunks that ranks have made are read from their piece files."""
    lines = checkpointer.lines(part.path)
    for i, chunk in enumerate(part.chunks):
        if lines.skip():
            continue
        piece = _piece(checkpointer, part.path, i) if ranks.count() > 1 else None
        if piece and (found := piece.read()) is not None:
            lines.append((line.decode() for line in found), piece.tally)
        else:
            with checkpointer.finishing():
                lines.append(*part.make(chunk, lines.tally))
    return lines.tally


def _make_pieces(checkpointer: Checkpointer, parts: Sequence[Part]) -> None:
    """Make this rank's share of the missing chunks, each in its own file."""
    whole = ranks.broadcast_object([checkpointer.lines(p.path).whole for p in parts] if ranks.is_first() else [])
    number = 0
    for part, begin in zip(parts, whole, strict=True):
        sums: Counter[str] = Counter()
        for i, chunk in enumerate(part.chunks):
            number += 1
            if i < begin or number % ranks.count() != ranks.rank():
                continue
            lines = _piece(checkpointer, part.path, i)
            if not lines.skip():
                with checkpointer.finishing():
                    lines.append(*part.make(chunk, sums))
            sums.update(lines.tally)
    ranks.barrier()


def _piece(checkpointer: Checkpointer, path: Path, number: int) -> Lines:
    assert checkpointer.directory, "several processes need a place to work in"
    directory = checkpointer.directory / "pieces"
    directory.mkdir(exist_ok=True)
    return Lines(directory / f"{path.name}-{number}", directory / f"{path.name}-{number}{JOURNAL}")
