"""Passages from JSON lines."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from search_e1.errors import DataError
from search_e1.types import Passage

_HOLDS = 'each line holds {"id", "contents"} or {"id", "title", "text"}'


def read_corpus(path: Path) -> Iterator[Passage]:
    """The passages of ``path``, one at a time; only their ids are kept.

    Each line (of a plain file, or a ``.gz``) holds ``id`` and ``contents`` (the title in quotes, a new line, the text), or
    ``id``, ``title`` and ``text``. Other keys are ignored; an id may be a number.

    Raises:
        DataError: the file cannot be read or is empty, a line is no passage, or an id comes twice; names file and line.
    """
    seen: set[str] = set()
    for number, record in read_lines(path):
        passage = _passage(record, f"{path}:{number}")
        if passage.id in seen:
            first = next(n for n, r in read_lines(path) if str(r.get("id")) == passage.id)
            raise DataError(f"{path}:{number}: id {passage.id!r} was used on line {first}; give every passage its own")
        seen.add(passage.id)
        yield passage
    if not seen:
        raise DataError(f"{path}: no passages in it; {_HOLDS}")


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers, from 1, and the JSON objects of a plain or ``.gz`` file; blank lines are left out.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object; names file and line.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _object(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        # A .gz that is none, is cut short, or is damaged: an OSError without strerror, an EOFError, a zlib.error.
        problem = getattr(error, "strerror", None) or error
        where = f"{path}:{number + 1}" if number else str(path)
        raise DataError(
            f"{where}: cannot be read ({problem}); give the path of a JSON lines file, plain or .gz"
        ) from error


def checksum(path: Path) -> str:
    """The sha256 of the file as it lies there, in hexadecimal.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the path of a file") from error


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise DataError(f"{where}: not JSON ({error}); write one JSON object a line") from error
    if b"\\u" in line:  # JSON can escape half of a surrogate pair, and no file or tokenizer can hold one
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: half of a surrogate pair in its text; mend or remove the \\u escape") from error
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: {type(record).__name__} found where a JSON object is needed; write one object a line"
        )
    return record


def _passage(record: dict[str, Any], where: str) -> Passage:
    needed = ("id", "contents") if "contents" in record or "text" not in record else ("id", "title", "text")
    for field in needed:
        if field not in record:
            raise DataError(f"{where}: field {field!r} is missing; {_HOLDS}")
        if not isinstance(record[field], str) and (field != "id" or type(record[field]) is not int):
            raise DataError(f"{where}: field {field!r} is {type(record[field]).__name__}, not text; {_HOLDS}")
    id = str(record["id"])
    if not id:
        raise DataError(f"{where}: field 'id' is empty; give every passage its own")
    if "contents" in needed:
        return Passage.from_contents(id, record["contents"])
    return Passage(id=id, title=record["title"], text=record["text"])
