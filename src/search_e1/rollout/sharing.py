"""Files of lines that all ranks write together, chunk by chunk, in the order and to the bit as one process would.

Which lines make a chunk follows from the config, never from the number of ranks: chunk i is made by rank i modulo their
number, into a file of its own, and rank 0 joins them. Chunks that a killed attempt has left are not made again, whatever
number of ranks resumes.
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
    """From a chunk, and the sums over the chunks that this process has made before, to its lines and its sums."""


def write_parts(checkpointer: Checkpointer, parts: Sequence[Part]) -> list[Counter[str]]:
    """Write the files of ``parts``, or what is missing of them. All ranks call this, and may then read the files.

    Returns:
        The sums over the chunks of each part.

    Raises:
        Stopped: a signal asked to stop; what is finished is on disk.
    """
    if ranks.count() > 1:
        _make_pieces(checkpointer, parts)
    sums = [_write(checkpointer, part) for part in parts] if ranks.is_first() else []
    return ranks.broadcast_object(sums)


def _write(checkpointer: Checkpointer, part: Part) -> Counter[str]:
    """Write one file; the chunks that ranks have made are read from their pieces."""
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
    """This rank's share of the chunks that are missing, each in a file of its own."""
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
