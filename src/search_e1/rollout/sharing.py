"""Lines that several processes make, chunk by chunk, in the order and to the bit as one would.

Which lines make a chunk follows from the config, never from the number of processes: chunk i is made by rank i modulo their
number, into a file of its own, and the first rank joins them. Chunks that a killed attempt has left are not made again,
whatever number of processes goes on.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from search_e1.runs import JOURNAL, ranks
from search_e1.runs.checkpoints import Lines, Work

Chunk = TypeVar("Chunk")
Sums = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Part(Generic[Chunk]):
    """A file to be made."""

    path: Path
    chunks: Sequence[Chunk]
    make: Callable[[Chunk, Sums], tuple[Iterable[str], Sums]]
    """A chunk's lines and its sums; told the sums over the chunks that this process has made before."""


def share(work: Work, parts: Sequence[Part]) -> None:
    """Make the files of ``parts`` by all ranks, for ``work.lines`` to find their chunks there; nothing with one process alone.

    Raises:
        Left: to all ranks but the first, which has joined what they made.
        Stopped: a signal has asked to stop; the chunk at hand is finished and on disk.
    """
    if ranks.count() == 1:
        return
    there = ranks.of_first([work.lines(part.path).whole for part in parts] if ranks.is_first() else [])
    number = 0
    for part, begin in zip(parts, there, strict=True):
        sums: Counter[str] = Counter()
        for i, chunk in enumerate(part.chunks):
            number += 1
            if i < begin or number % ranks.count() != ranks.rank():
                continue
            lines = _piece(work, part.path, i)
            if not lines.skip():
                with work.finishing():
                    lines.append(*part.make(chunk, sums))
            sums.update(lines.tally)
    ranks.first_goes_on()
    for part, begin in zip(parts, there, strict=True):
        joined = work.lines(part.path)
        while joined.skip():
            pass
        for i in range(begin, len(part.chunks)):
            piece = _piece(work, part.path, i)
            found = piece.read()
            assert found is not None, f"chunk {i} of {part.path} is not there"
            joined.append((line.decode() for line in found), piece.tally)


def written(work: Work, part: Part) -> Lines:
    """The lines of ``part``, all of them there; made by all ranks, then by the first alone as far as they are missing."""
    share(work, [part])
    lines = work.lines(part.path)
    for chunk in part.chunks:
        if not lines.skip():
            with work.finishing():
                lines.append(*part.make(chunk, lines.tally))
    return lines


def _piece(work: Work, path: Path, number: int) -> Lines:
    assert work.directory, "several processes need a place to work in"
    directory = work.directory / "pieces"
    directory.mkdir(exist_ok=True)
    return Lines(directory / f"{path.name}-{number}", directory / f"{path.name}-{number}{JOURNAL}")
