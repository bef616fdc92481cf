"""Reads files in separate processes, so that a parser that hangs, crashes or exhausts memory costs only one file."""

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
from search_e1.errors import RunError
from search_e1.types import Record

READ, EMPTY, FAILED = "read", "empty", "failed"


class Limits(Record):
    """Limits for one file; a failed file is retried when they change."""

    seconds: float = 60
    file_mib: float = 100
    """File size."""
    unpacked_mib: float = 1024
    """Unpacked size of a zipped format (DOCX, PPTX, XLSX, EPUB)."""
    memory_mib: int = 4096
    """Memory of a reading process, if the system can limit it (Linux)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of reading one file."""

    status: str
    """``read``, ``empty`` or ``failed``."""
    reason: str = ""
    """Why it was not read, or which part was not."""
    passages: int = 0
    seconds: float = 0.0
    packed: bytes = b""
    """Its corpus lines, compressed with zlib."""


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    pipe: "Connection[Any, Any]"
    task: Found | None = None
    since: float = 0.0
    ready: bool = False


def read_all(files: Iterable[Found], cutting: Cutting, limits: Limits, processes: int) -> Iterator[tuple[Found, Outcome]]:
    """Read ``files`` in ``processes``; yields outcomes as they arrive, with at most one file per process in memory."""
    context = multiprocessing.get_context("spawn")  # forking a process with threads may hang
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
                if outcome.status == FAILED and not outcome.seconds:  # the process died or exceeded the time limit
                    _end(worker)
                    workers[workers.index(worker)] = start()
                    outcome = Outcome(FAILED, outcome.reason, seconds=spent)
                assert task
                yield task, outcome
    finally:
        for worker in workers:
            _end(worker)


def _hear(worker: _Worker) -> Outcome | None:
    """Receive an outcome from ``worker``; ``None`` if it only reported that it is ready."""
    try:
        message = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join(5)
        code = worker.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        if worker.task is None:
            raise RunError(f"a reader process {how} at startup; raise --memory-mib or lower --processes") from None
        return Outcome(FAILED, f"the process that read it {how}")
    if isinstance(message, Outcome):
        return message
    worker.ready = True
    return None


def _end(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.kill()
    worker.process.join()


def _serve(pipe: "Connection[Any, Any]", cutting: Cutting, limits: Limits) -> None:
    """Main function of a worker process: read the files sent until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # silences C libraries; a crash is reported by its signal
        os.dup2(nowhere, stream)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_mib * 2**20, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    pipe.send(None)
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        signal.alarm(int(limits.seconds) + 30)  # ends a hanging parser if the parent process is gone
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
            warnings.simplefilter("ignore")  # warnings to developers
            warnings.simplefilter("always", UserWarning)  # warnings about the file
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
    except Exception as error:  # a parser may raise anything on a malformed file
        first = str(error).strip().partition("\n")[0][:200]
        status, reason = FAILED, f"not a valid {file.kind} file ({type(error).__name__}: {first})"
    if status == READ and not number:
        status, reason = EMPTY, reason or "no text in it"
    seconds = max(time.perf_counter() - clock, 1e-6)
    return Outcome(status, reason, number if status == READ else 0, seconds, bytes(packed) if status == READ else b"")
