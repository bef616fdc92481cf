"""Reads JSON lines: plain, ``.gz`` or ``.zst``."""

import gzip
import io
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from search_e1.errors import DataError
from search_e1.runs import sha256

_MOST_BYTES = 2**26  # per line; a compressed file can expand to any size


class BadRecordError(DataError):
    """One unusable record of a file whose other records may be usable."""

    def __init__(self, kind: str, message: str) -> None:
        """``kind``: a short description of the fault, by which records are counted."""
        super().__init__(message)
        self.kind = kind


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers (from 1) and the JSON objects of a plain, ``.gz`` or ``.zst`` file, without blank lines.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object, repeats a key or is far too long; names file and
            line.
    """
    for number, line in raw_lines(path, _MOST_BYTES):
        if len(line) > _MOST_BYTES:
            raise DataError(f"{path}:{number}: more than {_MOST_BYTES >> 20} MiB in one line; write one object per line")
        yield number, parse(line, f"{path}:{number}", unique=True)


def raw_lines(path: Path, most: int = -1) -> Iterator[tuple[int, bytes]]:
    """Line numbers (from 1) and lines, without blank ones. A line longer than ``most`` bytes is cut to ``most + 1``.

    Raises:
        DataError: the file cannot be read, is truncated or damaged.
    """
    number = 0
    try:
        with open_binary(path) as file:
            while line := file.readline(most + 1 if most >= 0 else -1):
                number += 1
                if line.strip():
                    yield number, line
                while not line.endswith(b"\n") and line:  # the rest of an overlong line
                    line = file.readline(2**20)
    except (OSError, EOFError, zlib.error) as error:
        # Not a .gz, truncated, or damaged: an OSError without strerror, an EOFError, a zlib.error.
        problem = getattr(error, "strerror", None) or error
        where = f"{path}:{number + 1}" if number else str(path)
        raise DataError(
            f"{where}: cannot be read ({problem}); give the path of a JSON lines file, plain, .gz or .zst"
        ) from None


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def open_binary(path: Path) -> BinaryIO:
    """The uncompressed content of the file."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".zst":
        import pyarrow

        # Not `zstandard`, whose reader does not notice a truncated file.
        return io.BufferedReader(pyarrow.CompressedInputStream(path.open("rb"), "zstd"), 2**17)
    return path.open("rb")


def checksum(path: Path) -> str:
    """The sha256 of the file as stored, in hexadecimal.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return sha256(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({os.strerror(error.errno or 0)}); give the path of a file") from None


def parse(line: bytes, where: str, nan: float | None = math.nan, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object in ``line``; ``nan`` replaces NaN, which Python writes although JSON lacks it.

    Raises:
        BadRecordError: the line is not a JSON object, or, with ``unique``, repeats a key; the message begins with ``where``.
    """

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise BadRecordError("a key twice", f"{where}: key {twice!r} appears twice; give each its own name")
        return found

    hook = unique_keys if unique else None
    try:
        record = json.loads(line, parse_constant=lambda name: nan if name == "NaN" else float(name), object_pairs_hook=hook)
    except BadRecordError:
        raise
    except UnicodeDecodeError as error:
        raise BadRecordError("not UTF-8", f"{where}: not UTF-8 ({error}); write the file in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadRecordError("not JSON", f"{where}: not JSON ({error}); write one JSON object per line") from None
    if b"\\u" in line:  # JSON can escape half of a surrogate pair, which no UTF-8 file or tokenizer can represent
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadRecordError(
                "half of a surrogate pair",
                f"{where}: half of a surrogate pair in its text; fix or remove the \\u escape",
            ) from None
    if not isinstance(record, dict):
        raise BadRecordError(
            "not a JSON object",
            f"{where}: {type(record).__name__} where a JSON object is needed; write one object per line",
        )
    return record
