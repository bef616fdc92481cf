"""Answers of a retriever kept on disk, for later rounds and other processes."""

import hashlib
import json
import logging
import sqlite3
import threading
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from search_e1.errors import DataError
from search_e1.retrieval.base import Hit, Retriever
from search_e1.types import Passage

logger = logging.getLogger(__name__)
MOST_BYTES = 16 * 2**30
"""How large the file may become; after that it is read and no longer added to."""
_PAGE_BYTES = 4096
_BUSY_SECONDS = 5.0
"""How long another process may hold the file before this one does without it."""

Value = TypeVar("Value")
_passages = TypeAdapter(list[Hit | Passage])


class CachedRetriever:
    """A ``Retriever`` that asks another one only what no process has asked it before.

    The file may be shared by threads and processes, and by indexes: an answer is found again only for the same index, query
    and topk. It is a help and never a risk: what is read is checked against its own digest, a damaged file is moved aside
    and begun anew, and one that cannot be read or written for now is done without. An empty answer is kept like any other; a
    failure of the retriever is raised and never kept.
    """

    def __init__(self, retriever: Retriever, path: Path, key: str) -> None:
        """``key``: what the answers depend on, best ``Index.checksum``. ``path`` is made if it is not there.

        Raises:
            DataError: there cannot be such a file.
        """
        self.retriever, self.path, self.key = retriever, path, key
        self.hits = self.misses = 0
        """Distinct queries of each search that were found here, and that were not."""
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self._file: sqlite3.Connection | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except (OSError, sqlite3.Error) as error:
            raise DataError(f"{path}: no query cache can be kept there ({error}); give another path") from error

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """See ``Retriever``."""
        ids = {query: self._id(query, topk) for query in dict.fromkeys(queries)}
        nothing: dict[str, list[Passage]] = {}
        kept = self._try(lambda file: self._read(file, ids), nothing)
        new = [query for query in ids if query not in kept]
        self.hits, self.misses = self.hits + len(kept), self.misses + len(new)
        if new:
            found = dict(zip(new, map(list, self.retriever.search(new, topk)), strict=True))
            answers = {ids[query]: passages for query, passages in found.items()}
            self._try(lambda file: self._write(file, answers), None)
            kept = kept | found
        return [list(kept[query]) for query in queries]

    def close(self) -> None:
        """Let go of the file; a search afterwards does without it."""
        with self._lock:
            if self._file:
                self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _id(self, query: str, topk: int) -> bytes:
        return hashlib.sha256(json.dumps([self.key, topk, query]).encode()).digest()

    def _open(self) -> None:
        self._file = None
        try:
            self._file = _opened(self.path)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            self._move_aside(error)
            self._file = _opened(self.path)
        self._inode = self.path.stat().st_ino

    def _try(self, work: Callable[[sqlite3.Connection], Value], otherwise: Value) -> Value:
        """What ``work`` does with the file, or ``otherwise`` if the file is of no use now."""
        with self._lock:
            try:
                return work(self._file) if self._file else otherwise
            except sqlite3.OperationalError as error:  # locked, full, read-only
                self._tell(f"{self.path}: the query cache cannot be used for now ({error})")
            except sqlite3.DatabaseError as error:
                self._renew(error)
            return otherwise

    def _renew(self, error: Exception) -> None:
        assert self._file
        self._file.close()
        try:
            if self.path.exists() and self.path.stat().st_ino == self._inode:  # else another process renewed it
                self._move_aside(error)
            self._open()
        except (OSError, sqlite3.Error) as problem:
            self._tell(f"{self.path}: gone on without a query cache ({problem})")

    def _read(self, file: sqlite3.Connection, ids: dict[str, bytes]) -> dict[str, list[Passage]]:
        kept = {}
        for query, id in ids.items():
            row = file.execute("SELECT answer, digest FROM answers WHERE id = ?", (id,)).fetchone()
            if row is None:
                continue
            try:
                if _digest(id, row[0]) != row[1]:
                    raise ValueError("wrong digest")
                kept[query] = _passages.validate_json(row[0])
            except (ValidationError, ValueError, TypeError):
                self._tell(f"{self.path}: a damaged answer in the query cache; it is asked for anew")
        return kept

    def _write(self, file: sqlite3.Connection, answers: dict[bytes, list[Passage]]) -> None:
        rows = []
        for id, passages in answers.items():
            answer = _passages.dump_json(passages)
            rows.append((id, answer, _digest(id, answer)))
        with file:  # a transaction
            file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", rows)

    def _move_aside(self, error: Exception) -> None:
        """Keep what is there: it may be something else that was named by mistake."""
        aside = next(
            name for i in count(1) if not (name := self.path.with_name(f"{self.path.name}.damaged-{i}")).exists()
        )
        self.path.rename(aside)
        self._tell(f"{self.path}: not a sound query cache ({error}); moved to {aside.name}, begun anew")

    def _tell(self, message: str) -> None:
        if message not in self._told:  # once, not with every search
            self._told.add(message)
            logger.warning(message)


def _opened(path: Path) -> sqlite3.Connection:
    file = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
    try:
        file.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        file.execute(f"PRAGMA max_page_count = {MOST_BYTES // _PAGE_BYTES}")
        # What a power cut takes or garbles is only asked for again.
        file.execute("PRAGMA synchronous = OFF")
        with file:
            file.execute("CREATE TABLE IF NOT EXISTS answers (id BLOB PRIMARY KEY, answer BLOB, digest BLOB)")
        file.execute("SELECT id, answer, digest FROM answers LIMIT 1").fetchone()
    except sqlite3.DatabaseError:
        file.close()
        raise
    return file


def _digest(id: bytes, answer: bytes) -> bytes:
    return hashlib.sha256(id + answer).digest()
