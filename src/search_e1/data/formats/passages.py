"""Which columns of a record of a corpus hold which field of a passage."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from search_e1.errors import ConfigError, DataError

ORIGIN = ("file", "page", "heading", "url")
"""Fields that tell where a passage comes from, beside those in its ``metadata``."""
FIELDS = ("id", "contents", "title", "text", "metadata", *ORIGIN)
MISSING: Any = object()
"""Value of a column that a record lacks."""
_USUAL = {**{name: (name,) for name in FIELDS}, "id": ("id", "_id")}  # the second: BEIR
HOLDS = 'a record holds {"id", "contents"} or {"id", "title", "text"}; --column FIELD=COLUMN maps others'


@dataclass(frozen=True, slots=True)
class CorpusColumns:
    """The columns of each field; of several, a record's first. A dotted path leads into nested objects."""

    given: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Field, or ``metadata.KEY`` -> columns. Fields that are not given have the columns of their own names."""

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]]) -> "CorpusColumns":
        """From pairs of field and column; an empty column for ``id`` makes ids of the places of the records.

        Raises:
            ConfigError: a field that passages do not have, or an empty column.
        """
        given: dict[str, tuple[str, ...]] = {}
        for name, column in pairs:
            if name not in FIELDS and name.removeprefix("metadata.") == name:
                close = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.4)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise ConfigError(f"unknown field {name!r} of a passage; {hint}(known: {', '.join(FIELDS)}, metadata.KEY)")
            if not column and name != "id":
                raise ConfigError(f"field {name!r} of a passage: an empty column; give the name of one")
            given[name] = (*given.get(name, ()), *([column] if column else []))
        if "contents" in given and "text" in given:
            raise ConfigError("fields 'contents' and 'text' of a passage are both given; contents is title and text in one")
        return cls(given)

    @classmethod
    def parse(cls, mappings: Sequence[str]) -> "CorpusColumns":
        """From ``["id=docid", "text=body", "text=content", "metadata.year=Jahr"]``; raises as ``of``."""
        if wrong := next((mapping for mapping in mappings if "=" not in mapping), None):
            raise ConfigError(f"--column {wrong}: write FIELD=COLUMN, e.g. --column text=body")
        return cls.of((name, column) for name, _, column in (mapping.partition("=") for mapping in mappings))

    def __bool__(self) -> bool:
        return bool(self.given)

    @property
    def makes_ids(self) -> bool:
        """Whether ids are made of the places of the records."""
        return self.given.get("id") == ()

    def of_field(self, name: str) -> tuple[str, ...]:
        """The columns of a field; none of ``contents`` where ``text`` is given, and the other way round."""
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
        """Where the passage comes from and what else is asked for."""
        whole = self.get(record, "metadata")
        keys = (*ORIGIN, *(name for name in self.given if name.startswith("metadata.")))
        found = {name.removeprefix("metadata."): self.get(record, name) for name in keys}
        return {**(whole if isinstance(whole, Mapping) else {}), **{k: v for k, v in found.items() if v is not MISSING}}

    def choose(self, names: Sequence[str], where: str) -> list[str]:
        """Those of a table's columns that are read.

        Raises:
            DataError: the table lacks the fields of a passage, or a column that was given.
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
    """The value at ``path``: the column of that name, else key by key."""
    if path in record:
        return record[path]
    head, dot, rest = path.partition(".")
    inner = record.get(head) if dot else None
    return _dig(inner, rest) if isinstance(inner, Mapping) else MISSING
