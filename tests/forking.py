"""Copies of the test's process. What goes wrong in one, or lasts too long, fails the test; none is left behind."""

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkProcess

from search_e1.cli import main as cli

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


class Verb:
    """``search-e1 WORDS`` in a copy, with pipes as its standard streams: a process that need not import for seconds."""

    def __init__(self, *words: object, **environment: str) -> None:
        pipes = [os.pipe() for _ in range(3)]
        self._process = fork(_run_verb, pipes, words, environment)
        ours = [write if number == 0 else read for number, (read, write) in enumerate(pipes)]
        for end in {end for pipe in pipes for end in pipe} - set(ours):
            os.close(end)
        self.stdin, self.stdout, self.stderr = os.fdopen(ours[0], "w"), os.fdopen(ours[1]), os.fdopen(ours[2])

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid or 0, number)

    def communicate(self) -> tuple[int | None, str, str]:
        """Wait for its end: exit status, and what is still unread of its output and its errors, which pipes can hold."""
        self.stdin.close()
        [status] = end([self._process])
        with self.stdout, self.stderr:
            return status, self.stdout.read(), self.stderr.read()


def _run_verb(pipes: Sequence[tuple[int, int]], words: Sequence[object], environment: dict[str, str]) -> None:
    for number, (read, write) in enumerate(pipes):
        os.dup2(write if number else read, number)
        os.close(read)
        os.close(write)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1)  # buffered as Python does
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    sys.argv = ["search-e1", *map(str, words)]
    cli.main()


def wait_until(done: Callable[[], bool], seconds: float = LONGEST) -> None:
    """Until ``done``, or fail."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.01)
