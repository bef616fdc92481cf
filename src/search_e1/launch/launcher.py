"""Starts the group of processes of each stage of a run, on one machine or several."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from search_e1.errors import SearchE1Error
from search_e1.launch import group, nodes, processes
from search_e1.launch.group import Group, Meeting
from search_e1.launch.nodes import Facts, Node, Waiting
from search_e1.launch.place import Place
from search_e1.launch.processes import ForkServer, Process
from search_e1.launch.wire import Wire
from search_e1.runs import cpu
from search_e1.runs.progress import Progress, silent
from search_e1.runs.stopping import Stop

_log = logging.getLogger(__name__)
_POLL = 0.1
_GRACE = 3.0
"""Seconds that a machine's other processes have to say what they know of it when one has failed."""


class Launcher:
    """Groups of ``count`` processes on each machine.

    Each is a copy of a process that has imported everything once, where such copies work, and else a Python started anew: a
    second instead of ten for a stage to begin. What is started anew is the same in all else.
    """

    def __init__(self, count: int, place: Place, *, fork: bool = True) -> None:
        """``fork=False``: start every process anew."""
        self.count, self.place = count, place
        self.all = count * place.nodes
        """Processes on all machines."""
        self.others: list[Node] = []
        self._fork = fork and self.all > 1 and ForkServer.possible()
        self._server: ForkServer | None = None

    def prepare(self) -> None:
        """Begin, in the background, what the first group would have to wait for."""
        if self._fork and self._server is None:
            self._server = ForkServer(group.variables(self.count))

    @contextmanager
    def together(self, run: Path, facts: Facts, waiting: Waiting, progress: Progress) -> Iterator[None]:
        """With all other machines, which end as the context does. For the first of them; see ``nodes.gather``."""
        self.others = nodes.gather(run, self.place, facts, waiting, progress)
        try:
            yield
        except BaseException as error:
            nodes.finish(self.others, error)
            raise
        nodes.finish(self.others)
        self.others = []

    def run(
        self, task: Mapping[str, Any], logs: Path, progress: Progress = silent, stop: Stop | None = None
    ) -> dict[str, Any]:
        """See ``group.run``."""
        from torch.distributed import TCPStore  # takes a second

        self.prepare()
        address = self.others[0].wire.here() if self.others else "127.0.0.1"
        store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        for node in self.others:
            node.check()
        for node in self.others:
            meeting = {"address": address, "port": store.port, "first": node.number * self.count, "all": self.all}
            node.begin({"task": task, "logs": str(logs), "meeting": meeting})
        interface = nodes.interface(address) if self.others else ""
        return group.run(
            Meeting(address, store.port, 0, self.count, self.all, interface), task, logs, progress=progress, stop=stop,
            start=self._start, others=self.others,
        )  # fmt: skip

    def follow(self, run: Path, facts: Facts, problem: SearchE1Error | None, waiting: Waiting, stop: Stop) -> None:
        """Take part in the groups of the first machine until it is done; see ``nodes.follow``."""
        if not problem:
            self.prepare()
        connection = nodes.find(run, self.place, facts, problem, waiting)
        nodes.follow(connection, self.place, lambda order: self._part(order, connection, stop))

    def _part(self, order: Mapping[str, Any], connection: Wire, stop: Stop) -> None:
        """This machine's processes of a group, until they have ended; all that becomes of them is told."""
        meeting = Meeting(**order["meeting"], here=self.count, interface=nodes.interface(connection.here()))
        part, asked, deadline, used = Group(meeting, Path(order["logs"])), False, float("inf"), cpu.seconds()
        with stop.finishing():
            try:
                part.start(order["task"], self._start)
                known: dict[int, int] = {}
                while len(known) < self.count and time.monotonic() < deadline:
                    told = connection.receive(_POLL) or {}
                    if "signal" in told:
                        part.send_signal(told["signal"])
                    if "end" in told:  # it went wrong before all had begun
                        connection.put_back(told)
                        break
                    if stop.asked and not asked:
                        asked = True
                        part.send_signal(stop.asked)
                    if (ended := part.ended()) != known:
                        known = ended
                        self._report(part, connection, 0.0)
                    if any(known.values()):
                        deadline = min(deadline, time.monotonic() + _GRACE)
            finally:
                part.kill()
            self._report(part, connection, cpu.seconds() - used, running=False)

    @staticmethod
    def _report(part: Group, connection: Wire, seconds: float, *, running: bool = True) -> None:
        _, notes = part.failed()
        connection.send({"statuses": part.ended(), "notes": notes, "running": running, "seconds": seconds})

    def close(self) -> None:
        """End what ``prepare`` has begun."""
        if self._server:
            self._server.close()
            self._server = None

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be ending
            self.close()

    def _start(self, environment: Mapping[str, str], log: IO[bytes], pipe: int | None) -> Process:
        if self._server and not self._server.usable():
            _log.warning("processes are started anew, which takes longer: %s", self._server.problem)
            self.close()
            self._fork = False
        if self._server:
            try:
                return self._server.start(environment, log, pipe)
            except OSError:
                self.close()  # another is made for the next group
        return processes.fresh(environment, log, pipe)
