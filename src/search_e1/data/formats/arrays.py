"""Streams the records of a file that is a single JSON array, possibly larger than memory."""

import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from search_e1.data.lines import open_binary
from search_e1.errors import DataError

_SUFFIXES = (".json", ".json.gz", ".json.zst")
_START = re.compile(r'\s*(?:\{\s*"Data"\s*:\s*)?\[')
"""An array, or TriviaQA's object with an array under its first key."""
_BETWEEN = re.compile(r"[\s,]*")
_CHUNK = 2**20  # characters
_MOST = 2**26  # characters per item


def is_array(path: Path) -> bool:
    """Whether a ``.json`` file is one array of records rather than JSON lines; false if it cannot be read."""
    try:
        with _open(path) as file:
            return path.name.lower().endswith(_SUFFIXES) and _START.match(file.read(2**12)) is not None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error):
        return False


def array_items(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and JSON of each item. At most two items are in memory.

    Raises:
        DataError: the file cannot be read or is not JSON, or an item is far too long; names file and item.
    """
    number, decode = 1, json.JSONDecoder().raw_decode
    try:
        with _open(path) as file:
            buffer = file.read(_CHUNK)
            start = _START.match(buffer)
            at = start.end() if start else 0
            while not buffer.startswith("]", at := _skip(buffer, at)):
                try:
                    end = decode(buffer, at)[1]
                except (ValueError, RecursionError) as error:  # broken JSON, or the rest of the item is not read yet
                    if len(buffer) - at > _MOST:
                        raise DataError(f"{path}:{number}: an item of more than {_MOST >> 20} MiB, or broken JSON") from None
                    if not (more := file.read(max(_CHUNK, len(buffer) - at))):
                        problem = getattr(error, "msg", None) or error
                        raise DataError(f"{path}:{number}: not JSON ({problem}); write an array of objects") from None
                    buffer, at = buffer[at:] + more, 0
                else:
                    yield number, buffer[at:end].encode()
                    number, at = number + 1, end
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        problem = getattr(error, "strerror", None) or error
        raise DataError(f"{path}:{number}: cannot be read ({problem}); give a JSON file in UTF-8") from None


def _skip(buffer: str, at: int) -> int:
    between = _BETWEEN.match(buffer, at)
    return between.end() if between else at


def _open(path: Path) -> TextIO:
    return io.TextIOWrapper(open_binary(path), encoding="utf-8-sig")
