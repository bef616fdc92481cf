"""Stopping on a signal: a stage first finishes the step or the chunk at hand and saves; a second signal does not wait.

Pre-emption sends SIGTERM, a person SIGINT. Work that cannot be cut anywhere asks to finish (``Stop.finishing``); all other
work ends where it is, as by a kill, which loses no more than what was not on disk.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = {signal.SIGTERM: 75, signal.SIGINT: 130}
"""Exit status: 75 is EX_TEMPFAIL of sysexits.h, which schedulers take for "start it again"."""


class Stopped(BaseException):
    """A signal ended the work; what was saved is sound. No ``Exception``: nothing on the way may swallow it."""

    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(f"stopped by {signum.name}; run the same command again to go on")
        self.signum, self.status = signum, STATUS[signum]


class Stop:
    """Whether a signal has asked to stop. Without ``on_signals`` none ever does."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._finishing = 0

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Work that is finished before a first signal ends it.

        Raises:
            Stopped: a signal came meanwhile.
        """
        self._finishing += 1
        try:
            yield
        finally:
            self._finishing -= 1
        self.leave()

    def leave(self) -> None:
        """Here is a good place to stop: what was done is saved.

        Raises:
            Stopped: a signal has asked for it.
        """
        if self.asked:
            raise Stopped(self.asked)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        first, self.asked = self.asked is None, signal.Signals(signum)
        if self._finishing and first:
            # Not `print`: the signal may have come in the middle of another write to the same buffer.
            os.write(2, f"\n{self.asked.name}: finishing the step; once more ends it at once\n".encode())
            return
        for number in STATUS:  # a third signal does not even wait for Python
            signal.signal(number, signal.SIG_DFL)
        raise Stopped(self.asked)


@contextmanager
def on_signals() -> Iterator[Stop]:
    """A ``Stop`` that SIGTERM and SIGINT ask, until the context ends. For the main thread only."""
    stop = Stop()
    before = {number: signal.signal(number, stop._handle) for number in STATUS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
