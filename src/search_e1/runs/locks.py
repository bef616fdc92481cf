"""A directory for one process at a time.

The lock is the kernel's (``flock``): it ends with the process that holds it, however that ends, and on a network file
system the server keeps it for all machines. Where a file system has no such locks, a file stands in for it; one that a dead
process of this machine left is taken over, one of another machine is not, since nobody here can know.
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
def held(directory: Path) -> Iterator[None]:
    """Keep other processes from working in ``directory``, which is made if it is not there.

    Raises:
        RunError: another one works in it; says who. Or the directory cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = _acquire(directory)
    except Timeout as error:
        raise RunError(
            f"{directory}: {_holder(directory)} works in this run directory; wait for it, or use another"
            f"{_stale(Path(error.lock_file))}"
        ) from None
    except OSError as error:
        raise RunError(f"{directory}: {error.strerror or error}; give a run directory that can be written to") from None
    try:
        _sign(directory)
        yield
    finally:
        with suppress(OSError):
            (directory / _HOLDER).unlink(missing_ok=True)
        lock.release()


@contextmanager
def making(path: Path) -> Iterator[None]:
    """Keep other processes from making ``path``, which is new, by a hidden directory beside it that goes in the end.

    Raises:
        RunError: another one makes it, or has made it; or nothing can be written there.
    """
    beside = path.with_name(f".{path.name}.unfinished")
    with held(beside):
        try:
            if path.exists():  # made since the caller looked
                raise RunError(f"{path} exists; give another directory, or remove it")
            yield
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """One process after the other, by a lock on ``file``. Where the file system has no locks, all at once."""
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
    """Say who holds the lock: only to be told to others, so that a full disk does not matter."""
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    with suppress(OSError):
        (directory / _HOLDER).write_text(
            json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}) + "\n", encoding="utf-8"
        )


def _holder(directory: Path) -> str:
    try:
        told = json.loads((directory / _HOLDER).read_text(encoding="utf-8"))
        return f"process {told['pid']} on {told['host']} (since {told['since']})"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"


def _stale(path: Path) -> str:
    """How to get past a file that stands in for a lock: what is left of a machine that is gone never ends by itself."""
    try:
        marked = path.stat().st_size > 0  # the kernel's locks leave their file empty
    except OSError:
        return ""
    return f" (if that process is gone for certain, remove {path})" if marked else ""
