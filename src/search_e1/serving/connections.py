"""HTTP connections with timeouts for every phase and a limit on their number.

uvicorn itself closes connections that are idle between requests. But it waits forever for the head of a request and for a
client that does not read its response, and accepts any number of connections.
"""

from asyncio import TimerHandle, Transport

from uvicorn.protocols.http.h11_impl import H11Protocol

from search_e1.serving.limits import Limits

_SLOW = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def guarded(limits: Limits) -> type[H11Protocol]:
    """Protocol class for ``uvicorn.Config(http=...)`` with the timeouts and connection limit of ``limits``."""

    class Guarded(H11Protocol):
        # Timers for the end of a head and for a client that has stopped reading, and when the connection last became idle.
        _head: TimerHandle | None = None
        _send: TimerHandle | None = None
        _since = 0.0

        def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._since = self.loop.time()
            if len(self.connections) > limits.connections and not self._make_room():
                transport.write(_FULL)
                transport.close()
                return
            self._head = self.loop.call_later(limits.head_timeout, self._slow)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._expect()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._since = self.loop.time()
            self._expect(only_begun=True)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._send = self._send or self.loop.call_later(limits.send_timeout, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            _cancel(self._send)
            self._send = None

        def connection_lost(self, exc: Exception | None) -> None:
            _cancel(self._head)
            _cancel(self._send)
            super().connection_lost(exc)

        def _expect(self, *, only_begun: bool = False) -> None:
            """Start or stop the timer of a head; between requests, uvicorn's own timeout applies."""
            if self._answering() or self.transport.is_closing():
                _cancel(self._head)
                self._head = None
            elif self._head is None and (self.conn.trailing_data[0] or not only_begun):
                self._head = self.loop.call_later(limits.head_timeout, self._slow)

        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _slow(self) -> None:
            if self.conn.trailing_data[0] and self.cycle is None:
                self.transport.write(_SLOW)
            self.transport.close()

        def _make_room(self) -> bool:
            """Close the oldest connection without a complete request; false if all are being answered."""
            others = [c for c in self.connections if isinstance(c, Guarded) and c is not self]
            waiting = [c for c in others if not c._answering() or c.cycle.more_body]
            if waiting:  # those without a complete head first
                min(waiting, key=lambda c: (c._answering(), c._since)).transport.abort()
            return bool(waiting)

    return Guarded


def _cancel(timer: TimerHandle | None) -> None:
    if timer:
        timer.cancel()
