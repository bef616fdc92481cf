"""Interrupted rollouts, saved for the same call to resume: rows at a signal, and a server's answers as they arrive."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from search_e1.runs import ranks, read_summed, sha256_text, write_atomically, write_summed
from search_e1.runs.checkpoints import Checkpointer
from search_e1.runs.files import append, summed_entries, summed_line
from search_e1.runs.stopping import Stop
from search_e1.types import Record, StopReason, Turn


class UnfinishedRow(Record):
    """A partially sampled trajectory."""

    turns: tuple[Turn, ...]
    stop: StopReason | None
    """The stop reason, if the trajectory has ended."""
    ids: tuple[int, ...] = ()
    """The sampled ids of the current action."""
    logprobs: tuple[float, ...] | None = None
    complete: bool = False
    """Whether the current action is complete and waits for its observation."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """Where a call of ``rollout`` saves its rows when ``stop`` is requested."""

    path: Path | None
    """Without a path nothing is saved; a signal still ends the call."""
    stop: Stop

    def load(self, call: Sequence[object]) -> dict[int, UnfinishedRow]:
        """The rows of the same call, by index; empty if the file is missing, damaged or from another call."""
        if self.path is None:
            return {}
        try:
            saved = json.loads(read_summed(self.path))
        except (OSError, ValueError):
            return {}
        if saved["call"] != _key(call):
            return {}
        return {int(place): UnfinishedRow.model_validate(row) for place, row in saved["rows"].items()}

    def save(self, call: Sequence[object], rows: Mapping[int, UnfinishedRow]) -> None:
        """Write the rows of this call, durably."""
        if self.path:
            dumped = {place: row.model_dump(mode="json") for place, row in rows.items()}
            write_summed(self.path, json.dumps({"call": _key(call), "rows": dumped}))

    def answers(self, call: Sequence[object]) -> "Answers":
        """The saved server answers of this call; those of other calls are removed."""
        return Answers(self.path and self.path.with_name(self.path.stem + "-answers.jsonl"), _key(call))

    def discard(self) -> None:
        """Remove the file: the call is complete."""
        if self.path:
            self.path.unlink(missing_ok=True)


class Answers:
    """A server's answers by request hash, each saved before it is used, so that none is paid for twice."""

    def __init__(self, path: Path | None, call: str = "") -> None:
        """Without a path nothing is saved. Drops all lines of another ``call``, and lines from the first damaged one on."""
        self._path = path
        self._known: dict[str, str] = {}
        entries = [json.loads(entry) for entry in summed_entries(path)] if path else []
        self.begun = any(answer for _, answer in entries)
        """Whether the server has answered any call of this stage before."""
        if path and entries and entries[0][0] == call:
            self._known = dict(entries[1:])
        if path:
            kept = [[call, "begun" if self.begun else ""], *self._known.items()]
            write_atomically(path, "".join(summed_line(json.dumps(entry)) for entry in kept))

    def get(self, asked: str) -> bytes | None:
        answer = self._known.get(asked)
        return None if answer is None else answer.encode()

    def put(self, asked: str, answer: bytes) -> None:
        if self._path:
            append(self._path, summed_line(json.dumps([asked, answer.decode()])).encode())


def unfinished_in(checkpointer: Checkpointer) -> Unfinished:
    """This rank's place for interrupted rollouts in an unfinished stage."""
    directory = checkpointer.directory
    if directory:
        directory.mkdir(parents=True, exist_ok=True)
    return Unfinished(directory and directory / f"unfinished-{ranks.rank()}.json", checkpointer.stop)


def _key(call: Sequence[object]) -> str:
    return sha256_text(json.dumps([str(part) for part in call]))
