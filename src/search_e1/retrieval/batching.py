"""Dynamic batching of concurrent queries, with an in-memory cache."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from typing import Generic, Self, TypeVar

from cachetools import LRUCache

from search_e1.retrieval.settings import Settings

Answer = TypeVar("Answer")
Key = tuple[str, int]
"""(query, topk): results for a small topk need not be a prefix of those for a larger one."""


class QueueFullError(Exception):
    """Too many queries are waiting for the index."""


class IndexFailedError(Exception):
    """The index raised; the cause is chained."""


class Batcher(Generic[Answer]):
    """Answers queries by calling ``answer`` in worker threads, off the event loop.

    Queries that arrive together share a call, equal queries in flight share a result, and results are cached. An async context
    manager; its exit waits for calls in flight.
    """

    def __init__(
        self,
        answer: Callable[[list[str], int], Sequence[Answer]],
        limits: Settings,
        size_of: Callable[[Answer], int] = lambda answer: 0,
        count: Callable[[str, int], None] = lambda source, queries: None,
    ) -> None:
        """``answer``: queries and topk -> one result each; called from ``limits.threads`` threads.

        ``size_of``: bytes of a cached result. ``count``: called with the source of results (``index``, ``cache``, or
        ``joined`` for queries already in flight) and their number.
        """
        self._answer, self._limits, self._count = answer, limits, count
        # Each result counts at least its share of the bytes, so that there are never more than ``limits.cache`` results.
        share = max(1, limits.cache_bytes // max(1, limits.cache))
        self.cache: LRUCache[Key, Answer] = LRUCache(limits.cache * share, lambda answer: max(share, size_of(answer)))
        self._queue: asyncio.Queue[Key] = asyncio.Queue()
        self._in_flight: dict[Key, asyncio.Future[Answer]] = {}
        self._pool = ThreadPoolExecutor(limits.threads, thread_name_prefix="index")
        self._workers: list[asyncio.Task[None]] = []

    @property
    def waiting(self) -> int:
        """Number of queries waiting for a call."""
        return self._queue.qsize()

    async def __aenter__(self) -> Self:
        self._workers = [asyncio.create_task(self._work()) for _ in range(self._limits.threads)]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for worker in self._workers:
            worker.cancel()
            with suppress(asyncio.CancelledError):
                await worker
        self._pool.shutdown()

    async def search(self, queries: Sequence[str], topk: int) -> list[Answer]:
        """The result of each query.

        Raises:
            QueueFullError: too many queries are waiting; none of ``queries`` was queued.
            IndexFailedError: the index raised.
        """
        keys = [(query, topk) for query in queries]
        results: dict[Key, Answer] = {}
        futures: dict[Key, asyncio.Future[Answer]] = {}
        new: list[Key] = []
        for key in dict.fromkeys(keys):
            if key in self.cache:
                results[key] = self.cache[key]
            elif key in self._in_flight:
                futures[key] = self._in_flight[key]
            else:
                new.append(key)
        if self.waiting + len(new) > self._limits.queue:
            raise QueueFullError
        for source, number in (("cache", len(results)), ("joined", len(futures)), ("index", len(new))):
            self._count(source, number)
        for key in new:
            futures[key] = self._in_flight[key] = asyncio.get_running_loop().create_future()
            self._queue.put_nowait(key)
        if futures:  # not gather: a cancelled request must not cancel futures that others wait for
            await asyncio.wait(futures.values())
        for failure in [future.exception() for future in futures.values()]:
            if failure:
                raise IndexFailedError(str(failure)) from failure
        results |= {key: future.result() for key, future in futures.items()}
        return [results[key] for key in keys]

    async def _work(self) -> None:
        while True:
            batch = [await self._queue.get()]
            if self._limits.batch_wait and 1 + self.waiting < self._limits.batch:
                await asyncio.sleep(self._limits.batch_wait)
            while len(batch) < self._limits.batch and self.waiting:
                batch.append(self._queue.get_nowait())
            # Different values of topk are rare; each gets its own call.
            for topk, keys in groupby(sorted(batch, key=lambda key: key[1]), key=lambda key: key[1]):
                await self._call(list(keys), topk)

    async def _call(self, keys: list[Key], topk: int) -> None:
        queries = [query for query, _ in keys]
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._pool, self._answer, queries, topk)
            answered = dict(zip(keys, answers, strict=True))
        except Exception as error:
            for key in keys:
                self._in_flight.pop(key).set_exception(error)
            return
        for key, answer in answered.items():
            with suppress(ValueError):  # result larger than the cache
                self.cache[key] = answer
            self._in_flight.pop(key).set_result(answer)
