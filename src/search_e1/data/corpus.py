"""Passages from JSON lines, tables, Parquet or the Hub, each one validated."""

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from search_e1.data import sources
from search_e1.data.formats.passages import HOLDS, MISSING, CorpusColumns
from search_e1.data.lines import BadRecordError, parse
from search_e1.errors import ConfigError, DataError
from search_e1.runs import sha256_text
from search_e1.types import Passage

MOST_BYTES = 2**20
"""Maximum size of a passage; a larger one is almost always a whole file."""
_USUAL = CorpusColumns()


class Corpus:
    """An iterable of the passages of one or more places; keeps 8 to 24 bytes of memory per passage.

    A place is a file (JSON lines, CSV or TSV, plain or ``.gz`` or ``.zst``; a JSON array; Parquet), a directory of such files,
    or a data set on the Hub: ``owner/name``, ``owner/name:config`` or ``owner/name:config:split``. A record holds ``id`` (or
    ``_id``) and ``contents`` (the title in quotes, a new line, the text), or ``id``, ``text`` and optionally ``title``. Also
    optional: ``metadata`` (an object), ``file``, ``page``, ``heading`` and ``url``. ``columns`` maps other names. Other keys
    are ignored; an id may be a number. With several places, a passage's ``metadata`` names its place as ``corpus``, unless the
    record already does.

    Iterating raises ``DataError`` if a place cannot be read or is empty, and, with file and line, for a record that is not a
    passage, has no text, is too long, or repeats an id. With ``skip_bad_lines`` such records are skipped and counted.
    """

    def __init__(
        self,
        *places: str | Path,
        columns: CorpusColumns = _USUAL,
        prefix_ids: bool = False,
        skip_bad_lines: bool = False,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """``prefix_ids``: prefix each id with the name of its place. ``most_bytes``: maximum size of title and text in UTF-8.

        Raises:
            ConfigError: with ``prefix_ids``, if two places have the same name.
        """
        self.places, self.columns = places, columns
        self.skip_bad_lines, self.most_bytes = skip_bad_lines, most_bytes
        self.prefixes = _prefixes(places) if prefix_ids else [""] * len(places)
        self._names = _names(places) if len(places) > 1 else [""] * len(places)
        self.skipped: Counter[str] = Counter()
        """Fault -> number of records skipped in the current or last iteration."""
        self.first: dict[str, str] = {}
        """Fault -> place of its first occurrence."""

    def checksum(self) -> str:
        """The sha256, in hexadecimal, of everything that determines the passages: the files' bytes or the Hub's commit, how
        they are read, and what is skipped. The names of the places are not included.

        Raises:
            DataError: a place cannot be read.
        """
        parts = [*map(sources.checksum, self.places), f"{self.skip_bad_lines} {self.most_bytes}"]
        parts += [repr(sorted(self.columns.given.items()))] if self.columns else []
        parts += self.prefixes if any(self.prefixes) else []
        return sha256_text("\n".join(parts))

    def __iter__(self) -> Iterator[Passage]:
        self.skipped, self.first = Counter(), {}
        seen, passage = _Seen(), None
        unseen = {name for name, given in self.columns.given.items() if given}
        for prefix, name, where, record in self._records():
            try:
                fields = _parsed(record, where, self.most_bytes)
                if unseen:
                    unseen -= {name for name in unseen if self.columns.get(fields, name) is not MISSING}
                passage = _passage(fields, where, prefix, name, self.columns, self.most_bytes)
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
            raise DataError(f"{self._listed()}: no passages in it{left_out}; {HOLDS}")
        if unseen:
            columns = " or ".join(map(repr, self.columns.given[min(unseen)]))
            raise DataError(
                f"{self._listed()}: no record has the column {columns} that {min(unseen)!r} is read from; correct its name"
            )

    def report(self) -> str:
        """The skipped records in one line, e.g. ``3 records left out: 2 not JSON (first c.jsonl:3), ...``."""
        parts = [f"{number:,} {kind} (first {self.first[kind]})" for kind, number in self.skipped.most_common()]
        return f"{self.skipped.total():,} records left out: {', '.join(parts)}" if parts else "nothing left out"

    def _listed(self) -> str:
        return ", ".join(map(str, self.places))

    def _records(self) -> Iterator[tuple[str, str, str, sources.Record]]:
        """For each record: prefix of its id, name of its corpus (if there are several), location and content."""
        # JSON may escape a character as six bytes; a longer line cannot hold a valid passage.
        for prefix, name, place in zip(self.prefixes, self._names, self.places, strict=True):
            for where, record in sources.records(place, 6 * self.most_bytes + 2**16, self.columns):
                yield prefix, name, where, record

    def _refuse_second(self, id: str, where: str) -> None:
        if self.skip_bad_lines:
            raise BadRecordError("with a repeated id", "")
        for prefix, _, first, record in self._records():
            if first == where:
                return  # two ids with the same hash
            if self._id(record, first, prefix) == id:
                several = len(self.places) > 1 and not prefix
                remedy = ", or prefix the ids with the corpus names (--prefix-ids; data.prefix_ids)" if several else ""
                raise BadRecordError("", f"{where}: id {id!r} was used in {first}; give every passage its own{remedy}")

    def _id(self, record: sources.Record, where: str, prefix: str) -> str | None:
        try:
            return _fields(_parsed(record, where, self.most_bytes), where, prefix, self.columns)["id"]
        except BadRecordError:
            return None


def _names(places: Sequence[str | Path]) -> list[str]:
    """The names of ``places`` up to the first dot; equal names are prefixed with their directory's."""
    names = [Path(str(place).partition(":")[0]).name.partition(".")[0] for place in places]
    return [
        f"{Path(place).parent.name}-{name}" if names.count(name) > 1 else name
        for place, name in zip(places, names, strict=True)
    ]


def _prefixes(places: Sequence[str | Path]) -> list[str]:
    names = _names(places)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two corpora are called {twice!r}, so their names cannot tell ids apart; rename one")
    return [f"{name}:" for name in names]


class _Seen:
    """A set of texts that stores a 64-bit hash of each, in a hash table at most two thirds full.

    Among 21 million texts a hash collision occurs once in 80,000 corpora; the caller checks for it.
    """

    def __init__(self) -> None:
        self._table = array("Q", bytes(8 * 2**10))
        self._held = 0

    def __len__(self) -> int:
        return self._held

    def twice(self, text: str) -> bool:
        """Add ``text``; returns whether it was already there."""
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
        """The slot of ``key``, or a free slot for it."""
        table, mask = self._table, len(self._table) - 1
        at = key & mask
        while table[at] and table[at] != key:
            at = (at + 1) & mask
        return at


def _parsed(record: sources.Record, where: str, most: int) -> Mapping[str, Any]:
    """The row itself, or the JSON object in a line.

    Raises:
        BadRecordError: the record is unreadable, too long, or not a JSON object.
    """
    if isinstance(record, BadRecordError):
        raise record
    if isinstance(record, bytes):
        if len(record) > 6 * most + 2**16:
            raise _too_long(where, f"more than {len(record) - 1:,}", most)
        return parse(record, where)
    return record


def _passage(record: Mapping[str, Any], where: str, prefix: str, name: str, columns: CorpusColumns, most: int) -> Passage:
    """The passage in ``record``; ``name`` is its corpus, if there are several.

    Raises:
        BadRecordError: the record is not a usable passage.
    """
    fields = _fields(record, where, prefix, columns)
    metadata = {**({"corpus": name} if name else {}), **columns.metadata(record)}
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
        f"{where}: a passage of {length} bytes exceeds the limit of {most:,}; split it, raise --max-passage-bytes, or leave "
        "such lines out with --skip-bad-lines",
    )


def _fields(record: Mapping[str, Any], where: str, prefix: str, columns: CorpusColumns) -> dict[str, str]:
    lacks_text = columns.get(record, "text") is MISSING and "text" not in columns.given
    whole = lacks_text or columns.get(record, "contents") is not MISSING
    found = {name: columns.get(record, name) for name in (("id", "contents") if whole else ("id", "title", "text"))}
    if columns.makes_ids:
        found["id"] = Path(where).name  # ``docs.csv:3``
    title = found.get("title")
    if title is MISSING or title is None or title != title:  # NaN, as pandas writes it
        found |= {"title": ""} if "title" in found else {}
    for name, value in found.items():
        number = type(value) is int or (type(value) is float and value.is_integer())
        if value is MISSING:
            raise BadRecordError(f"without {name}", f"{where}: field {name!r} is missing; {HOLDS}")
        if not isinstance(value, str) and not (number and name in ("id", "title")):
            kind = f"{where}: field {name!r} is {type(value).__name__}, not text; {HOLDS}"
            raise BadRecordError(f"whose {name} is not text", kind)
    fields = {name: value if isinstance(value, str) else str(int(value)) for name, value in found.items()}
    if not fields["id"]:
        raise BadRecordError("with an empty id", f"{where}: field 'id' is empty; give every passage its own")
    return {**fields, "id": prefix + fields["id"]}
