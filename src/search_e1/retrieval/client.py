"""A retriever somewhere else: the client of Search-R1's ``/retrieve``.

What is promised: a search ends with passages for every query from an answer that was checked, or in a
``RetrievalError``, and within a stated time. An empty list of passages means that the server found nothing, never that
something failed.
"""

import asyncio
import hashlib
import logging
import os
import threading
from collections.abc import Coroutine, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import pairwise
from typing import Any, Self, TypeVar

import httpx
from cachetools import LRUCache
from pydantic import BaseModel, FiniteFloat, ValidationError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_exponential_jitter,
)
from tenacity.stop import stop_base

from search_e1.errors import RetrievalError
from search_e1.retrieval.base import Hit
from search_e1.runs.safe import masked
from search_e1.types import Passage

CHECKSUM_HEADER = "Search-E1-Index"
"""With every answer of `search-e1 serve-retriever`: the checksum of its index."""
MOST_QUERIES_HEADER = "Search-E1-Max-Queries"
"""With every answer of `search-e1 serve-retriever`: how many queries one request may hold."""

_REQUEST_QUERIES, _REQUEST_CHARS = 256, 2**20
"""Most queries, and characters of them, in one request; what is more goes into further ones."""
_ANSWER_BYTES = 2**28
"""Of one answer, unpacked: 256 queries' passages are far below, whatever asks for more memory is none."""
_OF_TRANSFER = ("content-encoding", "content-length", "transfer-encoding")
_CONNECTIONS = 4
_PROBE_ATTEMPTS = 4
"""Before the work begins nobody waits for a server that is down: its address may be wrong."""
_CONNECT_SECONDS = 10.0
_RETRY_AFTER_SECONDS = 60.0
"""The longest wait that a server can ask for."""
_REMEMBERED = 20_000
"""Queries whose passages are kept in memory: siblings ask the same things, also in later turns."""

logger = logging.getLogger(__name__)
Found = TypeVar("Found")


class _Document(BaseModel):
    id: str | int | None = None  # Search-R1's own BM25 server leaves it out
    contents: str


class _Hit(BaseModel):
    document: _Document
    score: FiniteFloat | None = None  # Search-R1's web search servers leave it out


class _Answer(BaseModel):
    result: list[list[_Hit]]


class _PassingError(Exception):
    """Something that may pass: no connection, a time-out, a server that is overloaded, restarting, one bad one of several."""

    def __init__(self, cause: str, retry_after: float = 0.0) -> None:
        super().__init__(cause)
        self.retry_after = retry_after


class HttpRetriever:
    """A ``Retriever`` that asks a server over HTTP, keeping its connections open and what it was told in memory.

    May be used from several threads: what one of them waits for, another does not ask again. Use it as a context manager,
    or ``close`` it.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 30.0,
        attempts: int | None = None,
        time_limit: float = 180.0,
    ) -> None:
        """``url``: with or without ``/retrieve`` at its end.

        ``timeout``: seconds for one try of a request, from connecting to the last byte of the answer. ``attempts``: tries of
        a request, or as many as its time allows. ``time_limit``: seconds for all tries of a request and the waits between
        them: how long a server may be down without harm.

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
        # A proxy from the environment is never meant for this machine.
        self._environment = parsed.host not in ("localhost", "127.0.0.1", "::1")
        self._checksum: str | None = None
        self._most_queries = _REQUEST_QUERIES
        self._retrying = AsyncRetrying(
            retry=retry_if_exception_type(_PassingError),
            stop=stop_before_delay(time_limit) if attempts is None else _either(attempts, time_limit),
            wait=_wait,
            before_sleep=self._tell,
            retry_error_callback=self._give_up,
        )
        self._waiting = False
        self._starting = threading.Lock()
        self._process: int | None = None

    @property
    def checksum(self) -> str | None:
        """Of the server's index, once it has answered; ``None`` if it does not tell."""
        return self._checksum

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """See ``Retriever``. Passages are ``Hit`` if the server gives scores."""
        found = self._run(self._search(list(dict.fromkeys(queries)), topk))
        return [list(found[query]) for query in queries]

    def probe(self) -> None:
        """Ask one query, so that a server that does not answer is found before any other work.

        Raises:
            RetrievalError: it does not answer, or not as it should.
        """
        retrying = self._retrying.copy(
            stop=_either(min(self.attempts or _PROBE_ATTEMPTS, _PROBE_ATTEMPTS), self.time_limit)
        )
        self._run(self._search(["Who wrote Hamlet?"], 1, retrying))

    def close(self) -> None:
        """End the connections; a search afterwards opens new ones."""
        with self._starting:
            if self._process == os.getpid():
                asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # One thread runs all requests on an event loop: only there a request can be given a time in all, whatever its server
    # does, and no lock is needed around what the threads share.

    def _run(self, work: Coroutine[Any, Any, Found]) -> Found:
        with self._starting:
            if self._process != os.getpid():  # new, closed, or forked: threads do not follow into a child
                self._start()
            running = asyncio.run_coroutine_threadsafe(work, self._loop)
        return running.result()

    def _start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=min(self.timeout, _CONNECT_SECONDS)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=_CONNECTIONS, keepalive_expiry=30.0),
            trust_env=self._environment,
        )
        self._sending = asyncio.Semaphore(_CONNECTIONS)
        self._memory: LRUCache[tuple[str, int], asyncio.Future[list[Passage]]] = LRUCache(_REMEMBERED)
        self._thread = threading.Thread(target=self._loop.run_forever, name="retrieval client", daemon=True)
        self._thread.start()
        self._process = os.getpid()

    async def _end(self) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await self._client.aclose()

    async def _search(
        self, queries: list[str], topk: int, retrying: AsyncRetrying | None = None
    ) -> dict[str, list[Passage]]:
        waited: dict[str, asyncio.Future[list[Passage]]] = {}
        new = []
        for query in queries:
            known = self._memory.get((query, topk))
            if known is None:
                new.append(query)
                known = self._memory[query, topk] = asyncio.get_running_loop().create_future()
            waited[query] = known
        parts = [
            asyncio.create_task(self._fetch(part, topk, waited, retrying or self._retrying))
            for part in self._parts(new)
        ]
        if waited:
            await asyncio.wait(waited.values())
        if parts:
            await asyncio.wait(parts)
        for failure in [future.exception() for future in waited.values()]:
            if failure:
                raise RetrievalError(str(failure)) from failure
        return {query: future.result() for query, future in waited.items()}

    def _parts(self, queries: Sequence[str]) -> Iterator[list[str]]:
        part: list[str] = []
        size = 0
        for query in queries:
            if part and (len(part) == self._most_queries or size + len(query) > _REQUEST_CHARS):
                yield part
                part, size = [], 0
            part.append(query)
            size += len(query)
        if part:
            yield part

    async def _fetch(
        self,
        queries: list[str],
        topk: int,
        waited: dict[str, "asyncio.Future[list[Passage]]"],
        retrying: AsyncRetrying,
    ) -> None:
        """Ask for ``queries`` in one request and settle their futures, whatever happens."""
        try:
            async with self._sending:
                until = asyncio.get_running_loop().time() + self.time_limit
                # A copy: an object of tenacity keeps the state of one call.
                results: list[list[Passage]] = await retrying.copy()(self._ask, queries, topk, until)
        except Exception as error:
            for query in queries:
                self._memory.pop((query, topk), None)
                waited[query].set_exception(error)
            return
        for query, passages in zip(queries, results, strict=True):
            waited[query].set_result(passages)

    async def _ask(self, queries: list[str], topk: int, until: float) -> list[list[Passage]]:
        request = {"queries": queries, "topk": topk, "return_scores": True}
        seconds = min(self.timeout, until - asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(seconds):
                async with self._client.stream("POST", self.url, json=request) as answer:
                    response = await self._whole(answer)
        except TimeoutError as error:
            raise _PassingError(
                f"no answer within {seconds:.3g} s; raise retrieval.timeout if that is too short"
            ) from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _PassingError(f"{type(error).__name__}: {error}; is the server running?") from error
        status = f"status {response.status_code} {response.reason_phrase}".strip()
        if response.status_code in (408, 425, 429) or response.is_server_error:
            raise _PassingError(f"{status}{_detail(response)}", _retry_after(response))
        if not response.is_success:
            raise self._failed(f"{status}{_detail(response)}; is it the address of a Search-R1 retrieval server?")
        passages = _checked(response, len(queries), topk)
        self._remember(response)
        if self._waiting:
            self._waiting = False
            logger.warning("%s answers again", self.url)
        return passages

    async def _whole(self, answer: httpx.Response) -> httpx.Response:
        """``answer``, read and unpacked, as far as it may go.

        Raises:
            RetrievalError: it goes further.
        """
        parts, size = [], 0
        async for part in answer.aiter_bytes():
            parts.append(part)
            size += len(part)
            if size > _ANSWER_BYTES:
                raise self._failed(f"an answer of more than {_ANSWER_BYTES >> 20} MiB; is it a retrieval server?")
        headers = [(name, value) for name, value in answer.headers.multi_items() if name.lower() not in _OF_TRANSFER]
        said = {"reason_phrase": answer.reason_phrase.encode("ascii", "replace")}
        return httpx.Response(answer.status_code, headers=headers, content=b"".join(parts), extensions=said)

    def _remember(self, response: httpx.Response) -> None:
        """What the server tells of itself.

        Raises:
            RetrievalError: it serves another index than before, so that its passages must not be mixed with the earlier ones.
        """
        told = response.headers.get(CHECKSUM_HEADER)
        if told and self._checksum and told != self._checksum:
            raise self._failed(
                f"the server's index changed while it was in use (from {self._checksum[:12]} to {told[:12]})"
            )
        self._checksum = told or self._checksum
        most = response.headers.get(MOST_QUERIES_HEADER, "")
        if most.isdecimal() and int(most):
            self._most_queries = min(int(most), _REQUEST_QUERIES)

    def _tell(self, state: RetryCallState) -> None:
        """Once an outage, when it is no longer a hiccup: a stage that waits looks like one that hangs."""
        if state.attempt_number >= _PROBE_ATTEMPTS and not self._waiting:
            self._waiting = True
            cause = state.outcome.exception() if state.outcome else None
            logger.warning("%s: %s; tried again for up to %g s", self.url, cause, self.time_limit)

    def _give_up(self, state: RetryCallState) -> Any:
        assert state.outcome is not None
        cause = state.outcome.exception()
        raise self._failed(str(cause), state.attempt_number) from cause

    def _failed(self, cause: str, attempts: int = 1) -> RetrievalError:
        tries = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        return RetrievalError(f"{masked(self.url)}: no passages after {tries}: {cause}")


def _either(attempts: int, time_limit: float) -> stop_base:
    return stop_after_attempt(attempts) | stop_before_delay(time_limit)


_backoff = wait_exponential_jitter(initial=0.2, max=10.0, jitter=0.2)


def _wait(state: RetryCallState) -> float:
    """Longer each time, and never shorter than the server asked for."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, _PassingError) else 0.0
    return max(_backoff(state), min(asked, _RETRY_AFTER_SECONDS))


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait, given as a number or as a date; 0 if it does not say."""
    told = response.headers.get("Retry-After", "")
    if told.isdecimal():
        return float(told)
    try:
        when = parsedate_to_datetime(told)
    except ValueError:
        return 0.0
    return max(0.0, (when.astimezone(UTC) - datetime.now(UTC)).total_seconds())


def _detail(response: httpx.Response) -> str:
    """What the server says of its refusal, where it says so as FastAPI does."""
    try:
        detail = response.json()["detail"]
    except (ValueError, LookupError, TypeError):
        return ""
    if not isinstance(detail, str) or detail == response.reason_phrase:
        return ""
    return f" ({' '.join(detail.split())[:200]})"


def _checked(response: httpx.Response, queries: int, topk: int) -> list[list[Passage]]:
    """The passages of an answer in which everything is as it should be.

    Raises:
        _PassingError: it is not. Also this may pass: an answer can be cut short, and one of several servers be a bad one.
    """
    try:
        result = _Answer.model_validate_json(response.content).result
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the answer"
        raise _PassingError(f"not an answer of /retrieve ({where}: {problem['msg']})") from error
    if len(result) != queries:
        raise _PassingError(f"{len(result)} results for {queries} queries")
    for hits in result:
        if len(hits) > topk:
            raise _PassingError(f"{len(hits)} passages for a query where at most {topk} were asked for")
        scores = [hit.score for hit in hits if hit.score is not None]
        if scores and len(scores) < len(hits):
            raise _PassingError("a passage without a score among others with one")
        if any(first < second for first, second in pairwise(scores)):
            raise _PassingError("passages that are not in the order of their scores")
        ids = [hit.document.id for hit in hits if hit.document.id is not None]
        if len(set(ids)) < len(ids):
            raise _PassingError("the same passage twice for a query")
    return [[_passage(hit) for hit in hits] for hits in result]


def _passage(hit: _Hit) -> Passage:
    id, contents = hit.document.id, hit.document.contents
    if id is None:
        id = f"sha256:{hashlib.sha256(contents.encode()).hexdigest()[:16]}"
    passage = Passage.from_contents(str(id), contents)
    if hit.score is None:
        return passage
    return Hit(id=passage.id, title=passage.title, text=passage.text, score=hit.score)
