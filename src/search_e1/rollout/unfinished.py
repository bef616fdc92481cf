"""Rollouts that a signal interrupted: what they have sampled, on disk, for the same call to resume."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from search_e1.runs import ranks, read_summed, sha256_text, write_summed
from search_e1.runs.checkpoints import Checkpointer
from search_e1.runs.stopping import Stop
from search_e1.types import Record, StopReason, Turn


class UnfinishedRow(Record):
    """A trajectory as far as it was sampled."""

    turns: tuple[Turn, ...]
    stop: StopReason | None
    """Why it ended, if it has."""
    ids: tuple[int, ...] = ()
    """The action at hand, as far as it was sampled."""
    logprobs: tuple[float, ...] | None = None
    complete: bool = False
    """Whether the action at hand is whole, and was being answered."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """Where a call of ``rollout`` leaves its rows when ``stop`` is asked to stop."""

    path: Path | None
    """Without one nothing is kept, and a signal ends the call all the same."""
    stop: Stop

    def load(self, call: Sequence[object]) -> dict[int, UnfinishedRow]:
        """The rows of a call with the same arguments, by their place; none, if another call or a damaged file is there."""
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
        """Replace what is there by the rows of this call; on disk when this returns."""
        if self.path:
            dumped = {place: row.model_dump(mode="json") for place, row in rows.items()}
            write_summed(self.path, json.dumps({"call": _key(call), "rows": dumped}))

    def discard(self) -> None:
        """The call has ended: nothing of it is needed any more."""
        if self.path:
            self.path.unlink(missing_ok=True)


def unfinished_in(checkpointer: Checkpointer) -> Unfinished:
    """Where this rank's interrupted rollouts lie while a stage is unfinished."""
    directory = checkpointer.directory
    if directory:
        directory.mkdir(parents=True, exist_ok=True)
    return Unfinished(directory and directory / f"unfinished-{ranks.rank()}.json", checkpointer.stop)


def _key(call: Sequence[object]) -> str:
    return sha256_text(json.dumps([str(part) for part in call]))
