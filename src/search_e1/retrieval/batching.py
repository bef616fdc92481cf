"""Concurrent requests gathered into few calls of an index, with a cache in front of it."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from types import TracebackType
from typing import Generic, Self, TypeVar

from cachetools import LRUCache

Answer = TypeVar("Answer")
Key = tuple[str, int]
"""A query and its topk: results for a small topk need not be the beginning of those for a greater one."""


class QueueFullError(Exception):
    """More queries wait for the index than may."""


class IndexFailedError(Exception):
    """The call of the index raised; the cause is chained."""


class Batcher(Generic[Answer]):
    """Answers queries by calls of ``answer`` in worker threads, so that the event loop stays free.

    Queries of requests that arrive together go into one call. A query that is waited for already is not asked again; what
    was answered is kept. Use it as an async context manager; leaving it waits for the calls under way.
    """

    def __init__(
        self,
        answer: Callable[[list[str], int], Sequence[Answer]],
        *,
        size: int,
        wait: float,
        limit: int,
        threads: int,
        cached: int,
        cached_bytes: int = 2**30,
        size_of: Callable[[Answer], int] = lambda answer: 0,
        count: Callable[[str, int], None] = lambda source, queries: None,
    ) -> None:
        """``answer``: queries and topk -> one answer each; called from ``threads`` threads at once.

        ``size``: most queries of one call. ``wait``: seconds that a call which is not full waits for more queries.
        ``limit``: most queries that may wait. ``cached``: answers that are kept, least recently used out first, and as many of
        ``cached_bytes`` as ``size_of`` says of them.
        ``count``: told how many queries were answered from where: ``index``, ``cache``, or ``joined`` to one under way.
        """
        self._answer = answer
        self.size, self.wait, self.limit, self.threads = size, wait, limit, threads
        # An answer counts for its share of the bytes at least, so that there are never more than ``cached``.
        share = max(1, cached_bytes // max(1, cached))
        self.cache: LRUCache[Key, Answer] = LRUCache(cached * share, lambda answer: max(share, size_of(answer)))
        self._count = count
        self._queue: asyncio.Queue[Key] = asyncio.Queue()
        self._under_way: dict[Key, asyncio.Future[Answer]] = {}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="index")
        self._workers: list[asyncio.Task[None]] = []

    @property
    def waiting(self) -> int:
        """Queries that no call has taken up yet."""
        return self._queue.qsize()

    async def __aenter__(self) -> Self:
        self._workers = [asyncio.create_task(self._work()) for _ in range(self.threads)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.cancel()
            with suppress(asyncio.CancelledError):
                await worker
        self._pool.shutdown()

    async def search(self, queries: Sequence[str], topk: int) -> list[Answer]:
        """The answer of each query.

        Raises:
            QueueFullError: too many queries wait; none of these was added.
            IndexFailedError: the index raised.
        """
        keys = [(query, topk) for query in queries]
        found: dict[Key, Answer] = {}
        futures: dict[Key, asyncio.Future[Answer]] = {}
        new: list[Key] = []
        for key in dict.fromkeys(keys):
            if key in self.cache:
                found[key] = self.cache[key]
            elif key in self._under_way:
                futures[key] = self._under_way[key]
            else:
                new.append(key)
        if self.waiting + len(new) > self.limit:
            raise QueueFullError
        for source, number in (("cache", len(found)), ("joined", len(futures)), ("index", len(new))):
            self._count(source, number)
        for key in new:
            futures[key] = self._under_way[key] = asyncio.get_running_loop().create_future()
            self._queue.put_nowait(key)
        if futures:
            # Not gather: a request that is cancelled must not cancel what others wait for.
            await asyncio.wait(futures.values())
        for failure in [future.exception() for future in futures.values()]:
            if failure:
                raise IndexFailedError(str(failure)) from failure
        found |= {key: future.result() for key, future in futures.items()}
        return [found[key] for key in keys]

    async def _work(self) -> None:
        while True:
            batch = [await self._queue.get()]
            if self.wait and 1 + self.waiting < self.size:
                await asyncio.sleep(self.wait)
            while len(batch) < self.size and self.waiting:
                batch.append(self._queue.get_nowait())
            # Requests with another topk are rare; they get a call of their own.
            for topk, keys in groupby(sorted(batch, key=lambda key: key[1]), key=lambda key: key[1]):
                await self._call(list(keys), topk)

    async def _call(self, keys: list[Key], topk: int) -> None:
        queries = [query for query, _ in keys]
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._pool, self._answer, queries, topk)
            answered = dict(zip(keys, answers, strict=True))
        except Exception as error:
            for key in keys:
                self._under_way.pop(key).set_exception(error)
            return
        for key, answer in answered.items():
            with suppress(ValueError):  # larger than the whole cache
                self.cache[key] = answer
            self._under_way.pop(key).set_result(answer)
