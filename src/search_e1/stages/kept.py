"""Groups sampled by GRPO, kept as a pool without further sampling: the latest group of each question."""

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
    """An append-only file of groups, each with the step it was sampled in."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._path.touch()
        with self._path.open("rb+") as file:  # drops a line that was being written when the process was killed
            file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))

    def add(self, step: int, groups: Sequence[Group]) -> None:
        """Append the groups of ``step``; synced to disk before it returns, since a checkpoint may follow.

        Groups of this and later steps already in the file are dropped: a resumed run samples them again.
        """
        partial = self._path.with_suffix(".partial")
        with self._path.open("rb") as before:
            has_later = any(int(line.split(b"\t", 1)[0]) >= step for line in before)
        if has_later:
            with self._path.open("rb") as before, partial.open("wb") as file:
                file.writelines(line for line in before if int(line.split(b"\t", 1)[0]) < step)
            partial.replace(self._path)
        with self._path.open("ab") as file:
            for group in groups:
                file.write(f"{step}\t{json.dumps(group.question.id)}\t{group.model_dump_json()}\n".encode())
            file.flush()
            os.fsync(file.fileno())

    def write_newest(self, path: Path) -> None:
        """Write the latest group of each question in a pool's format, most recently sampled first."""
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
    """Yields the file for rank 0 to add groups to, if ``wanted``; writes ``groups.jsonl`` on exit."""
    if not (wanted and ranks.is_first()):
        yield None
        return
    with context.checkpointer.scratch(context.out) as scratch:
        groups = Groups(scratch / "groups")
        yield groups
        groups.write_newest(context.out / pool.FILE)
