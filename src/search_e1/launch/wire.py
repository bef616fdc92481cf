"""What two machines of a run say to each other: JSON, a message a line, over TCP; and that the other is still there."""

import json
import queue
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

_BEAT = 5.0
"""Seconds between signs of life."""
_SILENCE = 25.0
"""Seconds without one after which the other is taken for dead."""


_FAREWELL = 2.0
"""Seconds that the other has to close its side too."""


class GoneError(Exception):
    """The other side has closed the connection, or is silent."""


class Wire:
    """A connection to another machine. Threads send signs of life and read; all else is for one thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()
        self._received: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(_SILENCE)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._beat, daemon=True).start()

    def here(self) -> str:
        """The address by which the other machine reaches this one."""
        return plain(self._socket.getsockname()[0])

    def send(self, told: Mapping[str, Any]) -> None:
        """Raises:
        GoneError: nobody is there.
        """
        try:
            with self._sending:
                self._socket.sendall(json.dumps(told).encode() + b"\n")
        except OSError as error:
            raise GoneError from error

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """The next message, or ``None`` if none comes within ``timeout`` seconds.

        Raises:
            GoneError: nobody is there.
        """
        try:
            told = self._received.get(timeout=timeout) if timeout else self._received.get_nowait()
        except queue.Empty:
            return None
        if told is None:
            self._received.put(None)
            raise GoneError
        return told

    def put_back(self, told: dict[str, Any]) -> None:
        """Receive it again, after all that is there."""
        self._received.put(told)

    def close(self) -> None:
        """What was sent arrives first."""
        self._closed.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            self._reader.join(_FAREWELL)
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> None:
        rest = b""
        try:
            while data := self._socket.recv(1 << 16):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if told := json.loads(line):
                        self._received.put(told)
        except (OSError, ValueError):
            pass
        self._received.put(None)

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT):
            try:
                self.send({})
            except GoneError:
                return


def plain(address: str) -> str:
    """Without the prefix of an IPv4 address in IPv6."""
    return address.removeprefix("::ffff:")


def line(connection: socket.socket, timeout: float) -> dict[str, Any]:
    """The first message on a new connection.

    Raises:
        OSError, ValueError: none came, or no such message.
    """
    deadline, data = time.monotonic() + timeout, bytearray()
    while not data.endswith(b"\n"):
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        byte = connection.recv(1)
        if not byte or len(data) > 1 << 20:
            raise OSError("no message")
        data += byte
    told = json.loads(data)
    if not isinstance(told, dict):
        raise ValueError("no message")
    return told
