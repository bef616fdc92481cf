"""Maps the columns of a corpus record to the fields of a passage."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from search_e1.errors import ConfigError, DataError

ORIGIN = ("file", "page", "heading", "url")
"""Fields that give the origin of a passage; they are added to its ``metadata``."""
FIELDS = ("id", "contents", "title", "text", "metadata", *ORIGIN)
MISSING: Any = object()
"""Value of a column that a record lacks."""
_USUAL = {**{name: (name,) for name in FIELDS}, "id": ("id", "_id")}  # `_id`: BEIR
HOLDS = 'a record holds {"id", "contents"} or {"id", "title", "text"}; --column FIELD=COLUMN maps others'


@dataclass(frozen=True, slots=True)
class CorpusColumns:
    """The columns of each field; the first that a record has is read. A dotted path leads into nested objects."""

    given: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Field or ``metadata.KEY`` -> columns. Fields not given are read from columns of the same name."""

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]]) -> "CorpusColumns":
        """Build from pairs of field and column; an empty column for ``id`` derives ids from the records' locations.

        Raises:
            ConfigError: an unknown field, an empty column for another field, or both ``contents`` and ``text``.
        """
        given: dict[str, tuple[str, ...]] = {}
        for name, column in pairs:
            if name not in FIELDS and name.removeprefix("metadata.") == name:
                close = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.4)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise ConfigError(f"unknown field {name!r} of a passage; {hint}(known: {', '.join(FIELDS)}, metadata.KEY)")
            if not column and name != "id":
                raise ConfigError(f"field {name!r} of a passage: the column name is empty; give one")
            given[name] = (*given.get(name, ()), *([column] if column else []))
        if "contents" in given and "text" in given:
            raise ConfigError("fields 'contents' and 'text' of a passage are both given; contents is title and text in one")
        return cls(given)

    @classmethod
    def parse(cls, mappings: Sequence[str]) -> "CorpusColumns":
        """Build from ``["id=docid", "text=body", "text=content", "metadata.year=Jahr"]``. Raises like ``of``."""
        if wrong := next((mapping for mapping in mappings if "=" not in mapping), None):
            raise ConfigError(f"--column {wrong}: write FIELD=COLUMN, e.g. --column text=body")
        return cls.of((name, column) for name, _, column in (mapping.partition("=") for mapping in mappings))

    def __bool__(self) -> bool:
        return bool(self.given)

    @property
    def makes_ids(self) -> bool:
        """Whether ids are derived from the records' locations."""
        return self.given.get("id") == ()

    def of_field(self, name: str) -> tuple[str, ...]:
        """The columns of a field; none for ``contents`` if ``text`` is given, and vice versa."""
        if name in self.given:
            return self.given[name]
        other = {"contents": "text", "text": "contents"}.get(name)
        return () if other in self.given else _USUAL.get(name, ())

    def get(self, record: Mapping[str, Any], name: str) -> Any:
        """The value of the field ``name``, or ``MISSING``."""
        for column in self.of_field(name):
            if (value := _dig(record, column)) is not MISSING:
                return value
        return MISSING

    def metadata(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The passage's metadata: the record's own, its origin, and the ``metadata.KEY`` columns given."""
        whole = self.get(record, "metadata")
        keys = (*ORIGIN, *(name for name in self.given if name.startswith("metadata.")))
        found = {name.removeprefix("metadata."): self.get(record, name) for name in keys}
        return {**(whole if isinstance(whole, Mapping) else {}), **{k: v for k, v in found.items() if v is not MISSING}}

    def choose(self, names: Sequence[str], where: str) -> list[str]:
        """The subset of a table's columns that is read.

        Raises:
            DataError: the table lacks the fields of a passage, or a given column.
        """
        heads = {name: [n for n in names for c in self.of_field(name) if n in (c, c.partition(".")[0])] for name in FIELDS}
        heads |= {
            name: [n for n in names for c in given if n in (c, c.partition(".")[0])] for name, given in self.given.items()
        }
        for name, given in self.given.items():
            if given and not heads[name]:
                close = difflib.get_close_matches(given[0], names, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                columns = " or ".join(map(repr, given))
                raise DataError(f"{where}: no column {columns} for {name}; {hint}its columns are {', '.join(names)}")
        if not (heads["id"] or self.makes_ids) or not (heads["contents"] or heads["text"]):
            raise DataError(
                f"{where}: its columns are {', '.join(names)}; needed are id and contents, or id, title and text; map others "
                "with --column FIELD=COLUMN (in a config, data.columns)"
            )
        return [name for name in names if any(name in found for found in heads.values())]


def _dig(record: Mapping[str, Any], path: str) -> Any:
    """The value at ``path``: the column with that name, else resolved key by key."""
    if path in record:
        return record[path]
    head, dot, rest = path.partition(".")
    inner = record.get(head) if dot else None
    return _dig(inner, rest) if isinstance(inner, Mapping) else MISSING
