"""Several machines that work on one run: how they meet, how the first directs the others, and how all end together.

All see the run directory. The first machine's process, which runs the loop, leaves there where it listens, and a secret that
tells who may come; the others' processes find it, and connect. It compares what decides about results on all of them, and then
tells them of each stage, for which they start their part of the group. A machine that is lost is noticed by its connection.
"""

import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from search_e1 import errors
from search_e1.errors import RunError, SearchE1Error, TrainingError
from search_e1.launch import wire
from search_e1.launch.place import Place
from search_e1.launch.wire import GoneError, Wire
from search_e1.runs import cpu
from search_e1.runs.drift import changes, lines
from search_e1.runs.progress import Progress
from search_e1.runs.stopping import Stopped

FILE = ".nodes.json"
"""In the run directory: where the first node listens."""
_HELLO = 10.0
"""Seconds for a connection to say who it is."""
_KILLING = 30.0
"""Seconds for another node to end its processes."""
Facts = Mapping[str, Any]
"""What must be the same on all nodes, as JSON."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """How nodes look for each other."""

    seconds: float
    """How long."""
    address: str | None = None
    """Where others reach the first; without it, all addresses that it has."""
    port: int = 0
    """That it listens on; 0 is any."""


class Node:
    """Another machine, as the first sees it; to a group, one more of its processes."""

    pid = 0
    stdin: IO[bytes] | None = None

    def __init__(self, number: int, hello: Mapping[str, Any], connection: Wire) -> None:
        self.number, self.host, self.facts, self.problem = number, hello["host"], hello["facts"], hello["problem"]
        self.wire = connection
        self.ahead: float = hello["time"] - time.time()
        """Of this machine's clock, in seconds."""
        self.statuses: dict[int, int] = {}
        """Rank -> exit status, of those that have ended."""
        self.notes: dict[int, dict[str, Any]] = {}
        self.left: signal.Signals | None = None
        """The signal that it left for."""
        self.lost = False
        self._running = False

    def __str__(self) -> str:
        return f"node {self.number} ({self.host})"

    def begin(self, order: Mapping[str, Any]) -> None:
        """Its processes of a group; with ``poll`` and the rest of ``Process`` for them as a whole."""
        self.statuses, self.notes, self._running = {}, {}, True
        self._send({"begin": order})

    def poll(self) -> int | None:
        """``None`` while its processes are at work; then 0, or the first status that is another."""
        self.take(0.0)
        if self.lost or self.left:
            return 1
        failed = next((status for status in self.statuses.values() if status), 0)
        return failed or (None if self._running else 0)

    def wait(self) -> int:
        """Until all of its processes have ended."""
        deadline = time.monotonic() + _KILLING
        while self._running and not (self.lost or self.left) and time.monotonic() < deadline:
            self.take(0.1)
        return self.poll() or 0

    def send_signal(self, number: int, /) -> None:
        self._send({"signal": number})

    def check(self) -> None:
        """Raises:
        TrainingError: the machine is gone.
        Stopped: its process was asked to stop.
        """
        self.take(0.0)
        if self.left:
            raise Stopped(self.left)
        if self.lost:
            raise TrainingError(
                f"{self} is gone: its process was killed, or its machine or the network is down; run the same command again on "
                "all nodes, it goes on"
            )

    def take(self, timeout: float) -> None:
        """Note what it tells."""
        try:
            while told := self.wire.receive(timeout):
                timeout = 0.0
                if "left" in told:
                    self.left = signal.Signals(told["left"])
                    continue
                self.statuses = {int(rank): status for rank, status in told["statuses"].items()}
                self.notes = {
                    int(rank): {**note, "time": note["time"] - self.ahead} for rank, note in told["notes"].items()
                }
                self._running = told["running"]
                cpu.add(told["seconds"])
        except GoneError:
            self.lost = self.left is None

    def _send(self, told: Mapping[str, Any]) -> None:
        try:
            self.wire.send(told)
        except GoneError:
            self.take(0.0)
            self.lost = self.left is None


# The first node.


def gather(run: Path, place: Place, facts: Facts, waiting: Waiting, progress: Progress) -> list[Node]:
    """Wait for all other nodes, and return them in their order.

    Raises:
        RunError: one has not come in time, has come twice, or is not as this one is.
        SearchE1Error: what one of them cannot do.
    """
    token, deadline = secrets.token_hex(16), time.monotonic() + waiting.seconds
    found: dict[int, Node] = {}
    with _listening(waiting.port) as server:
        _leave_word(run, server.getsockname()[1], token, waiting.address)
        try:
            while len(found) + 1 < place.nodes:
                progress(len(found) + 1, place.nodes)
                if node := _next(server, token, deadline):
                    _add(found, node, place)
                elif time.monotonic() > deadline:
                    raise RunError(_missing(found, place, waiting.seconds))
            _compare(found, facts)
        except BaseException as error:
            finish(found.values(), error)
            raise
        finally:
            (run / FILE).unlink(missing_ok=True)
    progress(place.nodes, place.nodes)
    return [found[number] for number in sorted(found)]


def finish(nodes: Sequence[Node] | Any, error: BaseException | None = None) -> None:
    """Tell the others how it ended, which they then say too."""
    if isinstance(error, Stopped):
        told: dict[str, Any] = {"stopped": error.signum}
    elif error is None:
        told = {}
    else:
        own = isinstance(error, SearchE1Error)
        said = str(error) if own else f"node 0: {type(error).__name__}: {error}"
        told = {"kind": type(error).__name__ if own else "TrainingError", "message": said}
    for node in nodes:
        with suppress(GoneError):
            node.wire.send({"end": told})
        node.wire.close()


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise RunError(f"launch.port = {port}: {error.strerror}; give another, or leave it out") from error
    with server:
        yield server


def _leave_word(run: Path, port: int, token: str, address: str | None) -> None:
    """For whoever may read the run directory, and nobody else."""
    word = {
        "host": socket.gethostname(),
        "addresses": [address] if address else _addresses(),
        "port": port,
        "token": token,
    }
    partial = run / f"{FILE}.partial"
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as stream:
        json.dump(word, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(run / FILE)


def _addresses() -> list[str]:
    """Of this machine's interfaces, its loopback last."""
    found = [a.address for names in psutil.net_if_addrs().values() for a in names if a.family == socket.AF_INET]
    return sorted(found, key=lambda address: address.startswith("127."))


def _next(server: socket.socket, token: str, deadline: float) -> Node | None:
    server.settimeout(max(0.01, min(1.0, deadline - time.monotonic())))
    try:
        connection, _ = server.accept()
    except TimeoutError:
        return None
    try:
        hello = wire.line(connection, _HELLO)
        if secrets.compare_digest(str(hello["token"]), token):
            node = Node(hello["node"], hello, Wire(connection))
            node.wire.send({"welcome": True})
            return node
    except (OSError, ValueError, LookupError, GoneError):
        pass
    connection.close()  # somebody else
    return None


def _add(found: dict[int, Node], node: Node, place: Place) -> None:
    twice = found.get(node.number)
    if twice or not 0 < node.number < place.nodes:
        finish([node])
        where = f" (from {twice.host} and {node.host})" if twice else f" (from {node.host})"
        raise RunError(
            f"node {node.number} of {place.nodes} has come{' twice' if twice else ''}{where}; number them from 0"
        )
    found[node.number] = node


def _missing(found: Mapping[int, Node], place: Place, seconds: float) -> str:
    missing = [str(number) for number in range(1, place.nodes) if number not in found]
    which = f"node {missing[0]}" if len(missing) == 1 else f"nodes {', '.join(missing)}"
    return (
        f"{which} of {place.nodes} did not come within {seconds:g} s (launch.wait_seconds); start the same command on every "
        "node, with the run directory on a file system that all of them see"
    )


def _compare(found: Mapping[int, Node], facts: Facts) -> None:
    for _, node in sorted(found.items()):
        if node.problem:
            kind, message = node.problem
            raise getattr(errors, kind)(f"{node}: {message}")
        if different := changes(node.facts, facts):
            listed = "; ".join(lines(different).strip().split("\n  ")).replace(" given", " on node 0")
            raise RunError(f"{node} is not as node 0 is: {listed}; make them the same")


# The other nodes.


def find(run: Path, place: Place, facts: Facts, problem: SearchE1Error | None, waiting: Waiting) -> Wire:
    """Find the first node, and tell it who this is, what is here, and what is wrong here.

    Raises:
        RunError: it did not come in time.
    """
    hello = {
        "node": place.node, "host": socket.gethostname(), "facts": facts,
        "problem": problem and (type(problem).__name__, str(problem)),
    }  # fmt: skip
    deadline = time.monotonic() + waiting.seconds
    while time.monotonic() < deadline:
        try:
            word = json.loads((run / FILE).read_text(encoding="utf-8"))
            for address in word["addresses"]:
                if connection := _reached(address, word["port"]):
                    told = json.dumps({**hello, "token": word["token"], "time": time.time()})
                    connection.sendall(told.encode() + b"\n")
                    if "welcome" in wire.line(connection, _HELLO):
                        return Wire(connection)
        except (OSError, ValueError, LookupError):
            pass
        time.sleep(0.5)
    raise RunError(
        f"{place}: node 0 did not come within {waiting.seconds:g} s (launch.wait_seconds): it left no word in {run}, or cannot "
        "be reached from here; start the same command on every node, with the run directory on a file system that all see"
    )


def _reached(address: str, port: int) -> socket.socket | None:
    with suppress(OSError):
        return socket.create_connection((address, port), timeout=3)
    return None


def follow(connection: Wire, place: Place, work: Callable[[Mapping[str, Any]], None]) -> None:
    """Do ``work`` for every group, until the first node tells that all is done.

    Raises:
        SearchE1Error: what went wrong there or here; or it is gone.
        Stopped: a signal, there or here.
    """
    try:
        while True:
            told = connection.receive(1.0)
            if told and "begin" in told:
                work(told["begin"])
            elif told and "end" in told:
                _end(told["end"])
                return
    except GoneError as error:
        raise TrainingError(
            f"{place}: node 0 is gone: its process was killed, or its machine or the network is down; run the same command "
            "again on all nodes, it goes on"
        ) from error
    except Stopped as stopped:
        with suppress(GoneError):
            connection.send({"left": stopped.signum})
        raise
    finally:
        connection.close()


def _end(told: Mapping[str, Any]) -> None:
    if "stopped" in told:
        raise Stopped(signal.Signals(told["stopped"]))
    if "kind" in told:
        raise getattr(errors, told["kind"])(told["message"])


def interface(address: str) -> str:
    """Name of the network interface that has ``address``; empty if none has."""
    names = (name for name, all in psutil.net_if_addrs().items() if any(a.address == address for a in all))
    return next(names, "")
