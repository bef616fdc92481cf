"""Files that survive a kill and whose damage is detected: written as a whole, with checksums, read record by record."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from search_e1.errors import DataError
from search_e1.types import Record

SUM = ".sha256"
"""Suffix of the file with a file's checksum, in the format of `sha256sum -c`; files of earlier versions have none."""


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` as a whole; its content is on disk before it appears under that name."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    sync(path.parent)


def append(path: Path, data: bytes) -> None:
    """Append ``data`` to ``path``; on disk when this returns."""
    with path.open("ab") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def summed_line(entry: str) -> str:
    """A line of a journal: the checksum of ``entry``, then ``entry``, which has no line break."""
    return f"{sha256_text(entry)} {entry}\n"


def summed_entries(journal: Path) -> list[str]:
    """The entries of ``journal`` up to the first damaged one; empty without a file."""
    entries: list[str] = []
    for line in journal.read_bytes().splitlines() if journal.is_file() else ():
        checksum, _, entry = line.partition(b" ")
        if hashlib.sha256(entry).hexdigest().encode() != checksum:
            break
        entries.append(entry.decode())
    return entries


def write_summed(path: Path, text: str) -> None:
    """Write ``path`` as a whole, with its checksum in a file beside it."""
    write_atomically(path.with_name(path.name + SUM), _sum_of(path, text.encode()).decode())
    write_atomically(path, text)


def read_summed(path: Path) -> bytes:
    """The content written by ``write_summed``; not verified if the checksum file is missing.

    Raises:
        ValueError: the content does not match its checksum.
        FileNotFoundError: ``path`` does not exist.
    """
    text, beside = path.read_bytes(), path.with_name(path.name + SUM)
    if beside.exists() and beside.read_bytes() != _sum_of(path, text):
        raise ValueError("changed since it was written")
    return text


def _sum_of(path: Path, text: bytes) -> bytes:
    return f"{hashlib.sha256(text).hexdigest()}  {path.name}\n".encode()


def sync(directory: Path) -> None:
    """Flush ``directory``'s entries (names) to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


Kept = TypeVar("Kept", bound=Record)


def read_records(path: Path, kind: type[Kept], again: str) -> Iterator[Kept]:
    """The records of a file with one per line, read lazily. ``again``: the remedy in the error message.

    Raises:
        DataError: the file cannot be read, or a line is not a valid record; the message names it.
    """
    try:
        with path.open("rb") as file:  # not `splitlines`, which also splits at separators that JSON texts may contain
            for number, line in enumerate(file, 1):
                try:
                    record = kind.model_validate_json(line)
                except ValueError:
                    raise DataError(f"{path}:{number}: not a {kind.__name__.lower()}; {again}") from None
                yield record
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; {again}") from None
