"""A disk cache of retrieval results, for later rounds and other processes."""

import hashlib
import json
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Self, TypeVar

import diskcache
from pydantic import TypeAdapter

from search_e1.errors import DataError
from search_e1.retrieval.base import Hit, Retriever
from search_e1.types import Passage

logger = logging.getLogger(__name__)
MAX_BYTES = 16 * 2**30
"""Size limit; above it the oldest results are evicted."""
_BUSY_SECONDS = 5.0
"""How long to wait for another process before continuing without the cache."""
_DATABASE = diskcache.core.DBNAME
# Not synced: results may be lost in a power cut. Not memory-mapped: pages of a truncated file would kill the process.
_SETTINGS = {
    "sqlite_synchronous": 0,
    "sqlite_mmap_size": 0,
    "eviction_policy": "least-recently-stored",
    "cull_limit": 10,
}
_DAMAGE = (sqlite3.DatabaseError, KeyError, TypeError, ValueError, AttributeError)
"""Errors that diskcache raises on a foreign or modified database."""

Value = TypeVar("Value")
_passages = TypeAdapter(list[Hit | Passage])


class _Rows(diskcache.Disk):
    """Stores values as bytes in database rows: no pickles, and no files, whose stored paths could point anywhere."""

    def store(self, value: bytes, read: bool, key: Any = None) -> tuple[int, int, None, memoryview]:
        return 0, diskcache.core.MODE_RAW, None, sqlite3.Binary(value)

    def fetch(self, mode: int, filename: str | None, value: bytes, read: bool) -> bytes:
        return value if mode == diskcache.core.MODE_RAW and isinstance(value, bytes) else b""

    def remove(self, file_path: str) -> None:
        pass


class CachedRetriever:
    """A ``Retriever`` that forwards only queries whose results are not cached.

    Threads, processes and indexes may share the directory. Each result is verified against its digest, a damaged database is
    moved aside and replaced, and a database that cannot be read or written is bypassed. Empty results are cached like any
    other; a failure of the retriever is raised and never cached.
    """

    def __init__(self, retriever: Retriever, path: Path, key: str) -> None:
        """``path``: directory of the cache, created if missing. ``key``: identifies the index, e.g. ``Index.checksum``.

        Raises:
            DataError: the cache cannot be opened at ``path``.
        """
        self.retriever, self.path, self.key = retriever, path, key
        self.hits = self.misses = 0
        """Counts of cached and uncached queries, each distinct query once per search."""
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        self._cache: diskcache.Cache | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._open()
        except (OSError, diskcache.Timeout, *_DAMAGE) as error:
            raise DataError(f"{path}: cannot hold a query cache ({error}); give another directory") from None

    @property
    def checksum(self) -> str:
        """The cache's key: checksum of everything that results depend on."""
        return self.key

    @property
    def passage(self) -> Callable[[str], Passage | None]:
        """The retriever's own method; raises AttributeError if it has none."""
        return self.retriever.passage  # type: ignore[attr-defined]

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """See ``Retriever``."""
        ids = {query: self._id(query, topk) for query in dict.fromkeys(queries)}
        nothing: dict[str, list[Passage]] = {}
        known = self._attempt(lambda cache: self._read(cache, ids), nothing)
        new = [query for query in ids if query not in known]
        self.hits, self.misses = self.hits + len(known), self.misses + len(new)
        if new:
            fresh = dict(zip(new, map(list, self.retriever.search(new, topk)), strict=True))
            self._attempt(lambda cache: _write(cache, ((ids[query], fresh[query]) for query in new)), None)
            known = known | fresh
        return [list(known[query]) for query in queries]

    def close(self) -> None:
        """Close the database; later searches bypass it."""
        with self._lock:
            if self._cache is not None:
                self._cache.close()
            self._cache = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _id(self, query: str, topk: int) -> bytes:
        return hashlib.sha256(json.dumps([self.key, topk, query]).encode()).digest()

    def _open(self) -> None:
        self._cache = None
        try:
            self._cache = self._connect()
        except sqlite3.OperationalError:
            raise
        except _DAMAGE as error:
            self._move_aside(error)
            self._cache = self._connect()
        self._inode = (self.path / _DATABASE).stat().st_ino

    def _connect(self) -> diskcache.Cache:
        cache = diskcache.Cache(str(self.path), timeout=_BUSY_SECONDS, disk=_Rows, size_limit=MAX_BYTES, **_SETTINGS)
        cache.get(b"")  # reads a page of the database's index, so that damage is noticed here
        return cache

    def _attempt(self, work: Callable[[diskcache.Cache], Value], otherwise: Value) -> Value:
        """The result of ``work`` on the cache, or ``otherwise`` if the cache cannot be used."""
        with self._lock:
            try:
                return work(self._cache) if self._cache is not None else otherwise
            except (sqlite3.OperationalError, diskcache.Timeout) as error:  # locked, full, read-only
                problem = str(error) or "locked, or cannot be written"
                self._warn(f"{self.path}: the query cache cannot be used for now ({problem})")
            except sqlite3.DatabaseError as error:
                self._replace(error)
            return otherwise

    def _replace(self, error: Exception) -> None:
        assert self._cache is not None
        self._cache.close()
        try:
            database = self.path / _DATABASE
            if database.exists() and database.stat().st_ino == self._inode:  # else another process has replaced it
                self._move_aside(error)
            self._open()
        except (OSError, diskcache.Timeout, *_DAMAGE) as problem:
            self._warn(f"{self.path}: continuing without a query cache ({problem})")

    def _read(self, cache: diskcache.Cache, ids: dict[str, bytes]) -> dict[str, list[Passage]]:
        known = {}
        for query, id in ids.items():
            stored = cache.get(id)
            if stored is None:
                continue
            digest, result = stored[:32], stored[32:]
            try:
                if digest != _digest(id, result):
                    raise ValueError("wrong digest")
                known[query] = _passages.validate_json(result)
            except ValueError:
                self._warn(f"{self.path}: a damaged result in the query cache; the query is sent again")
        return known

    def _move_aside(self, error: Exception) -> None:
        """Rename the database instead of deleting it: the path may be a mistake, and the file something else."""
        names = (f"{_DATABASE}.damaged-{i}" for i in count(1))
        aside = next(name for name in names if not (self.path / name).exists())
        (self.path / _DATABASE).rename(self.path / aside)
        for ending in ("-wal", "-shm"):
            (self.path / f"{_DATABASE}{ending}").unlink(missing_ok=True)
        self._warn(f"{self.path}: a damaged query cache ({error}); its database was moved to {aside} and replaced")

    def _warn(self, message: str) -> None:
        if message not in self._warned:  # once, not on every search
            self._warned.add(message)
            logger.warning(message)


def _write(cache: diskcache.Cache, results: Iterable[tuple[bytes, list[Passage]]]) -> None:
    with cache.transact():
        for id, passages in results:
            result = _passages.dump_json(passages)
            cache.set(id, _digest(id, result) + result)


def _digest(id: bytes, result: bytes) -> bytes:
    return hashlib.sha256(id + result).digest()
