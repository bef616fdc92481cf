"""Files are read in processes of their own, so that a parser that hangs, crashes or eats the memory costs one file."""

import multiprocessing
import os
import resource
import signal
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from search_e1.data.documents.folder import Found
from search_e1.data.documents.passages import Cutting, lines
from search_e1.data.documents.readers import UnreadableError, read
from search_e1.types import Record

READ, EMPTY, FAILED = "read", "empty", "failed"


class Limits(Record):
    """What one file may cost; a file that failed is tried again under other limits."""

    seconds: float = 60
    file_mib: float = 100
    """Size of a file."""
    unpacked_mib: float = 1024
    """Size of what a zipped format (DOCX, PPTX, XLSX, EPUB) holds."""
    memory_mib: int = 4096
    """Memory of a reading process, where the system limits it (Linux)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a file."""

    status: str
    """``read``, ``empty`` or ``failed``."""
    reason: str = ""
    """Why it was not read, or what of it was not."""
    passages: int = 0
    seconds: float = 0.0
    packed: bytes = b""
    """Lines of the corpus, zlib."""


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    pipe: "Connection[Any, Any]"
    task: Found | None = None
    since: float = 0.0
    ready: bool = False


def read_all(files: Iterable[Found], cutting: Cutting, limits: Limits, processes: int) -> Iterator[tuple[Found, Outcome]]:
    """Read ``files`` in ``processes``, each file's outcome as it comes; at most one file a process is in memory."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    waiting = iter(files)
    workers: list[_Worker] = []

    def start() -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, cutting, limits), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    try:
        workers = [start() for _ in range(processes)]
        while True:
            for worker in [worker for worker in workers if worker.ready and worker.task is None]:
                worker.task = next(waiting, None)
                if worker.task is None:
                    workers.remove(worker)
                    _end(worker)
                    continue
                worker.since = time.monotonic()
                worker.pipe.send(worker.task)
            if not workers:
                return
            busy = [worker for worker in workers if worker.task]
            left = min((worker.since + limits.seconds - time.monotonic() for worker in busy), default=limits.seconds)
            heard = wait([worker.pipe for worker in workers], max(0.0, left) + 0.01)
            for worker in list(workers):
                outcome = None
                if worker.pipe in heard:
                    outcome = _hear(worker)
                elif worker.task and time.monotonic() - worker.since > limits.seconds:
                    outcome = Outcome(FAILED, f"took longer than --time-limit {limits.seconds:g} s")
                if outcome is None:
                    continue
                task, spent = worker.task, time.monotonic() - worker.since
                worker.task = None
                if outcome.status == FAILED and not outcome.seconds:  # the process is gone, or has to go
                    _end(worker)
                    workers[workers.index(worker)] = start()
                    outcome = Outcome(FAILED, outcome.reason, seconds=spent)
                assert task
                yield task, outcome
    finally:
        for worker in workers:
            _end(worker)


def _hear(worker: _Worker) -> Outcome | None:
    """What ``worker`` sent: an outcome, or that it is ready."""
    try:
        told = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join(5)
        code = worker.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        if worker.task is None:
            raise RuntimeError(f"a process that reads files {how} before it began") from None
        return Outcome(FAILED, f"the process that read it {how}")
    if isinstance(told, Outcome):
        return told
    worker.ready = True
    return None


def _end(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.kill()
    worker.process.join()


def _serve(pipe: "Connection[Any, Any]", cutting: Cutting, limits: Limits) -> None:
    """In the process: read what is sent until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what C libraries print; a crash is told by its signal
        os.dup2(nowhere, stream)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_mib * 2**20, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    pipe.send(None)
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        signal.alarm(int(limits.seconds) + 30)  # if nobody is left to end a parser that hangs
        outcome = read_file(task, cutting, limits)
        signal.alarm(0)
        with suppress(BrokenPipeError):
            pipe.send(outcome)


def read_file(file: Found, cutting: Cutting, limits: Limits) -> Outcome:
    """Read and cut one file."""
    clock = time.perf_counter()
    status, reason, packed = READ, "", bytearray()
    number, packer = 0, zlib.compressobj(1)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("ignore")  # of a parser to its programmer
            warnings.simplefilter("always", UserWarning)  # on the file
            document = read(file.path, file.kind, cutting.words, int(limits.unpacked_mib * 2**20))
        reason = document.note or (f"its reader warns: {str(said[0].message).partition(chr(10))[0][:200]}" if said else "")
        for line in lines(file.name, file.kind, document, cutting):
            packed += packer.compress(line)
            number += 1
        packed += packer.flush()
    except UnreadableError as error:
        status, reason = FAILED, str(error)
    except MemoryError:
        status, reason = FAILED, f"needs more than --memory-mib {limits.memory_mib}"
    except OSError as error:
        status, reason = FAILED, f"cannot be read ({error.strerror or error})"
    except Exception as error:  # a parser's, on a file that is not what its suffix says
        first = str(error).strip().partition("\n")[0][:200]
        status, reason = FAILED, f"not a sound {file.kind} file ({type(error).__name__}: {first})"
    if status == READ and not number:
        status, reason = EMPTY, reason or "no text in it"
    seconds = max(time.perf_counter() - clock, 1e-6)
    return Outcome(status, reason, number if status == READ else 0, seconds, bytes(packed) if status == READ else b"")
