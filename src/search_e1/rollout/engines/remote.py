"""Engines behind HTTP: concurrent requests with retries, answers as they arrive."""

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
from pydantic import ValidationError
from tenacity import AsyncRetrying, RetryError, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from search_e1.errors import ConfigError, EndpointError
from search_e1.rollout.engines.base import Generation, Request, never

API_KEY = "SEARCH_E1_API_KEY"
"""Environment variable of the key that is sent. No other is: a key of one provider is not for another."""


class _PassingError(Exception):
    """Something that may pass."""


class RemoteEngine(ABC):
    """A ``Engine`` that asks an HTTP server, one request a generation."""

    tokenizer: Any
    context_length: int

    def __init__(self, address: str, *, timeout: float, attempts: int, concurrency: int, check: str) -> None:
        """``timeout``: seconds for one try of a request, to the last byte of its answer. ``concurrency``: requests under way
        together. ``check``: what the user had best look at when the server refuses.

        Raises:
            ConfigError: the environment's key cannot be sent.
        """
        self.address = address
        self._timeout, self._concurrency, self._check = timeout, concurrency, check
        key = os.environ.get(API_KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"{API_KEY}: holds characters that no key has; set it again")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._retrying = AsyncRetrying(
            retry=retry_if_exception_type(_PassingError),
            stop=stop_after_attempt(attempts),
            wait=wait_exponential_jitter(initial=0.5, max=20.0),
        )

    @abstractmethod
    def _payload(self, request: Request, temperature: float, stop: Sequence[str]) -> dict[str, Any]:
        """The body of the request."""

    @abstractmethod
    def _read(self, content: bytes, payload: dict[str, Any]) -> Generation:
        """The answer's. Raises ValidationError or LookupError if it is none."""

    @abstractmethod
    def _too_long(self) -> Generation:
        """Stands for what would not fit into the context that the server's model has."""

    @contextmanager
    def session(self, *, temperature: float, stop: Sequence[str], max_tokens: int) -> Iterator["_UnderWay"]:
        """See ``Engine.session``."""
        # A proxy from the environment is never meant for this machine.
        elsewhere = httpx.URL(self.address).host not in ("localhost", "127.0.0.1", "::1")
        client = httpx.AsyncClient(headers=self._headers, timeout=None, trust_env=elsewhere)
        with asyncio.Runner() as runner:
            try:
                yield _UnderWay(self, runner, client, temperature, stop)
            finally:
                runner.run(client.aclose())

    async def _answer(self, client: httpx.AsyncClient, payload: dict[str, Any]) -> Generation:
        try:
            # A copy: an object of tenacity keeps the state of one call.
            generation: Generation = await self._retrying.copy()(self._ask, client, payload)
        except RetryError as error:
            cause, tries = error.last_attempt.exception(), error.last_attempt.attempt_number
            raise EndpointError(f"{self.address}: no answer after {tries} attempts: {cause}") from cause
        return generation

    async def _ask(self, client: httpx.AsyncClient, payload: dict[str, Any]) -> Generation:
        try:
            # Of httpx's own limits each is for one read: a server that drips would never reach it.
            async with asyncio.timeout(self._timeout):
                response = await client.post(self.address, json=payload)
        except TimeoutError as error:
            raise _PassingError(f"nothing within {self._timeout:g} s") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _PassingError(f"{type(error).__name__}: {error}; is the server running?") from error
        status = f"status {response.status_code}{_detail(response)}"
        if response.status_code in (408, 409, 425, 429) or response.is_server_error:
            raise _PassingError(status)
        if response.status_code in (400, 413, 422) and "context" in response.text:
            return self._too_long()
        if not response.is_success:
            raise EndpointError(f"{self.address}: {status}; check {self._check} and {API_KEY}")
        try:
            return self._read(response.content, payload)
        except (ValidationError, LookupError) as error:
            raise _PassingError(f"not an answer of {httpx.URL(self.address).path}") from error


class _UnderWay:
    """A ``Session``: requests under way."""

    interrupted = staticmethod(never)
    admission_interval = 1

    def __init__(
        self,
        engine: RemoteEngine,
        runner: asyncio.Runner,
        client: httpx.AsyncClient,
        temperature: float,
        stop: Sequence[str],
    ) -> None:
        self._engine, self._runner, self._client = engine, runner, client
        self._temperature, self._stop = temperature, stop
        self._turns = asyncio.Semaphore(engine._concurrency)
        self._under_way: set[asyncio.Task[tuple[int, Generation]]] = set()

    def submit(self, request: Request) -> None:
        """See ``Session``."""
        self._under_way.add(self._runner.get_loop().create_task(self._one(request)))

    def step(self) -> list[tuple[int, Generation]]:
        """See ``Session``: waits until at least one request is answered.

        Raises:
            EndpointError: the server does not answer, or not as it should, after as many tries as it may have.
        """
        done, self._under_way = self._runner.run(self._some())
        return sorted(task.result() for task in done)

    def release(self, key: int) -> None:
        """Nothing is kept."""

    def begun(self) -> dict[int, Generation]:
        """A server tells whole answers only."""
        return {}

    async def _some(self) -> tuple[set[asyncio.Task[Any]], set[asyncio.Task[Any]]]:
        return await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)

    async def _one(self, request: Request) -> tuple[int, Generation]:
        async with self._turns:
            payload = self._engine._payload(request, self._temperature, self._stop)
            return request.key, await self._engine._answer(self._client, payload)


def api_url(url: str, key: str, resource: str) -> str:
    """The base of an OpenAI-compatible API, ``/v1`` where ``url`` has no path. ``key`` names ``url`` in messages; ``resource``
    is dropped from its end.

    Raises:
        ConfigError: not an http or https URL, or one with a password.
    """
    try:
        parsed = httpx.URL(url.strip())
    except httpx.InvalidURL as error:
        raise ConfigError(f"{key} {url!r}: {error}; write http://host:port") from error
    if parsed.userinfo:
        raise ConfigError(f"{key}: a password in the URL would be stored; put the key into {API_KEY}")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"{key} {url!r}: not an http or https URL; write http://host:port")
    path = parsed.path.rstrip("/").removesuffix(resource)
    return str(parsed.copy_with(path=path or "/v1", query=None, fragment=None))


def _detail(response: httpx.Response) -> str:
    """What the server says of its refusal, in one line of printable text."""
    try:
        told = response.json()
        told = told.get("error", told)
        told = told.get("message", told) if isinstance(told, dict) else told
    except (ValueError, AttributeError):
        return ""
    line = "".join(c if c.isprintable() else " " for c in str(told))
    return f" ({' '.join(line.split())[:200]})"
