"""Passages from JSON lines, Parquet or the Hub, checked one by one."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from search_e1.data import sources
from search_e1.data.lines import BadRecordError, parse
from search_e1.errors import DataError
from search_e1.types import Passage

MOST_BYTES = 2**20
"""Maximum size of a passage; a longer one is almost always a whole file."""
_HOLDS = 'each line holds {"id", "contents"} or {"id", "title", "text"}'


def read_corpus(*places: str | Path) -> Iterator[Passage]:
    """The passages of ``places``: see ``Corpus``."""
    return iter(Corpus(*places))


class Corpus:
    """The passages of one or more places, as an iterable; 8 to 24 bytes of memory are kept for each.

    A place is a file (JSON lines, plain or ``.gz`` or ``.zst``; Parquet), a directory of such files, or a data set on the Hub:
    ``owner/name``, ``owner/name:config`` or ``owner/name:config:split``. A record holds ``id`` and ``contents`` (the title in
    quotes, a new line, the text), or ``id``, ``title`` and ``text``; perhaps ``metadata``, an object,
    and ``file``, ``page``, ``heading`` and ``url`` beside it. Other keys are ignored; an id may be a number.

    Iterating raises ``DataError`` if a place cannot be read or is empty, and, with file and line, for a record that is no
    passage, has no text, is too long, or repeats an id. With ``skip_bad_lines`` such records are skipped and counted.
    """

    def __init__(self, *places: str | Path, skip_bad_lines: bool = False, most_bytes: int = MOST_BYTES) -> None:
        """``most_bytes``: maximum of a passage's title and text in UTF-8."""
        self.places = places
        self.skip_bad_lines, self.most_bytes = skip_bad_lines, most_bytes
        self.skipped: Counter[str] = Counter()
        """Fault -> records skipped by the last iteration so far."""
        self.first: dict[str, str] = {}
        """Fault -> place of its first occurrence."""

    def checksum(self) -> str:
        """The sha256, in hexadecimal, of everything that determines the passages: the bytes of the files, or the Hub's
        commit, and what is skipped.

        Raises:
            DataError: a place cannot be read.
        """
        parts = [*map(sources.checksum, self.places), f"{self.skip_bad_lines} {self.most_bytes}"]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def __iter__(self) -> Iterator[Passage]:
        self.skipped, self.first = Counter(), {}
        seen, passage = _Seen(), None
        for where, record in self._records():
            try:
                passage = _passage(record, where, self.most_bytes)
                if seen.twice(passage.id):
                    self._refuse_second(passage.id, where)
            except BadRecordError as error:
                if not self.skip_bad_lines:
                    raise
                self.skipped[error.kind] += 1
                self.first.setdefault(error.kind, where)
            else:
                yield passage
        if passage is None or not len(seen):
            left_out = f" ({self.report()})" if self.skipped else ""
            raise DataError(f"{', '.join(map(str, self.places))}: no passages in it{left_out}; {_HOLDS}")

    def report(self) -> str:
        """The skipped records in one line, e.g. ``3 records left out: 2 not JSON (first c.jsonl:3), ...``."""
        parts = [f"{number:,} {kind} (first {self.first[kind]})" for kind, number in self.skipped.most_common()]
        return f"{self.skipped.total():,} records left out: {', '.join(parts)}" if parts else "nothing left out"

    def _records(self) -> Iterator[tuple[str, sources.Record]]:
        # JSON may escape a character as six bytes; a longer line cannot hold a valid passage.
        return chain.from_iterable(sources.records(place, 6 * self.most_bytes + 2**16) for place in self.places)

    def _refuse_second(self, id: str, where: str) -> None:
        if self.skip_bad_lines:
            raise BadRecordError("with an id that came before", "")
        for first, record in self._records():
            if first == where:
                return  # two ids with the same hash
            if _id(record) == id:
                raise BadRecordError("", f"{where}: id {id!r} was used in {first}; give every passage its own")


class _Seen:
    """A set of texts that stores 64 bits of each, in a hash table at most two thirds full.

    A collision among 21 million texts occurs once in 80,000 corpora, and is checked for.
    """

    def __init__(self) -> None:
        self._table = array("Q", bytes(8 * 2**10))
        self._held = 0

    def __len__(self) -> int:
        return self._held

    def twice(self, text: str) -> bool:
        """Add ``text``; whether it was added before."""
        # Python's hash of a text is 64 bits of SipHash; 0 marks a free slot.
        key = hash(text) % 2**64 or 1
        at = self._find(key)
        if self._table[at] == key:
            return True
        self._table[at] = key
        self._held += 1
        if 3 * self._held > 2 * len(self._table):
            before, self._table = self._table, array("Q", bytes(8 * 2 * len(self._table)))
            for old in before:
                if old:
                    self._table[self._find(old)] = old
        return False

    def _find(self, key: int) -> int:
        """The slot of ``key``, or the free one for it."""
        table, mask = self._table, len(self._table) - 1
        at = key & mask
        while table[at] and table[at] != key:
            at = (at + 1) & mask
        return at


def _id(record: sources.Record) -> str | None:
    try:
        return str((parse(record, "") if isinstance(record, bytes) else record).get("id"))
    except BadRecordError:
        return None


def _passage(record: sources.Record, where: str, most: int) -> Passage:
    """The passage in ``record``, an unparsed line or a row.

    Raises:
        BadRecordError: it is unusable.
    """
    if isinstance(record, bytes):
        if len(record) > 6 * most + 2**16:
            raise _too_long(where, f"more than {len(record) - 1:,}", most)
        record = parse(record, where)
    fields = _checked(record, where)
    told, beside = record.get("metadata"), {field: record[field] for field in sources.ORIGIN if field in record}
    metadata = {**(told if isinstance(told, Mapping) else {}), **beside}
    passage = (Passage.from_contents if "contents" in fields else Passage)(**fields, metadata=metadata)
    length = len(passage.title) + len(passage.text)
    if 4 * length > most and (length := len(passage.title.encode()) + len(passage.text.encode())) > most:
        raise _too_long(where, f"{length:,}", most)
    if not passage.text.strip():
        raise BadRecordError(
            "without text",
            f"{where}: passage {passage.id!r} has no text; remove it, or leave such lines out with --skip-bad-lines",
        )
    return passage


def _too_long(where: str, length: str, most: int) -> BadRecordError:
    return BadRecordError(
        "too long",
        f"{where}: a passage of {length} bytes, and {most:,} are allowed; split it, raise --max-passage-bytes, or leave such "
        "lines out with --skip-bad-lines",
    )


def _checked(record: Mapping[str, Any], where: str) -> dict[str, str]:
    needed = ("id", "contents") if "contents" in record or "text" not in record else ("id", "title", "text")
    for field in needed:
        if field not in record:
            raise BadRecordError(f"without {field}", f"{where}: field {field!r} is missing; {_HOLDS}")
        if not isinstance(record[field], str) and (field != "id" or type(record[field]) is not int):
            raise BadRecordError(
                f"whose {field} is no text",
                f"{where}: field {field!r} is {type(record[field]).__name__}, not text; {_HOLDS}",
            )
    fields = {field: str(record[field]) for field in needed}
    if not fields["id"]:
        raise BadRecordError("with an empty id", f"{where}: field 'id' is empty; give every passage its own")
    return fields
