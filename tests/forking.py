"""Copies of the test's process. What goes wrong in one, or lasts too long, fails the test; none is left behind."""

import gc
import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkProcess

LONGEST = 120.0
"""Seconds that work in a copy may take."""


def fork(work: Callable[..., object], *args: object) -> ForkProcess:
    """Begin ``work`` in a copy."""
    process = multiprocessing.get_context("fork").Process(target=_in_copy, args=(work, *args))
    gc.disable()
    try:
        process.start()
    finally:
        gc.enable()
    return process


def _in_copy(work: Callable[..., object], *args: object) -> None:
    gc.freeze()  # what tests before have left is not for a copy to destroy: it may wait for threads that were not copied
    gc.enable()
    work(*args)


def end(processes: Sequence[ForkProcess], seconds: float = LONGEST) -> list[int | None]:
    """Wait for all, and return how each has ended: its exit status, or minus the signal that killed it."""
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        assert not any(process.is_alive() for process in processes), f"at work for more than {seconds:g} s"
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def wait_until(done: Callable[[], bool], seconds: float = LONGEST) -> None:
    """Until ``done``, or fail."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.01)
