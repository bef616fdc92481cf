"""The groups that GRPO samples, kept for a pool that samples nothing: of each question the newest."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from search_e1.rollout import pool
from search_e1.runs import ranks
from search_e1.runs.context import StageContext
from search_e1.types import Group


class Groups:
    """A file that groups are appended to, each with the step that it was sampled for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._path.touch()

    def add(self, step: int, groups: Sequence[Group]) -> None:
        """Append the groups of ``step``; on disk when this returns, since a checkpoint may be next.

        What lies there of this and later steps is dropped: they are sampled again after a kill.
        """
        partial = self._path.with_suffix(".partial")
        with self._path.open("rb") as before:
            redone = any(int(line.split(b"\t", 1)[0]) >= step for line in before if line.endswith(b"\n"))
        if redone:
            with self._path.open("rb") as before, partial.open("wb") as file:
                whole = (line for line in before if line.endswith(b"\n"))
                file.writelines(line for line in whole if int(line.split(b"\t", 1)[0]) < step)
            partial.replace(self._path)
        with self._path.open("ab") as file:
            for group in groups:
                file.write(f"{step}\t{json.dumps(group.question.id)}\t{group.model_dump_json()}\n".encode())
            file.flush()
            os.fsync(file.fileno())

    def write_newest(self, path: Path) -> None:
        """A line for each question, as in a pool's file; those that were sampled last come first."""
        places: dict[bytes, int] = {}
        with self._path.open("rb") as file, path.open("wb") as out:
            at = 0
            for line in file:
                question = line.split(b"\t", 2)[1]
                places.pop(question, None)
                places[question] = at
                at += len(line)
            for at in reversed(places.values()):
                file.seek(at)
                out.write(file.readline().split(b"\t", 2)[2])


@contextmanager
def keeping(wanted: bool, context: StageContext) -> Iterator[Groups | None]:
    """Where rank 0 puts the groups, if they are ``wanted``; at the end they are in ``groups.jsonl``."""
    if not (wanted and ranks.is_first()):
        yield None
        return
    with context.checkpointer.scratch(context.out) as scratch:
        groups = Groups(scratch / "groups")
        yield groups
        groups.write_newest(context.out / pool.FILE)
