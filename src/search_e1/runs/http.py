"""The only HTTP client, for retrieval servers and model endpoints. Responses are never trusted.

An attempt has a time limit, from connecting to the last byte, and a size limit on its body, both compressed and decompressed.
Text is read as UTF-8, whatever the charset header. Retries wait as long as the server asks, within the request's time limit. A
server's error text is shown in one line, without the secrets that were sent to it.
"""

import asyncio
import base64
import functools
import logging
import math
import os
import re
import threading
import zlib
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic_core import from_json
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type
from tenacity.stop import stop_after_attempt, stop_base, stop_before_delay
from tenacity.wait import wait_exponential_jitter

from search_e1.errors import ConfigError, SearchE1Error
from search_e1.runs.safe import HIDDEN, masked, masked_url, plain, secrets_of

_EARLY_ATTEMPTS = 4
"""Attempts before any work has begun, when the address may be wrong."""
_CONNECT_SECONDS = 10.0
_LONG_WAIT = 10.0
"""A wait of at least so many seconds is announced."""
_WORDS = 200
"""Maximum characters of a server's error text in a message."""
_SHORTEST_SECRET = 4
_UNMISTAKABLE = 12
"""Minimum length of a secret that is also masked in answers; a shorter one may be an ordinary word."""
_PASSING = (408, 409, 425, 429)

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class TransientError(Exception):
    """A failure that may pass: no connection, a timeout, an overloaded or restarting server, one bad server of several."""

    def __init__(self, cause: str, retry_after: float = 0.0) -> None:
        super().__init__(cause)
        self.retry_after = retry_after
        """Seconds that the server asks clients to wait."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete response."""

    status: int
    headers: httpx.Headers
    content: bytes
    words: str
    """Status, and the reason of an error if it states one: one line without secrets."""

    @property
    def reason(self) -> str:
        """The stated reason of an error, longer than in ``words`` and as it was sent; empty if there is none."""
        return _reason(self.content, error=not self.ok)[: 10 * _WORDS]

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


def server_url(url: str, key: str, resource: str, base: str = "") -> httpx.URL:
    """The URL of ``resource`` at ``url``, which may already end in it. A ``url`` without a path gets ``base``.

    Raises:
        ConfigError: not an http or https URL; ``key`` names it.
    """
    try:
        parsed = httpx.URL(url.strip())
    except (httpx.InvalidURL, UnicodeError):
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"{key} = {masked_url(url)!r}: not an http or https URL; write http://host:port")
    path = parsed.path.rstrip("/").removesuffix(resource).rstrip("/")
    return parsed.copy_with(path=(path or base) + resource, fragment=None)


def read_json(content: bytes | str) -> Any:
    """
    Raises:
        ValueError: not JSON in UTF-8, or nested too deeply.
    """
    return from_json(content)


class Server:
    """Client of one server. Thread-safe, except for coroutines on its event loop, where all requests run.

    On one event loop, a whole request can have a deadline whatever the server does, and shared state needs no lock. The loop
    has its own thread, so that requests proceed while their sender does something else.
    """

    def __init__(
        self,
        url: httpx.URL,
        error: type[SearchE1Error],
        *,
        what: str,
        timeout: float,
        time_limit: float,
        most_bytes: int,
        concurrency: int,
        attempts: int | None = None,
        headers: Mapping[str, str] | None = None,
        remedy: str = "",
    ) -> None:
        """
        Args:
            error: raised when a request fails.
            what: what is missing then, for its message.
            timeout: seconds per attempt.
            time_limit: seconds for all attempts of a request, waits included.
            most_bytes: size limit of a body.
            concurrency: maximum requests in flight.
            attempts: maximum per request; by default as many as ``time_limit`` allows.
            remedy: added to the message after a timeout.
        """
        self.shown = masked(str(url))
        """The URL without secrets."""
        self._auth = (url.username, url.password) if url.userinfo else None
        self._url = url.copy_with(username=None, password=None)  # httpx logs it
        self._error, self._what, self._remedy = error, what, remedy
        self._timeout, self._time_limit, self._most_bytes = timeout, time_limit, most_bytes
        self._concurrency, self._headers = concurrency, dict(headers or {})
        self._secrets = _secrets(url, self._headers)
        self._stop: stop_base = stop_before_delay(time_limit)
        if attempts:
            self._stop |= stop_after_attempt(attempts)
        self.retrying = AsyncRetrying(
            retry=retry_if_exception_type(TransientError),
            stop=self._stop,
            wait=_wait_seconds,
            before_sleep=self._report,
            retry_error_callback=self._give_up,
        )
        self._is_down = self._is_limited = False
        self._lock = threading.Lock()
        self._process: int | None = None

    def submit(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Run ``work`` on the event loop, which is started if necessary."""
        with self._lock:
            if self._process != os.getpid():  # new, closed, or forked: a child process does not inherit threads
                self._start()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Cancel the requests in flight and close the connections; later work opens new ones."""
        with self._lock:
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

    async def ask(self, read: Callable[[Reply], Result], payload: Any = None, *, early: bool = False) -> Result:
        """POST ``payload`` as JSON (GET without one), and return ``read`` of the response. Runs only on the event loop.

        ``read`` gets successes and refusals; if it raises TransientError, the request is sent again.
        ``early``: give up after a few attempts, unless the server asks to wait.

        Raises:
            SearchE1Error: the constructor's ``error``, if there is no answer within the limits of attempts and time.
        """
        # A copy, since tenacity keeps a call's state in the object.
        retrying = self.retrying.copy(stop=self._stop | _Early()) if early else self.retrying.copy()
        async with self._turns:
            # Starts with the first attempt, not before tenacity's own clock, so that tenacity has stopped by the deadline.
            deadline = functools.cache(lambda: self._loop.time() + self._time_limit)
            result: Result = await retrying(self._ask_once, read, payload, deadline)
            return result

    def failure(self, cause: str, attempts: int = 1) -> SearchE1Error:
        tries = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        return self._error(f"{self.shown}: no {self._what} after {tries}: {self.hide(cause)}")

    def hide(self, text: str) -> str:
        """The server's ``text`` as one printable line, without the secrets that were sent to it."""
        line = " ".join(plain("".join(c if c.isprintable() else " " for c in text)).split())
        for secret in self._secrets:
            line = line.replace(secret, HIDDEN)
        return line

    def _start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._turns = asyncio.Semaphore(self._concurrency)
        self._client = httpx.AsyncClient(
            auth=self._auth,
            headers={"Accept-Encoding": "gzip"} | self._headers,
            timeout=httpx.Timeout(None, connect=min(self._timeout, _CONNECT_SECONDS)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=self._concurrency, keepalive_expiry=30.0),
            # Environment proxies do not apply to localhost.
            trust_env=self._url.host not in ("localhost", "127.0.0.1", "::1"),
        )
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"client of {self._url.host}", daemon=True)
        self._thread.start()
        self._process = os.getpid()

    async def _shut_down(self) -> None:
        for task in (tasks := asyncio.all_tasks() - {asyncio.current_task()}):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    async def _ask_once(self, read: Callable[[Reply], Result], payload: Any, deadline: Callable[[], float]) -> Result:
        reply = await self._send(payload, min(self._timeout, deadline() - self._loop.time()))
        result = read(reply)
        if self._is_down:
            self._is_down = False
            logger.warning("%s answers again", self.shown)
        return result

    async def _send(self, payload: Any, seconds: float) -> Reply:
        method, body = ("GET", {}) if payload is None else ("POST", {"json": payload})
        try:
            # httpx's own timeouts are per read: a server that sends slowly would never reach them.
            async with asyncio.timeout(seconds), self._client.stream(method, self._url, **body) as response:
                content = await self._body(response)
        except TimeoutError:
            raise TransientError(f"no answer within {seconds:.3g} s{self._remedy}") from None
        except zlib.error as error:
            raise TransientError(f"a body that cannot be decompressed: {error}") from None
        except httpx.HTTPError as error:
            raise TransientError(self.hide(f"{type(error).__name__}: {error}") + "; is the server running?") from None
        for secret in self._secrets:
            if len(secret) >= _UNMISTAKABLE:
                content = content.replace(secret.encode(), HIDDEN.encode())
        return Reply(response.status_code, response.headers, content, self._words(response.status_code, content))

    def _words(self, status: int, content: bytes) -> str:
        words = f"status {status} {httpx.codes.get_reason_phrase(status)}".strip()
        reason = self.hide(_reason(content, error=not 200 <= status < 300))
        return words if not reason or words.endswith(reason) else f"{words} ({reason[:_WORDS]})"

    async def _body(self, response: httpx.Response) -> bytes:
        """The decompressed body. httpx decompresses a chunk whatever size it reaches; here both sizes are bounded."""
        coding = response.headers.get("Content-Encoding", "").strip().lower()
        unpack = zlib.decompressobj(wbits=47) if coding in ("gzip", "x-gzip", "deflate") else None  # 47: gzip or zlib
        content, received = bytearray(), 0
        async for part in response.aiter_raw():
            received += len(part)
            if not unpack:
                content += part
            elif not unpack.eof:
                content += unpack.decompress(part, self._most_bytes + 1 - len(content))
            if max(received, len(content)) > self._most_bytes:
                raise self.failure(f"a response of more than {self._most_bytes >> 20} MiB; is it the right server?")
        if unpack and received and not unpack.eof:
            raise zlib.error("the compressed body is truncated")
        return bytes(content)

    def _report(self, state: RetryCallState) -> None:
        """Warn once per outage, after a few attempts or before a long wait: a waiting stage looks like a hung one."""
        error = state.outcome.exception() if state.outcome else None
        seconds = state.next_action.sleep if state.next_action else 0.0
        if getattr(error, "retry_after", 0.0):  # the server is up, and may answer other requests meanwhile
            if seconds >= _LONG_WAIT and not self._is_limited:
                self._is_limited = True
                logger.warning(
                    "%s: %s; waiting %.0f s as requested, now and whenever it asks again", self.shown, error, seconds
                )
        elif (state.attempt_number >= _EARLY_ATTEMPTS or seconds >= _LONG_WAIT) and not self._is_down:
            self._is_down = True
            logger.warning("%s: %s; retrying for up to %g s", self.shown, error, self._time_limit)

    def _give_up(self, state: RetryCallState) -> Any:
        error = state.outcome.exception() if state.outcome else None
        asked = getattr(error, "retry_after", 0.0)
        late = asked > self._time_limit - (state.seconds_since_start or 0.0)
        wait = f"; it asks to wait {asked:.0f} s, longer than the limit of {self._time_limit:g} s" if late else ""
        raise self.failure(f"{error}{wait}", state.attempt_number) from None


def check_status(reply: Reply) -> None:
    """
    Raises:
        TransientError: the status is temporary.
    """
    if reply.status in _PASSING or reply.status >= 500:
        raise TransientError(reply.words, _retry_after(reply.headers))


class _Early(stop_base):
    """Stops after a few attempts, unless the server is up and asks to wait."""

    def __call__(self, state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        return state.attempt_number >= _EARLY_ATTEMPTS and not getattr(error, "retry_after", 0.0)


_backoff = wait_exponential_jitter(initial=0.2, max=10.0, jitter=0.2)


def _wait_seconds(state: RetryCallState) -> float:
    """Seconds to wait: grows with each attempt, and is at least what the server asks for."""
    error = state.outcome.exception() if state.outcome else None
    return max(_backoff(state), getattr(error, "retry_after", 0.0))


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds of the ``Retry-After`` header, a number or a date; 0 without it."""
    value = headers.get("Retry-After", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value).astimezone(UTC) - datetime.now(UTC)).total_seconds()
        except (ValueError, OverflowError):
            return 0.0
    return 0.0 if math.isnan(seconds) else max(0.0, seconds)


def _reason(content: bytes, error: bool) -> str:
    """The reason that a refusal states: text, or JSON in the forms of OpenAI, vLLM and FastAPI; empty if it states none.

    Some servers send an error with status 200. Without ``error``, content is parsed only if it begins like an error.
    """
    if not error and not re.match(rb'\s*\{\s*"error"', content):
        return ""
    try:
        told = read_json(content)
    except ValueError:
        text = content[: 10 * _WORDS].decode("utf-8", "replace").strip()
        return "" if text.startswith(("<", "{", "[")) else text
    for name in ("error", "message", "detail"):
        told = told.get(name, told) if isinstance(told, dict) else told
    return told if isinstance(told, str) else ""


def _secrets(url: httpx.URL, headers: Mapping[str, str]) -> list[str]:
    """The secrets in ``url`` and ``headers``, longest first, in every form that a server can send back."""
    plain_text = {*secrets_of(str(url)), *(value.removeprefix("Bearer ") for value in headers.values())}
    if url.userinfo:
        plain_text |= {url.password or url.username, base64.b64encode(f"{url.username}:{url.password}".encode()).decode()}
    forms = {form for text in plain_text for form in (text, quote(text, safe=""), quote(text))}
    return sorted((form for form in forms if len(form) >= _SHORTEST_SECRET), key=len, reverse=True)
