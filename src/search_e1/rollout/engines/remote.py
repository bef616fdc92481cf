"""Engines behind HTTP: concurrent requests with retries; answers are used and saved as they arrive."""

import json
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from typing import Any

import httpx
from pydantic import ValidationError

from search_e1.errors import ConfigError, EndpointError
from search_e1.rollout.engines.base import Generation, Interrupted, Request, never
from search_e1.rollout.unfinished import Answers
from search_e1.runs import sha256_text
from search_e1.runs.http import Reply, Server, TransientError, check_status, read_json, server_url
from search_e1.types import StopReason

API_KEY = "SEARCH_E1_API_KEY"
"""Environment variable of the API key. No other variable is read: one provider's key must not be sent to another."""
_RESPONSE_BYTES = 2**23
"""Size limit of one answer, far above the longest action."""
_MAX_REFUSALS = 8
"""Refusals before the first answer after which the session fails."""
_POLL = 0.5
"""Seconds between checks for a signal while waiting for answers."""

_OVERFLOW_CODES = {"context_length_exceeded", "exceed_context_size_error"}
_OVERFLOW = re.compile(
    r"maximum context length (?:is|of) \d|\d maximum context length|context length of only \d"  # vLLM, Mistral, LM Studio
    r"|context (?:size|length|window) (?:has been |was )?exceeded"
    r"|exceeds?(?: the| this)?(?: model's| available)?(?: maximum)? context (?:size|length|window)"  # llama.cpp, SGLang
    r"|longer than the model's context length|prompt is too long: \d|`inputs` tokens \+ `max_new_tokens` must be"  # TGI
    r"|token count .{0,40}exceeds the maximum number of tokens"
    r"|longer than the maximum model length of \d|too long to fit into the model \(context length \d"  # vLLM V1
    r"|max_tokens must be at least 1, got -\d"  # vLLM: nothing is left for an answer
    r"|exceed context limit: \d|maximum prompt length is \d|exceeded model token limit"  # Anthropic, xAI, Moonshot
    r"|range of input length should be|input is too long for requested model",  # DashScope, Bedrock
    re.IGNORECASE,
)
_REFUSED_CODES = {
    "content_filter", "ResponsibleAIPolicyViolation", "content_policy_violation", "moderation_blocked",
    "data_inspection_failed",
}  # fmt: skip
_REFUSED = re.compile(
    r"content management policy|content exists risk|flagged as potentially violating|access to this content for safety reasons"
    r"|may contain inappropriate content",
    re.IGNORECASE,
)
_FINAL_CODES = {"insufficient_quota"}
"""Error codes that are final even if their HTTP status is retried."""

logger = logging.getLogger(__name__)


class RemoteEngine(ABC):
    """An ``Engine`` over an HTTP server, one request per generation. Close ``server`` after use, unless the process ends."""

    tokenizer: Any
    context_length: int

    def __init__(
        self, url: httpx.URL, *, timeout: float, attempts: int | None, time_limit: float, concurrency: int, check: str
    ) -> None:
        """See ``Server``. ``check``: what the user should check if the server refuses.

        Raises:
            ConfigError: the API key cannot be sent.
        """
        self._check, self._path = check, url.path
        self._answered, self._refusals = False, 0
        self.server = Server(
            url, EndpointError, what="answer", timeout=timeout, time_limit=time_limit, most_bytes=_RESPONSE_BYTES,
            concurrency=concurrency, attempts=attempts, headers=key_headers(),
        )  # fmt: skip

    @abstractmethod
    def _payload(self, request: Request, temperature: float, stop: Sequence[str]) -> dict[str, Any]:
        """The body of the request."""

    @abstractmethod
    def _read(self, content: bytes, payload: dict[str, Any]) -> Generation:
        """The generation in an answer. Raises ValidationError or LookupError if there is none."""

    @abstractmethod
    def _ended(self, stop: StopReason, words: str) -> Generation:
        """A generation for a refused request: the context is too long, or the content filter blocked it."""

    @contextmanager
    def session(self, *, temperature: float, stop: Sequence[str], max_tokens: int) -> Iterator["_RemoteSession"]:
        """See ``Engine.session``.

        Raises:
            EndpointError: on exit, if all requests were refused.
        """
        session = _RemoteSession(self, temperature, stop)
        try:
            yield session
        finally:
            session.cancel()
        if self._refusals and not self._answered and not session.interrupted():
            raise self._all_refused()

    def _understood(self, reply: Reply, payload: dict[str, Any]) -> Generation:
        """The generation for a reply, including refusals."""
        if reply.ok:
            try:
                generation = self._read(reply.content, payload)
            except (ValidationError, LookupError) as error:
                raise not_an_answer(reply, self._path) from error
        elif stop := _stop_reason(reply):
            generation = self._ended(stop, reply.words)
        else:
            raise refusal(reply, self.server.shown, self._check)
        if generation.stop is None:
            self._answered = True
            return generation
        self._refusals += 1
        self._words = generation.words
        if self._refusals >= _MAX_REFUSALS and not self._answered:
            raise self._all_refused()
        return generation

    def _all_refused(self) -> EndpointError:
        return EndpointError(
            f"{self.server.shown}: all requests so far ({self._refusals}) were refused: {self._words}; check {self._check}"
        )


class _RemoteSession:
    """A ``Session`` of concurrent requests, which continue while the caller does other work."""

    interrupted = staticmethod(never)
    admission_interval = 1

    def __init__(self, engine: RemoteEngine, temperature: float, stop: Sequence[str]) -> None:
        self._engine, self._temperature, self._stop = engine, temperature, stop
        self._answers = Answers(None)
        self._in_flight: set[Future[tuple[int, Generation]]] = set()

    def keep(self, answers: Answers) -> None:
        """Use saved answers instead of requests, and save new answers as they arrive."""
        self._answers = answers
        self._engine._answered |= answers.begun

    def submit(self, request: Request) -> None:
        """See ``Session``."""
        self._in_flight.add(self._engine.server.submit(self._request(request)))

    def step(self) -> list[tuple[int, Generation]]:
        """See ``Session``: waits until at least one request is answered.

        Raises:
            EndpointError: the server gives no valid answer within its time limit.
        """
        while not (done := wait(self._in_flight, timeout=_POLL, return_when=FIRST_COMPLETED).done):
            if self.interrupted():
                raise Interrupted
        self._in_flight -= done
        return sorted((future.result() for future in done), key=lambda answered: answered[0])

    def release(self, key: int) -> None:
        """Does nothing: no state is kept per row."""

    def begun(self) -> dict[int, Generation]:
        """Empty: a server returns whole answers only."""
        return {}

    def cancel(self) -> None:
        for future in self._in_flight:
            future.cancel()

    async def _request(self, request: Request) -> tuple[int, Generation]:
        engine = self._engine
        temperature = self._temperature if request.temperature is None else request.temperature
        payload = engine._payload(request, temperature, self._stop)
        asked = sha256_text(json.dumps([payload, request.seed]))
        if (content := self._answers.get(asked)) is not None:
            return request.key, engine._read(content, payload)

        def read(reply: Reply) -> Generation:
            generation = engine._understood(reply, payload)
            if generation.stop is None:
                self._answers.put(asked, reply.content)
            return generation

        return request.key, await engine.server.ask(read, payload, early=not engine._answered)


def not_an_answer(reply: Reply, path: str) -> TransientError:
    """A success that is no answer of the API at ``path``: one bad server of several, or an error sent as a success."""
    words = reply.words.partition(" (")[2]
    return TransientError(f"not an answer of {path}{words and f' ({words}'}")


def refusal(reply: Reply, shown: str, check: str) -> EndpointError:
    """A final refusal. ``shown``: the server's URL; ``check``: what the user should check.

    Raises:
        TransientError: the refusal may pass.
    """
    if not _codes(reply.content) & _FINAL_CODES:
        check_status(reply)
    return EndpointError(f"{shown}: {reply.words}; check {check} and {API_KEY}")


def key_headers() -> dict[str, str]:
    """The authorization header with the environment's API key.

    Raises:
        ConfigError: the key contains characters that cannot be sent.
    """
    key = os.environ.get(API_KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{API_KEY}: holds characters that a key cannot have; set it again")
    return {"Authorization": f"Bearer {key}"} if key else {}


def api_url(url: str, key: str, resource: str) -> httpx.URL:
    """The URL of an OpenAI-compatible API's ``resource``, under ``/v1`` if ``url`` has no path. ``key``: its config key.

    Raises:
        ConfigError: ``url`` is not an http or https URL, or contains a password.
    """
    parsed = server_url(url, key, resource, "/v1")
    if parsed.userinfo:
        raise ConfigError(f"{key}: a password in the URL would be stored; put the key into {API_KEY}")
    return parsed


def _stop_reason(reply: Reply) -> StopReason | None:
    """The stop reason if a refusal concerns this trajectory only; else ``None``."""
    codes = _codes(reply.content)
    if codes & _OVERFLOW_CODES or _OVERFLOW.search(reply.reason):
        return StopReason.MAX_TOKENS
    return StopReason.REFUSED if codes & _REFUSED_CODES or _REFUSED.search(reply.reason) else None


def _codes(content: bytes) -> set[str]:
    """The codes and types of an error, in the forms of OpenAI and Azure, llama.cpp and vLLM."""
    try:
        decoded = read_json(content)
    except ValueError:
        return set()
    error = decoded.get("error", decoded) if isinstance(decoded, dict) else None
    inner = error.get("innererror") if isinstance(error, dict) else None
    named = [found.get(name) for found in (error, inner) if isinstance(found, dict) for name in ("code", "type")]
    return {name for name in named if isinstance(name, str)}
