"""A retriever somewhere else: the client of Search-R1's ``/retrieve``."""

from collections.abc import Sequence
from typing import Any, Self

import httpx
from pydantic import BaseModel, ValidationError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from search_e1.errors import RetrievalError
from search_e1.types import Passage


class _Document(BaseModel):
    id: str | int
    contents: str


class _Hit(BaseModel):
    document: _Document


class _Answer(BaseModel):
    result: list[list[_Hit]]


class _PassingError(Exception):
    """Something that may pass: no connection, a time-out, an overloaded or restarting server."""


class HttpRetriever:
    """A ``Retriever`` that asks a server over HTTP, keeping its connections open.

    Use it as a context manager, or ``close`` it.
    """

    def __init__(self, url: str, timeout: float = 30.0, attempts: int = 4) -> None:
        """``url``: with or without ``/retrieve`` at its end. ``timeout``: seconds to connect, and between two bytes.

        Raises:
            RetrievalError: ``url`` is not an http or https URL.
        """
        self.url = url.rstrip("/").removesuffix("/retrieve") + "/retrieve"
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise RetrievalError(f"retrieval.url = {url!r}: {error}; write http://host:port") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise RetrievalError(f"retrieval.url = {url!r}: not an http or https URL; write http://host:port")
        self.attempts = attempts
        self._client = httpx.Client(timeout=timeout)
        self._retrying = Retrying(
            retry=retry_if_exception_type(_PassingError),
            stop=stop_after_attempt(attempts),
            wait=wait_exponential_jitter(initial=0.2, max=10.0, jitter=0.2),
            retry_error_callback=self._give_up,
        )

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """See ``Retriever``; all queries go in one request."""
        if not queries:
            return []
        unique = list(dict.fromkeys(queries))  # siblings of one group often ask the same thing in the same turn
        results = self._retrying(self._ask, unique, topk)
        found = {
            query: [Passage.from_contents(str(hit.document.id), hit.document.contents) for hit in hits]
            for query, hits in zip(unique, results, strict=True)
        }
        return [list(found[query]) for query in queries]

    def probe(self) -> None:
        """Ask one query, so that a server that does not answer is found before any other work.

        Raises:
            RetrievalError: it does not answer, or not as it should.
        """
        self.search(["Who wrote Hamlet?"], 1)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _ask(self, queries: list[str], topk: int) -> list[list[_Hit]]:
        request = {"queries": queries, "topk": topk, "return_scores": True}
        try:
            response = self._client.post(self.url, json=request)
        except httpx.TransportError as error:
            raise _PassingError(f"{type(error).__name__}: {error}") from error
        except httpx.DecodingError as error:
            raise self._failed(f"an answer that cannot be decoded ({error})") from error
        if response.status_code == httpx.codes.TOO_MANY_REQUESTS or response.is_server_error:
            raise _PassingError(_status(response))
        if not response.is_success:
            raise self._failed(f"{_status(response)}; is it the address of a Search-R1 retrieval server?")
        return self._checked(response, len(queries), topk)

    def _checked(self, response: httpx.Response, queries: int, topk: int) -> list[list[_Hit]]:
        """The hits of an answer. One that is cut short or has other fields will be so again: it is not asked for again."""
        try:
            result = _Answer.model_validate_json(response.content).result
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "the answer"
            raise self._failed(f"not an answer of /retrieve ({where}: {problem['msg']})") from error
        if len(result) != queries:
            raise self._failed(f"{len(result)} results for {queries} queries")
        most = max(map(len, result))
        if most > topk:
            raise self._failed(f"{most} passages for a query where at most {topk} were asked for")
        return result

    def _give_up(self, state: RetryCallState) -> Any:
        assert state.outcome is not None
        cause = state.outcome.exception()
        raise self._failed(f"{cause}; is the server running?", state.attempt_number) from cause

    def _failed(self, cause: str, attempts: int = 1) -> RetrievalError:
        tries = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        return RetrievalError(f"{self.url}: no passages after {tries}: {cause}")


def _status(response: httpx.Response) -> str:
    return f"status {response.status_code} {response.reason_phrase}"
