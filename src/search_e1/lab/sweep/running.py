"""Runs a sweep's runs in parallel, each in a single-threaded process. A failed run does not affect the others."""

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

from search_e1.config import Config, migrate_fingerprint
from search_e1.errors import RunError
from search_e1.lab.sweep.spec import Run
from search_e1.runs.drift import changes, lines
from search_e1.runs.safe import masked
from search_e1.runs.stopping import STATUS, Stop

SHARED, LOGS = "shared", "logs"
FINISHED = "finished.json"
"""File in the directory of a finished run, with its config."""
MISTAKE = 2
WORKER = [sys.executable, "-m", "search_e1.lab.sweep.worker"]
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error", "PYTHONUNBUFFERED": "1",
}  # fmt: skip


class Ending(StrEnum):
    EARLIER = "earlier"
    """Finished before the sweep began."""
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"
    """Stopped by a signal to this run alone."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    run: Run
    ending: Ending
    message: str = ""
    """The last line of a failed run's log."""
    log: Path | None = None


OnChange = Callable[[Sequence[Run], Sequence[Outcome]], None]
"""Called with the active runs and the outcomes so far, a few times a second."""


def finished_record(config: Config) -> dict[str, Any]:
    """The content of ``FINISHED``."""
    return {"config": masked(config.fingerprint())}


def is_finished(run: Run) -> bool:
    """Whether the run is finished.

    Raises:
        RunError: the run is finished, but its variant has changed since.
    """
    path = run.config.run / FINISHED
    try:
        before = migrate_fingerprint(json.loads(path.read_text(encoding="utf-8"))["config"])
    except FileNotFoundError:
        return False
    except (ValueError, LookupError, TypeError) as error:
        raise RunError(f"{path}: damaged; remove it and run the sweep again") from error
    if changed := changes(before, finished_record(run.config)["config"]):
        raise RunError(
            f"variant {run.variant!r} has changed since it was run (seed {run.seed}); give it another name, or the sweep "
            f"another directory with --out:{lines(changed)}"
        )
    return True


def run_all(
    runs: Sequence[Run], directory: Path, jobs: int, stop: Stop, on_change: OnChange, *, other_versions: bool = False
) -> list[Outcome]:
    """Run the unfinished runs, ``jobs`` at a time; returns outcomes in the order in which the runs ended.

    Runs share their artifacts in ``directory / SHARED``. Each writes a log, ``directory / LOGS / VARIANT-SEED.log``.

    Raises:
        RunError: a variant has changed since it was run.
        Stopped: a signal asked to stop; the active runs have saved.
    """
    outcomes = [Outcome(run, Ending.EARLIER) for run in runs if is_finished(run)]
    done = {outcome.run.name for outcome in outcomes}
    pending = [run for run in runs if run.name not in done]
    active: list[_Process] = []
    passed_on = False
    try:
        with stop.finishing():
            while active or (pending and not stop.asked):
                while pending and len(active) < jobs and not stop.asked:
                    active.append(_Process(_take_next(pending, active), directory, other_versions))
                on_change([process.run for process in active], outcomes)
                time.sleep(0.1)
                for process in [process for process in active if process.ended]:
                    active.remove(process)
                    outcomes.append(process.outcome())
                if stop.asked and not passed_on:
                    passed_on = True
                    _terminate(active)
    finally:
        _terminate(active)
    on_change([], outcomes)
    return outcomes


def _take_next(pending: list[Run], active: "Sequence[_Process]") -> Run:
    """The next run, preferably of a seed that is not active: variants of one seed wait for each other at shared stages."""
    seeds = {process.run.seed for process in active}
    chosen = next((run for run in pending if run.seed not in seeds), pending[0])
    pending.remove(chosen)
    return chosen


def _terminate(processes: "Sequence[_Process]") -> None:
    for process in processes:
        if not process.ended:
            process.process.send_signal(signal.SIGTERM)


class _Process:
    """An active run."""

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
            env={**os.environ, **_ENVIRONMENT},
            start_new_session=True,  # Ctrl-C reaches only the sweep, which passes it on once
        )
        config, shared = run.config.model_dump(mode="json"), str(directory / SHARED)
        order = {"config": config, "shared": shared, "other_versions": other_versions}
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it died at once; its exit status tells
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

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
        message = self._last_line() if status > 0 else f"killed by {signal.Signals(-status).name}"
        return Outcome(self.run, Ending.FAILED, message, self.path)

    def _last_line(self) -> str:
        text = self.path.read_bytes()[self.begin :].decode(errors="replace")
        written = [line for line in text.strip().splitlines() if not line.startswith(" ")]
        return written[-1] if written else f"status {self.process.returncode}"
