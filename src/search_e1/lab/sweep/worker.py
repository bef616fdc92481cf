"""One run of a sweep, in its own process: ``python -m search_e1.lab.sweep.worker``.

The order is one JSON line on standard input, which stays open while the sweep lives. When it closes, the run saves and stops,
as on SIGTERM.
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
from search_e1.lab.sweep.running import FINISHED, MISTAKE, finished_record
from search_e1.runs.allocation import keep_freed_memory
from search_e1.runs.progress import Progress, silent
from search_e1.runs.safe import plain
from search_e1.runs.stopping import Stopped, on_signals


@contextmanager
def _log_stage(stage: str) -> Iterator[Progress]:
    print(f"{stage} ...", flush=True)
    clock = perf_counter()
    yield silent
    print(f"{stage}: {perf_counter() - clock:.1f} s", flush=True)


def _end_with_the_sweep(stdin: FileIO) -> None:
    """End this process when the other end of its standard input is closed."""
    while stdin.read(1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Run the order on standard input; returns the exit status: 0, ``MISTAKE``, or a signal's."""
    keep_freed_memory()
    warnings.filterwarnings("ignore", category=FutureWarning)
    stdin = FileIO(sys.stdin.fileno(), closefd=False)  # unbuffered: a buffer's lock must not be held when Python ends
    order = json.loads(stdin.readline())
    config = Config.model_validate(order["config"])
    try:
        with on_signals() as stop:
            threading.Thread(target=_end_with_the_sweep, args=[stdin], daemon=True).start()
            config = config.model_copy(update={"bundle": False})  # copies of every run's weights would fill the disk
            evolve.train(config, _log_stage, stop, shared=Path(order["shared"]), other_versions=order["other_versions"])
            runs.write_atomically(config.run / FINISHED, json.dumps(finished_record(config), indent=2) + "\n")
    except SearchE1Error as error:
        print(f"{plain(str(error))}", file=sys.stderr)
        return MISTAKE
    except Stopped as stopped:
        return stopped.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
