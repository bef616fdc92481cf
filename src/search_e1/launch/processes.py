"""How a process of a group comes to be: Python started anew, or a copy of one that has imported everything already."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, Any, Protocol

from search_e1.launch.fork_server import LARGEST, PIPE
from search_e1.runs import cpu

MODULE = "search_e1.worker"
"""What each process runs: its ``main``."""


class Process(Protocol):
    """As ``subprocess.Popen``."""

    pid: int

    @property
    def stdin(self) -> IO[bytes] | None: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...

    def send_signal(self, number: int, /) -> None: ...


Start = Callable[[Mapping[str, str], IO[bytes], int | None], Process]
"""Start a process with an environment, a file for what it prints, and, for the first of a group, a pipe to tell through."""


def fresh(environment: Mapping[str, str], log: IO[bytes], pipe: int | None) -> Process:
    """A new Python."""
    return subprocess.Popen(
        [sys.executable, "-m", MODULE],
        env=dict(environment) if pipe is None else {**environment, PIPE: str(pipe)},
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        pass_fds=[] if pipe is None else [pipe],
        start_new_session=True,  # a terminal's Ctrl-C comes to the one that waits, which passes it on
    )


class ForkServer:
    """A Python that imports everything once, and of which each process is a copy. See ``fork_server``.

    It ends with ``close``, or with the process that has made it.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Begin to import; ``start`` waits until that is done.

        ``environment`` holds what libraries look at when they are imported; a process's own comes later.
        """
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # With the other way of counting devices, importing would begin to use them, and no copy could.
        variables = {**environment, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "search_e1.launch.fork_server", MODULE],
                env=variables, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        self.problem: str | None = None
        """Why copies do not work; empty where they do."""
        self._running: dict[int, _Forked] = {}
        self._seconds = 0.0  # of copies that have ended

    @staticmethod
    def possible() -> bool:
        """Whether this system has what it takes."""
        return sys.platform == "linux" and hasattr(os, "pidfd_open")

    def usable(self) -> bool:
        """Whether copies work, as far as the server knows; waits until it has imported everything."""
        if self.problem is None:
            self.problem = (self._hear(None) or {"problem": "it has ended"})["problem"]
        return not self.problem

    def start(self, environment: Mapping[str, str], log: IO[bytes], pipe: int | None) -> Process:
        """A copy of the server; call ``usable`` first."""
        read, write = os.pipe()
        handed = [read, log.fileno(), *([] if pipe is None else [pipe])]
        try:
            socket.send_fds(self._socket, [json.dumps(dict(environment)).encode()], handed)
            while "started" not in (told := self._hear(None) or {}):
                if not told:
                    raise OSError("the process that starts others has ended")
        except BaseException:
            os.close(write)
            raise
        finally:
            os.close(read)
        forked = self._running[told["started"]] = _Forked(self, told["started"], os.fdopen(write, "wb", buffering=0))
        return forked

    def look(self) -> None:
        """Take note of the processes that have ended since."""
        while self._running and self._hear(0.0):
            pass

    def close(self) -> None:
        """End it; not its copies, which do so when their standard input ends."""
        self._socket.close()
        self._server.kill()
        if self._server.returncode is None:
            self._server.wait()
            cpu.add(-self._seconds)  # from now on the system counts them

    def _hear(self, timeout: float | None) -> dict[str, Any] | None:
        """The next message, if one comes in time."""
        self._socket.settimeout(timeout)
        try:
            data = self._socket.recv(LARGEST)
        except (BlockingIOError, TimeoutError):
            return None
        except OSError:
            data = b""
        if not data:
            self._lost()
            return None
        told: dict[str, Any] = json.loads(data)
        if "ended" in told:
            self._running.pop(told["ended"]).status = told["status"]
            cpu.add(told["seconds"])
            self._seconds += told["seconds"]
        return told

    def _lost(self) -> None:
        """It was killed: nobody will tell what becomes of its copies."""
        for forked in self._running.values():
            forked.send_signal(signal.SIGKILL)
            forked.status = -signal.SIGKILL
        self._running.clear()


class _Forked:
    """A copy of the fork server at work."""

    def __init__(self, server: ForkServer, pid: int, stdin: IO[bytes]) -> None:
        self.server, self.pid, self.stdin = server, pid, stdin
        self.status: int | None = None

    def poll(self) -> int | None:
        self.server.look()
        return self.status

    def wait(self) -> int:
        while self.poll() is None:
            there = self._is_there()
            time.sleep(0.01)
            if not there and self.poll() is None:
                self.status = -signal.SIGKILL  # a signal has cut short the reading of what was told
        assert self.status is not None
        return self.status

    def _is_there(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def send_signal(self, number: int, /) -> None:
        if self.status is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return  # it has ended, and the server is about to tell
