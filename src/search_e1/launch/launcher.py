"""Starts the group of processes of each stage of a run."""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from search_e1.errors import ConfigError
from search_e1.launch import group, processes
from search_e1.launch.group import Meeting
from search_e1.launch.processes import ForkServer, Process
from search_e1.progress import Progress, silent
from search_e1.runs.stopping import Stop

_log = logging.getLogger(__name__)


def check_alone() -> None:
    """Whether this process was started as one, on one machine.

    Raises:
        ConfigError: it is one of several that a launcher or a scheduler has started.
    """
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if (count := os.environ.get(name, "1")) != "1":
            raise ConfigError(
                f"{name} = {count}: started as one of {count} processes; start one, which starts a process for each GPU of its "
                "machine itself (launch.processes); several machines are not supported yet"
            )


class Launcher:
    """Groups of ``count`` processes on this machine.

    Each is a copy of a process that has imported everything once, where such copies work, and else a Python started anew: a
    second instead of ten for a stage to begin. What is started anew is the same in all else.
    """

    def __init__(self, count: int, *, fork: bool = True) -> None:
        """``fork=False``: start every process anew."""
        self.count = count
        self._fork = fork and count > 1 and ForkServer.possible()
        self._server: ForkServer | None = None

    def prepare(self) -> None:
        """Begin, in the background, what the first group would have to wait for."""
        if self._fork and self._server is None:
            self._server = ForkServer(group.variables(self.count))

    def run(
        self, task: Mapping[str, Any], logs: Path, progress: Progress = silent, stop: Stop | None = None
    ) -> dict[str, Any]:
        """See ``group.run``."""
        from torch.distributed import TCPStore  # takes a second

        self.prepare()
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        meeting = Meeting("127.0.0.1", store.port, 0, self.count, self.count)
        result = group.run(meeting, task, logs, progress=progress, stop=stop, start=self._start)
        assert result is not None
        return result

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
