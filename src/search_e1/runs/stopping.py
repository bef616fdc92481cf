"""Stopping on a signal: a stage finishes its current step or chunk and saves; a second signal stops it at once.

Preemption sends SIGTERM, a user SIGINT. Work that must not be interrupted is wrapped in ``Stop.finishing``; all other work
ends at once, as if killed, and loses only what was not on disk.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = {signal.SIGTERM: 75, signal.SIGINT: 130}
"""Signal -> exit status: 75 is EX_TEMPFAIL in sysexits.h, on which schedulers start a job again."""


class Stopped(BaseException):
    """A signal ended the work; everything saved is intact. Not an ``Exception``, so that no handler swallows it."""

    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(f"stopped by {signum.name}; run the same command again to resume")
        self.signum, self.status = signum, STATUS[signum]


class Stop:
    """Whether a signal has asked to stop. Without ``on_signals``, none is handled."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._finishing = 0

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Wraps work that is finished before a first signal stops it.

        Raises:
            Stopped: a signal arrived meanwhile.
        """
        self._finishing += 1
        try:
            yield
        finally:
            self._finishing -= 1
        self.leave()

    def leave(self) -> None:
        """Stop here if a signal asked for it; the caller has saved its work.

        Raises:
            Stopped: a signal asked to stop.
        """
        if self.asked:
            raise Stopped(self.asked)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        first, self.asked = self.asked is None, signal.Signals(signum)
        if self._finishing and first:
            # Not `print`: the signal may have arrived during another write to the same buffer.
            os.write(2, f"\n{self.asked.name}: finishing the step; repeat to stop immediately\n".encode())
            return
        for number in STATUS:  # a third signal kills the process directly
            signal.signal(number, signal.SIG_DFL)
        raise Stopped(self.asked)


@contextmanager
def on_signals() -> Iterator[Stop]:
    """A ``Stop`` that is set by SIGTERM and SIGINT within the context. For the main thread only."""
    stop = Stop()
    before = {number: signal.signal(number, stop._handle) for number in STATUS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
