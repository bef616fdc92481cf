"""One run of a sweep, in a process of its own: ``python -m search_e1.lab.sweep.worker``.

What to run comes as one JSON line on standard input, which then stays open for as long as the sweep lives: when it is
closed, the run saves where it is and ends, as by SIGTERM.
"""

import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from time import perf_counter

from search_e1 import evolve, runs
from search_e1.config import Config
from search_e1.errors import SearchE1Error
from search_e1.lab.sweep.running import FINISHED, MISTAKE, finished
from search_e1.runs.allocation import keep_freed_memory
from search_e1.runs.progress import Progress, silent
from search_e1.runs.safe import plain
from search_e1.runs.stopping import Stopped, on_signals


@contextmanager
def _watch(stage: str) -> Iterator[Progress]:
    """A line in the log for each stage that works."""
    print(f"{stage} ...", flush=True)
    clock = perf_counter()
    yield silent
    print(f"{stage}: {perf_counter() - clock:.1f} s", flush=True)


def _end_with_the_sweep(held: FileIO) -> None:
    """Ends this process when nobody holds the other end of its standard input any more."""
    while held.read(1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """The exit status: 0, ``MISTAKE``, or that of a signal."""
    keep_freed_memory()
    warnings.filterwarnings("ignore", category=FutureWarning)
    held = FileIO(sys.stdin.fileno(), closefd=False)  # unbuffered: a buffer's lock must not be held when Python ends
    order = json.loads(held.readline())
    config = Config.model_validate(order["config"])
    try:
        with on_signals() as stop:
            threading.Thread(target=_end_with_the_sweep, args=[held], daemon=True).start()
            evolve.train(config, _watch, stop, shared=Path(order["shared"]), other_versions=order["other_versions"])
            runs.write_atomically(config.run / FINISHED, json.dumps(finished(config), indent=2) + "\n")
    except SearchE1Error as error:
        print(f"{plain(str(error))}", file=sys.stderr)
        return MISTAKE
    except Stopped as stopped:
        return stopped.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
