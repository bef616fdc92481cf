"""Client of a retrieval server that speaks Search-R1's ``/retrieve``.

A search returns validated passages for every query or raises ``RetrievalError``, within a time limit.
"""

import asyncio
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any, Self

from cachetools import LRUCache
from pydantic import BaseModel, BeforeValidator, FiniteFloat, ValidationError

from search_e1.errors import RetrievalError
from search_e1.retrieval.base import Hit
from search_e1.runs import sha256_text
from search_e1.runs.http import Reply, Server, TransientError, check_status, server_url
from search_e1.runs.safe import masked_url
from search_e1.types import Passage

CHECKSUM_HEADER, MOST_QUERIES_HEADER = "Search-E1-Index", "Search-E1-Max-Queries"
"""Response headers of `search-e1 serve-retriever`: the checksum of its index, and its maximum queries per request."""

_REQUEST_QUERIES, _REQUEST_CHARS = 256, 2**20
"""Maximum queries, and characters of queries, per request; more are split into several requests."""
_RESPONSE_BYTES = 2**28
"""Size limit of one decompressed response, far above the passages of 256 queries."""
_CONNECTIONS = 4
_MEMORY_QUERIES = 20_000
"""Queries whose passages stay in memory: siblings repeat queries, also in later turns."""

Results = dict[str, list[Passage]]


class _Document(BaseModel):
    id: str | int | None = None  # Search-R1's BM25 server omits it
    contents: str
    metadata: Any = None


class _Hit(BaseModel):
    document: Annotated[_Document, BeforeValidator(lambda d: {"contents": d} if isinstance(d, str) else d)]
    """Some servers send only the text."""
    score: FiniteFloat | None = None  # Search-R1's web search servers omit it


class _Response(BaseModel):
    result: list[list[_Hit]]


class HttpRetriever:
    """A ``Retriever`` over HTTP, with persistent connections and recent results in memory.

    Thread-safe; a query in flight is not sent again by another thread. Use as a context manager, or call ``close``.
    """

    def __init__(self, url: str, timeout: float = 30.0, attempts: int | None = None, time_limit: float = 180.0) -> None:
        """``url``: with or without a trailing ``/retrieve``.

        ``timeout``: seconds for one attempt of a request, from connecting to the last byte of the response. ``attempts``:
        maximum attempts of a request; default: as many as ``time_limit`` allows. ``time_limit``: seconds for all attempts of a
        request, waits included.

        Raises:
            ConfigError: ``url`` is not an http or https URL.
        """
        endpoint = server_url(url, "retrieval.url", "/retrieve")
        self.url = masked_url(str(endpoint))
        """The server's URL, without secrets."""
        self._server = Server(
            endpoint,
            RetrievalError,
            what="passages",
            timeout=timeout,
            time_limit=time_limit,
            most_bytes=_RESPONSE_BYTES,
            concurrency=_CONNECTIONS,
            attempts=attempts,
            remedy="; raise retrieval.timeout if that is too short",
        )
        self._checksum: str | None = None
        self._most_queries = _REQUEST_QUERIES
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def checksum(self) -> str | None:
        """Checksum of the server's index; ``None`` before the first response or if the server sends none."""
        return self._checksum

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """See ``Retriever``. Passages are ``Hit`` if the server sends scores."""
        results = self._server.submit(self._search(list(dict.fromkeys(queries)), topk)).result()
        return [list(results[query]) for query in queries]

    def probe(self, topk: int = 1) -> None:
        """Send one query, so that a run fails before any other work if the server does not answer.

        Raises:
            RetrievalError: no response, or an invalid one.
        """
        self._server.submit(self._search(["Who wrote Hamlet?"], topk, early=True)).result()

    def close(self) -> None:
        """Close the connections; a later search opens new ones."""
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # The methods below run on the server's event loop: shared state needs no lock.

    async def _search(self, queries: list[str], topk: int, *, early: bool = False) -> Results:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # new, closed, or forked
            self._loop = loop
            self._memory: LRUCache[tuple[str, int], asyncio.Future[list[Passage]]] = LRUCache(_MEMORY_QUERIES)
        futures: dict[str, asyncio.Future[list[Passage]]] = {}
        new = []
        for query in queries:
            future = self._memory.get((query, topk))
            if future is None:
                new.append(query)
                future = self._memory[query, topk] = loop.create_future()
            futures[query] = future
        await asyncio.gather(*(self._fetch(part, topk, futures, early) for part in self._split(new)))
        # Not gather: a cancelled search must not cancel futures that others wait for.
        if futures:
            await asyncio.wait(futures.values())
        for failure in [future.exception() for future in futures.values()]:
            if failure:
                raise RetrievalError(str(failure)) from failure
        return {query: future.result() for query, future in futures.items()}

    def _split(self, queries: Sequence[str]) -> Iterator[list[str]]:
        part: list[str] = []
        for query in queries:
            if part and (len(part) == self._most_queries or sum(map(len, part)) + len(query) > _REQUEST_CHARS):
                yield part
                part = []
            part.append(query)
        if part:
            yield part

    async def _fetch(
        self, queries: list[str], topk: int, futures: dict[str, asyncio.Future[list[Passage]]], early: bool
    ) -> None:
        """Send ``queries`` in one request and resolve their futures, also on failure."""

        def read(reply: Reply) -> list[list[Passage]]:
            check_status(reply)
            if not reply.ok:
                raise self._server.failure(f"{reply.words}; is it the address of a Search-R1 retrieval server?")
            passages = _parse(reply.content, len(queries), topk)
            self._read_headers(reply)
            return passages

        try:
            request = {"queries": queries, "topk": topk, "return_scores": True}
            results = await self._server.ask(read, request, early=early)
        except Exception as error:
            for query in queries:
                self._memory.pop((query, topk), None)
                futures[query].set_exception(error)
            return
        for query, passages in zip(queries, results, strict=True):
            futures[query].set_result(passages)

    def _read_headers(self, reply: Reply) -> None:
        """Store the server's checksum and limit. A changed index is an error: passages of two indexes must not be mixed."""
        checksum = reply.headers.get(CHECKSUM_HEADER)
        if checksum and self._checksum and checksum != self._checksum:
            change = f"from {self._checksum[:12]} to {checksum[:12]}"
            raise self._server.failure(f"the server's index changed while it was in use ({change})")
        self._checksum = checksum or self._checksum
        limit = reply.headers.get(MOST_QUERIES_HEADER, "")
        if limit.isdecimal() and int(limit):
            self._most_queries = min(int(limit), _REQUEST_QUERIES)


def _parse(content: bytes, queries: int, topk: int) -> list[list[Passage]]:
    """Validated passages, cut to ``topk`` per query, since some servers ignore ``topk``.

    Raises:
        TransientError: an invalid response; it is retried, since it may be truncated, or come from one bad server of several.
    """
    try:
        result = _Response.model_validate_json(content).result
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the response"
        raise TransientError(f"not a response of /retrieve ({where}: {problem['msg']})") from None
    if len(result) != queries:
        raise TransientError(f"{len(result)} results for {queries} queries")
    for hits in result:
        del hits[topk:]
        scores = [hit.score for hit in hits if hit.score is not None]
        if scores and len(scores) < len(hits):
            raise TransientError("some passages have a score and some do not")
        if any(first < second for first, second in pairwise(scores)):
            raise TransientError("passages out of order by score")
        ids = [hit.document.id for hit in hits if hit.document.id is not None]
        if len(set(ids)) < len(ids):
            raise TransientError("the same passage twice for a query")
    return [[_passage(hit) for hit in hits] for hits in result]


def _passage(hit: _Hit) -> Passage:
    id, contents = hit.document.id, hit.document.contents
    if id is None:
        id = f"sha256:{sha256_text(contents)[:16]}"
    passage = Passage.from_contents(str(id), contents, hit.document.metadata)
    return passage if hit.score is None else Hit(**passage.model_dump(), score=hit.score)
