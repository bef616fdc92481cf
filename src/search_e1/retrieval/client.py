"""Client of a retrieval server that speaks Search-R1's ``/retrieve``.

A search returns validated passages for every query, or raises ``RetrievalError``, within a stated time.
"""

import asyncio
import hashlib
import json
import logging
import os
import threading
from collections.abc import Coroutine, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import pairwise
from typing import Annotated, Any, Self, TypeVar

import httpx
from cachetools import LRUCache
from pydantic import BaseModel, BeforeValidator, FiniteFloat, ValidationError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type
from tenacity.stop import stop_after_attempt, stop_base, stop_before_delay
from tenacity.wait import wait_exponential_jitter

from search_e1.errors import RetrievalError
from search_e1.retrieval.base import Hit
from search_e1.runs.safe import masked
from search_e1.types import Passage

CHECKSUM_HEADER, MOST_QUERIES_HEADER = "Search-E1-Index", "Search-E1-Max-Queries"
"""Response headers of `search-e1 serve-retriever`: the checksum of its index, and most queries of one request."""

_REQUEST_QUERIES, _REQUEST_CHARS = 256, 2**20
"""Most queries, and characters of queries, in one request; more are split into several requests."""
_RESPONSE_BYTES = 2**28
"""Size limit of one decompressed response, far above the passages of 256 queries."""
_CONNECTIONS = 4
_PROBE_ATTEMPTS = 4
"""Attempts before any work has begun: the address may be wrong."""
_CONNECT_SECONDS = 10.0
_RETRY_AFTER_SECONDS = 60.0
"""Longest wait that a server can request."""
_MEMORY_QUERIES = 20_000
"""Queries whose passages stay in memory: siblings send the same ones, also in later turns."""

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Results = dict[str, list[Passage]]


class _Document(BaseModel):
    id: str | int | None = None  # Search-R1's own BM25 server leaves it out
    contents: str


class _Hit(BaseModel):
    document: Annotated[_Document, BeforeValidator(lambda d: {"contents": d} if isinstance(d, str) else d)]
    """Some servers send the text alone."""
    score: FiniteFloat | None = None  # Search-R1's web search servers leave it out


class _Response(BaseModel):
    result: list[list[_Hit]]


class _TransientError(Exception):
    """A failure that may pass: no connection, a time-out, an overloaded or restarting server, one bad server of several."""

    def __init__(self, cause: str, retry_after: float = 0.0) -> None:
        super().__init__(cause)
        self.retry_after = retry_after


class HttpRetriever:
    """A ``Retriever`` that searches over HTTP, with persistent connections and recent results in memory.

    Thread-safe; a query that one thread waits for is not sent again by another. A context manager; else call ``close``.
    """

    def __init__(self, url: str, timeout: float = 30.0, attempts: int | None = None, time_limit: float = 180.0) -> None:
        """``url``: with or without ``/retrieve`` at its end.

        ``timeout``: seconds for one attempt of a request, from connecting to the last byte of the response. ``attempts``:
        most attempts of a request; default: as many as its time allows. ``time_limit``: seconds for all attempts of a
        request, waits included.

        Raises:
            RetrievalError: ``url`` is not an http or https URL.
        """
        self.url = url.rstrip("/").removesuffix("/retrieve") + "/retrieve"
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise RetrievalError(f"retrieval.url = {masked(url)!r}: {error}; write http://host:port") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise RetrievalError(f"retrieval.url = {masked(url)!r}: not an http or https URL; write http://host:port")
        self.timeout, self.attempts, self.time_limit = timeout, attempts, time_limit
        # Proxies from the environment do not apply to this machine itself.
        self._use_proxies = parsed.host not in ("localhost", "127.0.0.1", "::1")
        self._checksum: str | None = None
        self._most_queries = _REQUEST_QUERIES
        self._retrying = AsyncRetrying(
            retry=retry_if_exception_type(_TransientError),
            stop=_stop(attempts, time_limit),
            wait=_wait_seconds,
            before_sleep=self._report_outage,
            retry_error_callback=self._give_up,
        )
        self._is_down = False
        self._start_lock = threading.Lock()
        self._process: int | None = None

    @property
    def checksum(self) -> str | None:
        """Checksum of the server's index; ``None`` before the first response, and if the server sends none."""
        return self._checksum

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """See ``Retriever``. Passages are ``Hit`` if the server sends scores."""
        results = self._run(self._search(list(dict.fromkeys(queries)), topk))
        return [list(results[query]) for query in queries]

    def probe(self, topk: int = 1) -> None:
        """Send one query, so that a server that does not answer stops a run before any other work.

        Raises:
            RetrievalError: no response, or not a valid one.
        """
        attempts = min(self.attempts or _PROBE_ATTEMPTS, _PROBE_ATTEMPTS)
        retrying = self._retrying.copy(stop=_stop(attempts, self.time_limit))
        self._run(self._search(["Who wrote Hamlet?"], topk, retrying))

    def close(self) -> None:
        """Close the connections; a later search opens new ones."""
        with self._start_lock:
            if self._process == os.getpid():
                asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # All requests run on the event loop of one thread. Only there can a whole request have a deadline, whatever its server
    # does, and shared state needs no lock.

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        with self._start_lock:
            if self._process != os.getpid():  # new, closed, or forked: a child has none of its parent's threads
                self._start()
            running = asyncio.run_coroutine_threadsafe(work, self._loop)
        return running.result()

    def _start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=min(self.timeout, _CONNECT_SECONDS)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=_CONNECTIONS, keepalive_expiry=30.0),
            trust_env=self._use_proxies,
        )
        self._sending = asyncio.Semaphore(_CONNECTIONS)
        self._memory: LRUCache[tuple[str, int], asyncio.Future[list[Passage]]] = LRUCache(_MEMORY_QUERIES)
        self._thread = threading.Thread(target=self._loop.run_forever, name="retrieval client", daemon=True)
        self._thread.start()
        self._process = os.getpid()

    async def _shut_down(self) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await self._client.aclose()

    async def _search(self, queries: list[str], topk: int, retrying: AsyncRetrying | None = None) -> Results:
        futures: dict[str, asyncio.Future[list[Passage]]] = {}
        new = []
        for query in queries:
            future = self._memory.get((query, topk))
            if future is None:
                new.append(query)
                future = self._memory[query, topk] = asyncio.get_running_loop().create_future()
            futures[query] = future
        fetches = (self._fetch(part, topk, futures, retrying or self._retrying) for part in self._split(new))
        await asyncio.gather(*fetches)
        # Not gather: a search that ends early must not cancel what others wait for.
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
        self, queries: list[str], topk: int, futures: dict[str, asyncio.Future[list[Passage]]], retrying: AsyncRetrying
    ) -> None:
        """Send ``queries`` in one request and resolve their futures, whatever happens."""
        try:
            async with self._sending:
                deadline = asyncio.get_running_loop().time() + self.time_limit
                # A copy: tenacity keeps the state of a call in the object.
                results: list[list[Passage]] = await retrying.copy()(self._post, queries, topk, deadline)
        except Exception as error:
            for query in queries:
                self._memory.pop((query, topk), None)
                futures[query].set_exception(error)
            return
        for query, passages in zip(queries, results, strict=True):
            futures[query].set_result(passages)

    async def _post(self, queries: list[str], topk: int, deadline: float) -> list[list[Passage]]:
        request = {"queries": queries, "topk": topk, "return_scores": True}
        seconds = min(self.timeout, deadline - asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(seconds):
                async with self._client.stream("POST", self.url, json=request) as response:
                    content = await self._read(response)
        except TimeoutError as error:
            cause = f"no answer within {seconds:.3g} s; raise retrieval.timeout if that is too short"
            raise _TransientError(cause) from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _TransientError(f"{type(error).__name__}: {error}; is the server running?") from error
        if not response.is_success:
            status = f"status {response.status_code} {response.reason_phrase}".strip() + _detail(response, content)
            if response.status_code in (408, 425, 429) or response.is_server_error:
                raise _TransientError(status, _retry_after(response))
            raise self._failure(f"{status}; is it the address of a Search-R1 retrieval server?")
        passages = _parse(content, len(queries), topk)
        self._read_headers(response)
        if self._is_down:
            self._is_down = False
            logger.warning("%s answers again", self.url)
        return passages

    async def _read(self, response: httpx.Response) -> bytes:
        """The decompressed body; one larger than ``_RESPONSE_BYTES`` is refused."""
        content = bytearray()
        async for part in response.aiter_bytes():
            content += part
            if len(content) > _RESPONSE_BYTES:
                raise self._failure(f"a response of more than {_RESPONSE_BYTES >> 20} MiB; is it a retrieval server?")
        return bytes(content)

    def _read_headers(self, response: httpx.Response) -> None:
        """Store what the server says about itself. Passages of an index that has changed must not be mixed."""
        checksum = response.headers.get(CHECKSUM_HEADER)
        if checksum and self._checksum and checksum != self._checksum:
            change = f"from {self._checksum[:12]} to {checksum[:12]}"
            raise self._failure(f"the server's index changed while it was in use ({change})")
        self._checksum = checksum or self._checksum
        limit = response.headers.get(MOST_QUERIES_HEADER, "")
        if limit.isdecimal() and int(limit):
            self._most_queries = min(int(limit), _REQUEST_QUERIES)

    def _report_outage(self, state: RetryCallState) -> None:
        """Warn once an outage, after a few attempts: a stage that waits looks like one that hangs."""
        if state.attempt_number >= _PROBE_ATTEMPTS and not self._is_down:
            self._is_down = True
            cause = state.outcome.exception() if state.outcome else None
            logger.warning("%s: %s; retrying for up to %g s", self.url, cause, self.time_limit)

    def _give_up(self, state: RetryCallState) -> Any:
        assert state.outcome is not None
        cause = state.outcome.exception()
        raise self._failure(str(cause), state.attempt_number) from cause

    def _failure(self, cause: str, attempts: int = 1) -> RetrievalError:
        tries = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        return RetrievalError(f"{masked(self.url)}: no passages after {tries}: {cause}")


def _stop(attempts: int | None, time_limit: float) -> stop_base:
    before = stop_before_delay(time_limit)
    return before if attempts is None else stop_after_attempt(attempts) | before


_backoff = wait_exponential_jitter(initial=0.2, max=10.0, jitter=0.2)


def _wait_seconds(state: RetryCallState) -> float:
    """Seconds to wait, growing with each attempt and at least what the server asked for."""
    error = state.outcome.exception() if state.outcome else None
    minimum = error.retry_after if isinstance(error, _TransientError) else 0.0
    return max(_backoff(state), min(minimum, _RETRY_AFTER_SECONDS))


def _retry_after(response: httpx.Response) -> float:
    """Seconds of the header ``Retry-After``, a number or a date; 0 without it."""
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return (parsedate_to_datetime(value).astimezone(UTC) - datetime.now(UTC)).total_seconds()
    except ValueError:
        return 0.0


def _detail(response: httpx.Response, content: bytes) -> str:
    """The reason that a refusal states in FastAPI's form; empty if it states none."""
    try:
        detail = json.loads(content)["detail"]
    except (ValueError, LookupError, TypeError):
        return ""
    if not isinstance(detail, str) or detail == response.reason_phrase:
        return ""
    return f" ({' '.join(detail.split())[:200]})"


def _parse(content: bytes, queries: int, topk: int) -> list[list[Passage]]:
    """Validated passages, at most ``topk`` a query: some servers ignore ``topk``.

    An invalid response may pass too: it can be truncated, and one server of several be a bad one.
    """
    try:
        result = _Response.model_validate_json(content).result
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the response"
        raise _TransientError(f"not a response of /retrieve ({where}: {problem['msg']})") from error
    if len(result) != queries:
        raise _TransientError(f"{len(result)} results for {queries} queries")
    for hits in result:
        del hits[topk:]
        scores = [hit.score for hit in hits if hit.score is not None]
        if scores and len(scores) < len(hits):
            raise _TransientError("a passage without a score among others with one")
        if any(first < second for first, second in pairwise(scores)):
            raise _TransientError("passages that are not in the order of their scores")
        ids = [hit.document.id for hit in hits if hit.document.id is not None]
        if len(set(ids)) < len(ids):
            raise _TransientError("the same passage twice for a query")
    return [[_passage(hit) for hit in hits] for hits in result]


def _passage(hit: _Hit) -> Passage:
    id, contents = hit.document.id, hit.document.contents
    if id is None:
        id = f"sha256:{hashlib.sha256(contents.encode()).hexdigest()[:16]}"
    passage = Passage.from_contents(str(id), contents)
    return passage if hit.score is None else Hit(**passage.model_dump(), score=hit.score)
