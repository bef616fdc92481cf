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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from search_e1 import errors
from search_e1.launch import processes
from search_e1.launch.nodes import Node
from search_e1.launch.processes import Process, Start
from search_e1.runs.progress import Progress, silent
from search_e1.runs.stopping import STATUS, Stop, Stopped

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
    interface: str = ""
    """Network interface by which this machine is reached; empty leaves it to the libraries."""


def run(
    meeting: Meeting,
    task: Mapping[str, Any],
    logs: Path,
    *,
    progress: Progress = silent,
    stop: Stop | None = None,
    start: Start = processes.fresh,
    others: Sequence[Node] = (),
) -> dict[str, Any]:
    """Start the processes of this machine, of which one is the first, with ``task``, wait for all, and return what it made.

    ``logs`` is a directory for what they print and for what went wrong. A signal that asks ``stop`` is passed on; the processes
    finish their step. ``others`` are machines that have begun their part of the group.

    Raises:
        SearchE1Error: the first that went wrong in one of them, of its own type; the others are killed.
        Stopped: a signal has asked to stop; they have saved and ended.
    """
    stop = stop or Stop()
    group = Group(meeting, logs, progress, others)
    with stop.finishing():
        try:
            group.start(task, start)
            group.wait(stop)
        finally:
            group.kill()
    assert group.result is not None
    return group.result


def variables(here: int) -> dict[str, str]:
    """Of this process, and how many threads each of ``here`` processes has, unless that is set."""
    threads = max(1, len(os.sched_getaffinity(0)) // here)
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


class Group:
    """The processes of this machine, and ``others`` that are to end with them."""

    def __init__(self, meeting: Meeting, logs: Path, progress: Progress = silent, others: Sequence[Node] = ()) -> None:
        self.meeting, self.logs, self.progress, self.others = meeting, logs, progress, others
        self.processes: dict[int, Process] = {}
        self.result: dict[str, Any] | None = None
        self._pipe: IO[bytes] | None = None
        self._told = b""

    def start(self, task: Mapping[str, Any], start: Start) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        line = json.dumps(task).encode() + b"\n"
        read, write = os.pipe()
        self._pipe = os.fdopen(read, "rb", buffering=0)
        try:
            for local in range(self.meeting.here):
                rank = self.meeting.first + local
                (self.logs / f"rank-{rank}.json").unlink(missing_ok=True)
                with (self.logs / f"rank-{rank}.log").open("wb") as log:
                    process = start(self._environment(local), log, None if rank else write)
                self.processes[rank] = process
                assert process.stdin
                with suppress(BrokenPipeError):  # it has ended, which is noticed soon
                    process.stdin.write(line)
                    process.stdin.flush()  # to be closed when this process ends
        finally:
            os.close(write)

    def _environment(self, local: int) -> dict[str, str]:
        interface = {"GLOO_SOCKET_IFNAME": self.meeting.interface} if self.meeting.interface else {}
        return {
            **interface,
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
        while any(process.poll() is None for process in self._all()):
            self._listen()
            if stop.asked and not asked:
                asked = True
                self.send_signal(signal.SIGTERM)
            if asked and any(process.poll() is not None for process in self._all()):
                # The one that has saved and left may leave others waiting for it.
                deadline = min(deadline, time.monotonic() + _GRACE)
                if time.monotonic() > deadline:
                    return
            elif any(process.poll() for process in self._all()):
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
        if not any(process.poll() for process in self._all()):
            return
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline and any(process.poll() is None for process in self._all()):
            time.sleep(_POLL)
        for node in self.others:
            node.check()
        statuses, notes = self.failed()
        for node in self.others:
            statuses |= {rank: status for rank, status in node.statuses.items() if status}
            notes |= node.notes
        self.kill()
        if asked_to_stop := [number for number, status in STATUS.items() if {*statuses.values()} == {status}]:
            raise Stopped(asked_to_stop[0])
        raise first_cause(statuses, notes, self.meeting.all, self.logs)

    def ended(self) -> dict[int, int]:
        """Rank -> status, of the processes here."""
        polled = {rank: process.poll() for rank, process in self.processes.items()}
        return {rank: status for rank, status in polled.items() if status is not None}

    def failed(self) -> tuple[dict[int, int], dict[int, dict[str, Any]]]:
        """Of the processes here that have: rank -> status, and rank -> what it noted."""
        statuses = {rank: status for rank, status in self.ended().items() if status}
        return statuses, {rank: found for rank in statuses if (found := _read(self.logs / f"rank-{rank}.json"))}

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        for process in self._all():
            process.wait()
            if process.stdin:
                process.stdin.close()
        if self._pipe:
            self._pipe.close()
            self._pipe = None

    def send_signal(self, number: int) -> None:
        for process in self._all():
            if process.poll() is None:
                process.send_signal(number)

    def _all(self) -> list[Process]:
        return [*self.processes.values(), *self.others]


def note(logs: Path, rank: int, error: BaseException) -> None:
    """Leave for ``first_cause`` what went wrong in a process, and when."""
    kind = type(error).__name__
    own = isinstance(error, errors.SearchE1Error)
    said = str(error) if own else f"{kind}: {(str(error).strip() or kind).splitlines()[0]}"
    told = {"time": time.time(), "kind": kind if own else "", "message": said}
    (logs / f"rank-{rank}.json").write_text(json.dumps(told), encoding="utf-8")


def first_cause(
    statuses: Mapping[int, int], notes: Mapping[int, Mapping[str, Any]], count: int, logs: Path
) -> errors.SearchE1Error:
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
