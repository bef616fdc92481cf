"""The contents of a run directory, complete or unfinished, as plain data."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_e1.errors import DataError, RunError
from search_e1.runs import MANIFEST, Manifest, locks
from search_e1.runs.stage_id import OF_ROUND

_BEFORE_ROUNDS = ("base", "coldstart")
_EVALUATION = "evaluation-"


@dataclass(frozen=True, slots=True)
class Stage:
    """A complete artifact; checksums are not verified, since that takes long for weights."""

    name: str
    path: Path
    manifest: Manifest

    @property
    def figures(self) -> dict[str, Any]:
        return self.manifest.result


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory in its current state."""

    path: Path
    config: dict[str, Any]
    """Empty if there is no ``config.json``."""
    stages: dict[str, Stage]
    """Complete stages, ordered by start time."""
    begun: tuple[str, ...]
    """Stages that were started and are not complete: running or killed."""
    holder: str | None = None
    """The process that holds the run directory's lock, if any; see ``runs.locks``."""

    @property
    def evaluations(self) -> list[Stage]:
        """Evaluations in loop order: base, cold start, then GRPO and OFSD of each round; others last, by start time."""
        return sorted(
            (stage for stage in self.stages.values() if stage.name.startswith(_EVALUATION)),
            key=lambda stage: (_position(policy_of(stage)), stage.manifest.started),
        )

    def of_rounds(self, kind: str) -> dict[int, Stage]:
        """Round -> the stage of this kind, one of ``OF_ROUND``."""
        found = {}
        for name, stage in self.stages.items():
            if match := re.fullmatch(rf"{kind}-(\d+)", name):
                found[int(match[1])] = stage
        return dict(sorted(found.items()))


def policy_of(evaluation: Stage) -> str:
    """The evaluated policy: ``base``, ``grpo-1``, ..."""
    return evaluation.name.removeprefix(_EVALUATION)


def _position(policy: str) -> tuple[int, int]:
    if policy in _BEFORE_ROUNDS:
        return 0, _BEFORE_ROUNDS.index(policy)
    kind, _, round = policy.rpartition("-")
    return (int(round), OF_ROUND.index(kind)) if kind in OF_ROUND and round.isdigit() else (1 << 30, 0)


def open_run(path: Path) -> Run:
    """The run in ``path``.

    Raises:
        RunError: it is not a directory or not a run, or a manifest in it is damaged.
    """
    if not path.is_dir():
        what = "not a directory" if path.exists() else "no such directory"
        raise RunError(f"{path}: {what}; give the run directory of `search-e1 train`")
    config = path / "config.json"
    manifests = sorted(path.glob(f"*/{MANIFEST}"))
    if not config.is_file() and not manifests:
        raise RunError(f"{path}: no run (neither config.json nor a stage in it); give the run directory of `search-e1 train`")
    stages = sorted((_stage(manifest) for manifest in manifests), key=lambda stage: stage.manifest.started)
    begun = tuple(sorted(part.name[1:].removesuffix(".partial") for part in path.glob(".*.partial") if part.is_dir()))
    held = read_json(config) if config.is_file() else {}
    return Run(path, held, {stage.name: stage for stage in stages}, begun, locks.holder(path))


def _stage(manifest: Path) -> Stage:
    try:
        return Stage(manifest.parent.name, manifest.parent, Manifest.model_validate_json(manifest.read_bytes()))
    except ValueError as error:
        raise RunError(f"{manifest}: damaged; remove {manifest.parent} and run the stage again") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_bytes(), parse_constant=_no_number)
    except FileNotFoundError as error:
        raise RunError(f"{path}: missing; remove {path.parent} and run the stage again") from error
    except ValueError as error:
        raise RunError(f"{path}: damaged; remove {path.parent} and run the stage again") from error


def read_lines(path: Path, wanted: Callable[[bytes], bool] = lambda line: True) -> Iterator[Any]:
    """The records of a JSON lines file; none if it does not exist. Skips an unfinished last line, which is being written, and
    lines that are not ``wanted``.

    Raises:
        DataError: a line is not JSON; the message names it.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not wanted(line):
                continue
            try:
                yield json.loads(line, parse_constant=_no_number)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise DataError(f"{path}:{number}: damaged; remove {path.parent} and run the stage again") from error


def _no_number(_: str) -> None:
    """``None`` for NaN and infinities, which Python writes and browsers cannot read."""
