"""Cache of earlier runs: one row per file, with its passages, in SQLite beside the corpus."""

import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

from search_e1.data.documents.folder import Found
from search_e1.data.documents.workers import READ, Outcome
from search_e1.errors import DataError

FILE = ".ingest.sqlite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS files (
    name TEXT PRIMARY KEY, kind TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, sha256 TEXT NOT NULL,
    status TEXT NOT NULL, reason TEXT NOT NULL, passages INTEGER NOT NULL, limits TEXT NOT NULL, packed BLOB NOT NULL
);
"""


class Known(NamedTuple):
    """The row of a file, without its passages."""

    name: str
    kind: str
    size: int
    mtime_ns: int
    sha256: str
    status: str
    reason: str
    passages: int
    limits: str
    """The limits that it was read under, as JSON."""


class Store:
    """Stores files and passages; a row survives a crash of the process once ``put`` returns."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Use ``opened``."""
        self._db = connection

    @classmethod
    @contextmanager
    def opened(cls, out: Path) -> Iterator[Self]:
        """The store of the corpus ``out``, created if missing.

        Raises:
            DataError: the store is damaged, or the disk fails.
        """
        path = out / FILE
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            # Write-ahead logging: commits need not wait for the disk, and a crash or power cut damages nothing.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.executescript(_SCHEMA)
            yield cls(connection)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # a full disk, a file system without locks
                raise DataError(f"{path}: {error}; check the disk, then run the same command again") from error
            raise DataError(f"{path}: damaged ({error}); remove it to read all files again") from error
        finally:
            connection.close()

    def known(self) -> dict[str, Known]:
        """Name -> row of that file."""
        rows = self._db.execute(f"SELECT {', '.join(Known._fields)} FROM files")
        return {row[0]: Known(*row) for row in rows}

    def put(self, file: Found, sha256: str, outcome: Outcome, limits: str) -> None:
        row = (file.name, file.kind, file.size, file.mtime_ns, sha256, outcome.status, outcome.reason, outcome.passages, limits)
        self._changes([("INSERT OR REPLACE INTO files VALUES (?,?,?,?,?,?,?,?,?,?)", (*row, outcome.packed))])

    def touch(self, file: Found) -> None:
        """Update the mtime of a file with unchanged content."""
        self._db.execute("UPDATE files SET mtime_ns = ? WHERE name = ?", (file.mtime_ns, file.name))

    def forget(self, names: list[str]) -> None:
        self._changes([("DELETE FROM files WHERE name = ?", (name,)) for name in names])

    def under(self, settings: str) -> bool:
        """Whether the stored files were cut under ``settings``; if not, forgets them."""
        before = self._get("settings")
        if before not in (None, settings):
            self._changes([("DELETE FROM files", ())])
        self._set("settings", settings)
        return before in (None, settings)

    @property
    def published(self) -> bool:
        """Whether the corpus file is up to date with the store."""
        return self._get("published") == "yes"

    def publish(self) -> None:
        self._set("published", "yes")

    def passages(self) -> Iterator[bytes]:
        """Corpus lines of all files read, by name; one file is in memory at a time."""
        rows = self._db.execute("SELECT packed FROM files WHERE status = ? ORDER BY name", (READ,))
        return (zlib.decompress(packed) for (packed,) in rows)

    def _changes(self, statements: list[tuple[str, tuple[object, ...]]]) -> None:
        """Run ``statements`` in one transaction and mark the corpus as out of date."""
        if not statements:
            return
        self._db.execute("BEGIN")
        for statement, values in statements:
            self._db.execute(statement, values)
        self._set("published", "no")
        self._db.execute("COMMIT")

    def _get(self, key: str) -> str | None:
        found = self._db.execute("SELECT value FROM about WHERE key = ?", (key,)).fetchone()
        return found and str(found[0])

    def _set(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (key, value))
