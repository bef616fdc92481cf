"""Locks that give a directory to one process at a time.

The lock is the kernel's (``flock``): it is released when the process that holds it ends in any way, and on a network file
system the server keeps it for all machines. A file system without such locks gets a lock file instead. A dead process's lock
file is taken over on the same machine, but not from another one, where the process cannot be checked.
"""

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from search_e1.errors import RunError

_LOCK, _SOFT_LOCK, _HOLDER = ".lock", ".lock-file", ".holder.json"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def held(directory: Path, shown: Path | None = None) -> Iterator[None]:
    """Lock ``directory`` against other processes; creates it if missing.

    ``shown``: the path in messages, if ``directory`` is a hidden one beside what the user named.

    Raises:
        RunError: another process holds it (the message names it), or the directory cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = _acquire(directory)
    except Timeout as error:
        raise RunError(
            f"{shown or directory}: {_signature(directory)} is using it; wait for it, or use another"
            f"{_stale(Path(error.lock_file))}"
        ) from None
    except OSError as error:
        raise RunError(f"{shown or directory}: {error.strerror or error}; give a directory that can be written to") from None
    try:
        _sign(directory)
        yield
    finally:
        with suppress(OSError):
            (directory / _HOLDER).unlink(missing_ok=True)
        lock.release()


@contextmanager
def making(path: Path) -> Iterator[None]:
    """Lock the new ``path`` against other processes that make it, by a hidden directory beside it, removed at the end.

    Raises:
        RunError: another process is making or has made ``path``, or nothing can be written there.
    """
    beside = path.with_name(f".{path.name}.unfinished")
    with held(beside, path):
        try:
            if path.exists():  # created since the caller checked
                raise RunError(f"{path} exists; give another directory, or remove it")
            yield
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """Let one process at a time through, by a lock on ``file``. On a file system without locks, all go at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(poll_interval=0.2)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()


def _acquire(directory: Path) -> BaseFileLock:
    lock: BaseFileLock = FileLock(directory / _LOCK, timeout=0)
    try:
        lock.acquire()
    except OSError as error:
        if isinstance(error, Timeout) or error.errno not in _NO_LOCKS:
            raise
        lock = SoftFileLock(directory / _SOFT_LOCK, timeout=0)
        lock.acquire()
    return lock


def _sign(directory: Path) -> None:
    """Record who holds the lock. Only for other processes' messages, so a full disk is ignored."""
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    with suppress(OSError):
        (directory / _HOLDER).write_text(
            json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}) + "\n", encoding="utf-8"
        )


def holder(directory: Path) -> str | None:
    """The process that holds the lock of ``directory``; ``None`` if none signed it, or if it was killed on this machine."""
    if (signed := _signed(directory)) is None:
        return None
    pid, host, _ = signed
    return None if host == socket.gethostname() and not _lives(pid) else f"process {pid} on {host}"


def _signed(directory: Path) -> tuple[int, str, str] | None:
    """Process id, host and time that the holder of a lock left, if they can be read."""
    try:
        signed = json.loads((directory / _HOLDER).read_bytes())
        return int(signed["pid"]), str(signed["host"]), str(signed["since"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _signature(directory: Path) -> str:
    """Who holds a lock that could not be had, and since when."""
    signed = _signed(directory)
    return "process {} on {} (since {})".format(*signed) if signed else "another process"


def _stale(path: Path) -> str:
    """The remedy for a lock file: one from a machine that is gone is never released by itself."""
    try:
        marked = path.stat().st_size > 0  # with kernel locks the file is empty
    except OSError:
        return ""
    return f" (if that process is certainly gone, remove {path})" if marked else ""
