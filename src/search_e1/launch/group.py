"""A group of processes that makes one artifact: started together, ended together, and the first cause told.

The processes find each other as under torchrun: the one that starts them keeps the store at which they meet. What they
print goes to a file each; what the first has to tell comes through a pipe. Their standard input ends when the process that
started them does, and they with it.
"""

import json
import os
import select
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from search_e1 import errors
from search_e1.launch import processes
from search_e1.launch.processes import Process, Start
from search_e1.progress import Progress, silent
from search_e1.runs.stopping import STATUS, Stop

_POLL = 0.1
_GRACE = 3.0
"""Seconds that the others have to say what they know of it when one has failed."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the processes of a group find each other, and which of them are of this machine."""

    address: str
    port: int
    first: int
    """Number of the first process here."""
    here: int
    """Processes here."""
    all: int


def run(
    meeting: Meeting,
    task: Mapping[str, Any],
    logs: Path,
    *,
    progress: Progress = silent,
    stop: Stop | None = None,
    start: Start = processes.fresh,
) -> dict[str, Any] | None:
    """Start the processes of this machine with ``task``, wait for all, and return what the first process made.

    ``logs`` is a directory for what they print and for what went wrong. A signal that asks ``stop`` is passed on; the processes
    finish their step. ``None`` where the first process is on another machine.

    Raises:
        SearchE1Error: the first that went wrong in one of them, of its own type; the others are killed.
        Stopped: a signal has asked to stop; they have saved and ended.
    """
    stop = stop or Stop()
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("rank-*"):
        old.unlink()
    group = _Group(meeting, logs, progress)
    with stop.finishing():
        try:
            group.start(json.dumps(task).encode() + b"\n", start)
            group.wait(stop)
        finally:
            group.kill()
    return group.result


def variables(here: int) -> dict[str, str]:
    """Of this process, and how many threads each of ``here`` processes has, unless that is set."""
    threads = max(1, len(os.sched_getaffinity(0)) // here)
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


class _Group:
    def __init__(self, meeting: Meeting, logs: Path, progress: Progress) -> None:
        self.meeting, self.logs, self.progress = meeting, logs, progress
        self.processes: dict[int, Process] = {}
        self.result: dict[str, Any] | None = None
        self._pipe: IO[bytes] | None = None
        self._told = b""

    def start(self, task: bytes, start: Start) -> None:
        read, write = os.pipe()
        self._pipe = os.fdopen(read, "rb", buffering=0)
        try:
            for local in range(self.meeting.here):
                rank = self.meeting.first + local
                with (self.logs / f"rank-{rank}.log").open("wb") as log:
                    process = start(self._environment(local), log, None if rank else write)
                self.processes[rank] = process
                assert process.stdin
                with suppress(BrokenPipeError):  # it has ended, which is noticed soon
                    process.stdin.write(task)
                    process.stdin.flush()  # to be closed when this process ends
        finally:
            os.close(write)

    def _environment(self, local: int) -> dict[str, str]:
        return {
            **variables(self.meeting.here),
            "MASTER_ADDR": self.meeting.address,
            "MASTER_PORT": str(self.meeting.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "RANK": str(self.meeting.first + local),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(self.meeting.all),
            "LOCAL_WORLD_SIZE": str(self.meeting.here),
        }

    def wait(self, stop: Stop) -> None:
        """Until all have ended, or one has failed."""
        asked, deadline = False, float("inf")
        while any(process.poll() is None for process in self.processes.values()):
            self._listen()
            if stop.asked and not asked:
                asked = True
                self._signal(signal.SIGTERM)
            if asked and any(process.poll() is not None for process in self.processes.values()):
                # The one that has saved and left may leave others waiting for it.
                deadline = min(deadline, time.monotonic() + _GRACE)
                if time.monotonic() > deadline:
                    return
            elif any(process.poll() for process in self.processes.values()):
                break
        if not stop.asked:
            self._check()
        while self._listen():
            pass

    def _listen(self) -> bool:
        """Wait a moment for what the first process tells, and pass it on; whether there was anything."""
        assert self._pipe
        readable, _, _ = select.select([self._pipe], [], [], _POLL)
        data = self._pipe.read(1 << 16) if readable else b""
        if readable and not data:
            time.sleep(_POLL)  # it has ended
        *lines, self._told = (self._told + data).split(b"\n")
        for line in lines:
            told = json.loads(line)
            if "result" in told:
                self.result = told["result"]
            else:
                self.progress(told["done"], told["total"], told["figure"])
        return bool(data)

    def _check(self) -> None:
        """Raise what went wrong first, if anything did."""
        if not any(process.poll() for process in self.processes.values()):
            return
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline and any(p.poll() is None for p in self.processes.values()):
            time.sleep(_POLL)
        statuses = {rank: status for rank, process in self.processes.items() if (status := process.poll())}
        self.kill()
        raise first_cause(statuses, self.meeting.all, self.logs)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        for process in self.processes.values():
            process.wait()
            assert process.stdin
            process.stdin.close()
        if self._pipe:
            self._pipe.close()
            self._pipe = None

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(number)


def note(logs: Path, rank: int, error: BaseException) -> None:
    """Leave for ``first_cause`` what went wrong in a process, and when."""
    kind = type(error).__name__
    own = isinstance(error, errors.SearchE1Error)
    said = str(error) if own else f"{kind}: {(str(error).strip() or kind).splitlines()[0]}"
    told = {"time": time.time(), "kind": kind if own else "", "message": said}
    (logs / f"rank-{rank}.json").write_text(json.dumps(told), encoding="utf-8")


def first_cause(statuses: Mapping[int, int], count: int, logs: Path) -> errors.SearchE1Error:
    """What went wrong first, of processes (rank -> exit status) that failed each by itself or because another did.

    One that a signal ended could leave no note, and all others noticed after it. Of the rest the earliest note is the cause.
    """
    aborted = -signal.SIGABRT  # what libraries do to a process whose peers are gone
    killed = [rank for rank, status in statuses.items() if status < 0 and status != aborted]
    if killed:
        name = signal.Signals(-statuses[killed[0]]).name
        hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
        return errors.TrainingError(
            f"process {killed[0]} of {count} was ended by {name}{hint}; run the same command again, it goes on"
        )
    notes = {rank: found for rank in statuses if (found := _read(logs / f"rank-{rank}.json"))}
    if notes:
        rank = min(notes, key=lambda rank: notes[rank]["time"])
        kind = notes[rank]["kind"]
        if kind:
            made: errors.SearchE1Error = getattr(errors, kind)(notes[rank]["message"])
            return made
        return errors.TrainingError(
            f"process {rank} of {count}: {notes[rank]['message']}; more in {logs / f'rank-{rank}.log'}"
        )
    rank, status = min(statuses.items())
    why = "was stopped by a signal" if status in STATUS.values() else f"left with status {status}"
    return errors.TrainingError(
        f"process {rank} of {count} {why}; see {logs / f'rank-{rank}.log'}, and run the same command again, it goes on"
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return told
    except (OSError, ValueError):
        return None
