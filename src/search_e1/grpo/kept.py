"""The groups that GRPO samples, kept for a pool that samples nothing: of each question the newest."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from search_e1.rollout import pool
from search_e1.runs import ranks
from search_e1.runs.checkpoints import Work
from search_e1.types import Group


class Groups:
    """A file that groups are appended to, each with the step that it was sampled for."""

    def __init__(self, path: Path, steps: int) -> None:
        """Go on with what lies in ``path`` of the first ``steps`` steps; later ones are sampled again."""
        self._path = path
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            if path.exists():
                with path.open("rb") as before:
                    file.writelines(
                        line for line in before if line.endswith(b"\n") and int(line.split(b"\t")[0]) < steps
                    )
        partial.replace(path)

    def add(self, step: int, groups: Sequence[Group]) -> None:
        """On disk when this returns: a checkpoint may be next."""
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
def keeping(wanted: bool, work: Work, out: Path, steps: int) -> Iterator[Groups | None]:
    """Where the first rank puts the groups, if they are ``wanted``; at the end they are in ``out / pool.FILE``.

    ``steps``: how many are done already, where training goes on.
    """
    if not (wanted and ranks.is_first()):
        yield None
        return
    with work.scratch(out) as scratch:
        groups = Groups(scratch / "groups", steps)
        yield groups
        groups.write_newest(out / pool.FILE)
