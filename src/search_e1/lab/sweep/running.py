"""The runs of a sweep side by side: a process of one thread each; one that fails takes no other with it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

from search_e1.config import Config, bound_now
from search_e1.errors import RunError
from search_e1.lab.sweep.spec import Run
from search_e1.runs.drift import changes, lines
from search_e1.runs.safe import masked
from search_e1.runs.stopping import STATUS, Stop

SHARED, LOGS = "shared", "logs"
FINISHED = "finished.json"
"""In the directory of a run of which nothing is left to do: the config that it was finished under."""
MISTAKE = 2
WORKER = [sys.executable, "-m", "search_e1.lab.sweep.worker"]
_THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
_QUIET = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "PYTHONUNBUFFERED": "1"}


class Ending(StrEnum):
    THERE = "there"
    """Finished before the sweep began."""
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"
    """By a signal that it got alone."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    run: Run
    ending: Ending
    said: str = ""
    """The last that a failed run said."""
    log: Path | None = None


Told = Callable[[Sequence[Run], Sequence[Outcome]], None]
"""Called with the runs at work and the outcomes so far, a few times a second."""


def finished(config: Config) -> dict[str, Any]:
    """What ``FINISHED`` holds."""
    return {"config": masked(config.binding())}


def is_finished(run: Run) -> bool:
    """Whether nothing is left to do.

    Raises:
        RunError: the variant was finished, and has changed since.
    """
    path = run.config.run / FINISHED
    try:
        there = bound_now(json.loads(path.read_text(encoding="utf-8"))["config"])
    except FileNotFoundError:
        return False
    except (ValueError, LookupError, TypeError) as error:
        raise RunError(f"{path}: damaged; remove it, and the run is looked through again") from error
    if found := changes(there, finished(run.config)["config"]):
        raise RunError(
            f"variant {run.variant!r} has changed since it was run (seed {run.seed}); give it another name, or the sweep "
            f"another directory with --out:{lines(found)}"
        )
    return True


def work(
    runs: Sequence[Run], directory: Path, jobs: int, stop: Stop, told: Told, *, other_versions: bool = False
) -> list[Outcome]:
    """Run what is not finished, ``jobs`` at a time; outcomes in the order of their ends.

    Runs share their artifacts in ``directory / SHARED``. Each writes a log, ``directory / LOGS / VARIANT-SEED.log``.

    Raises:
        RunError: a variant has changed since it was run.
        Stopped: a signal has asked for it; the runs at work have saved where they are.
    """
    outcomes = [Outcome(run, Ending.THERE) for run in runs if is_finished(run)]
    there = {outcome.run.name for outcome in outcomes}
    pending = [run for run in runs if run.name not in there]
    active: list[_Process] = []
    try:
        with stop.finishing():
            while pending or active:
                while pending and len(active) < jobs:
                    active.append(_Process(_next(pending, active), directory, other_versions))
                told([process.run for process in active], outcomes)
                time.sleep(0.1)
                for process in [process for process in active if process.ended]:
                    active.remove(process)
                    outcomes.append(process.outcome())
                if stop.asked and pending is not _NOTHING:
                    pending = _NOTHING
                    for process in active:
                        process.end()
    finally:
        for process in active:
            process.end()
    told([], outcomes)
    return outcomes


_NOTHING: list[Run] = []


def _next(pending: list[Run], active: "Sequence[_Process]") -> Run:
    """The next one, of a seed that is not at work if there is one: variants of one seed would wait for each other at the
    stages that they share."""
    at_work = {process.run.seed for process in active}
    chosen = next((run for run in pending if run.seed not in at_work), pending[0])
    pending.remove(chosen)
    return chosen


class _Process:
    """A run at work."""

    def __init__(self, run: Run, directory: Path, other_versions: bool) -> None:
        self.run = run
        self.path = directory / LOGS / f"{run.variant}-{run.seed}.log"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.log: IO[bytes] = self.path.open("ab")
        self.begin = self.log.tell()
        self.process = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_THREADS, **_QUIET},
            start_new_session=True,  # a Ctrl-C reaches the sweep, which passes it on once
        )
        order = {
            "config": run.config.model_dump(mode="json"),
            "shared": str(directory / SHARED),
            "other_versions": other_versions,
        }
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it died at once, and its status will say so
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> None:
        if not self.ended:
            self.process.send_signal(signal.SIGTERM)

    def outcome(self) -> Outcome:
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.log.close()
        status = self.process.returncode
        if status == 0 or is_finished(self.run):
            return Outcome(self.run, Ending.FINISHED, log=self.path)
        if status in STATUS.values():
            return Outcome(self.run, Ending.STOPPED, "stopped by a signal", self.path)
        said = self._said() if status > 0 else f"killed by {signal.Signals(-status).name}"
        return Outcome(self.run, Ending.FAILED, said, self.path)

    def _said(self) -> str:
        with self.path.open("rb") as log:
            log.seek(self.begin)
            words = log.read().decode(errors="replace").strip().splitlines()
        kept = [line for line in words if not line.startswith(" ")][-1:]
        return kept[0] if kept else f"status {self.process.returncode}"
