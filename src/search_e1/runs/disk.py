"""Disk errors (full, read-only, failing) as one-line messages."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from search_e1.errors import RunError, SearchE1Error

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
# Libraries written in other languages report these errors only as text.
_FULL_WORDS = (
    *("No space left on device", "Disk quota exceeded", "File too large", "disk is full"),
    *("os error 28", "os error 122", "os error 27"),  # Rust, so safetensors and tokenizers
    *("PytorchStreamWriter failed", "file write failed", "inline_container.cc"),
    "requested and",  # numpy: `12 requested and 5 written`
)


@contextmanager
def translate_disk_errors(directory: Path) -> Iterator[None]:
    """Translate disk errors of work in ``directory`` into one message.

    Raises:
        RunError: the disk is full, cannot be written to, or fails.
    """
    try:
        yield
    except SearchE1Error:
        raise
    except Exception as error:
        what = next((said for said in map(_said, _causes(error)) if said), None)
        if what is None:
            raise
        raise RunError(f"{directory}: {what}; finished work is kept: run the same command again once this is fixed") from error


def reserve(path: Path, size: int) -> None:
    """Allocate ``size`` bytes in a file, new or not: writing into a mapped file on a full disk kills the process.

    Raises:
        OSError: there is not enough space.
    """
    with path.open("ab") as file:
        if size and hasattr(os, "posix_fallocate"):  # macOS lacks it
            os.posix_fallocate(file.fileno(), 0, size)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _said(error: BaseException) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    if number in _FULL or any(words in str(error) for words in _FULL_WORDS):
        return f"the disk is full{where}"
    if number is not None and number in _REFUSED:
        return f"{os.strerror(number)}{where}"
    return f"disk I/O error{where}" if number == errno.EIO else None
