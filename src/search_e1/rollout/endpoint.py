"""A generator somewhere else: any server of OpenAI's ``/v1/chat/completions``. For evaluation and ``ask``, not for training.

An endpoint takes and gives text, so that nothing here knows which ids were sampled: those in a trajectory are places in a
list of words (``words.Words``). Observations are messages of their own: the user's under ``tags``, the tool's under
``tools``. That is what vLLM, llama.cpp and OpenAI all take; going on within an assistant's message, and prompts without a
chat template (``/v1/completions``), are not.
"""

import asyncio
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import BaseModel, ValidationError
from tenacity import AsyncRetrying, RetryError, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from search_e1.errors import ConfigError, EndpointError
from search_e1.prompts import SEARCH_TOOL, Prompts
from search_e1.rollout.generator import Generation, Request
from search_e1.rollout.words import END, Words

API_KEY = "SEARCH_E1_API_KEY"
"""Environment variable of the key that is sent. No other is: a key of one provider is not for another."""
_OPEN = re.compile(r"<(search|answer)>(?!.*</?(?:search|answer)>)", re.DOTALL)


class _Function(BaseModel):
    name: str
    arguments: str


class _Call(BaseModel):
    function: _Function


class _Message(BaseModel):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    completion_tokens: int | None = None


class _Completion(BaseModel):
    choices: list[_Choice]
    usage: _Usage | None = None


class _PassingError(Exception):
    """Something that may pass."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    url: str
    """With or without `/v1`, or `/v1/chat/completions`, at its end."""
    model: str
    """As the server names it."""
    timeout: float = 300.0
    """Seconds for one try of a request, to the last byte of its answer."""
    attempts: int = 4
    concurrency: int = 8
    """Requests under way together."""

    @property
    def address(self) -> str:
        """
        Raises:
            ConfigError: ``url`` is not an http or https URL, or holds a password.
        """
        try:
            parsed = httpx.URL(self.url.strip())
        except httpx.InvalidURL as error:
            raise ConfigError(f"--endpoint {self.url!r}: {error}; write http://host:port/v1") from error
        if parsed.userinfo:
            raise ConfigError(f"--endpoint: a password in the URL would be stored; put the key into {API_KEY}")
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"--endpoint {self.url!r}: not an http or https URL; write http://host:port/v1")
        path = parsed.path.rstrip("/").removesuffix("/chat/completions")
        return str(parsed.copy_with(path=(path or "/v1") + "/chat/completions", query=None, fragment=None))


class EndpointGenerator:
    """Samples from what an endpoint serves. A ``Generator`` of words, without log-probabilities."""

    context_length = sys.maxsize  # not known; a conversation that is too long for it ends as malformed

    def __init__(self, endpoint: Endpoint, prompts: Prompts) -> None:
        """
        Raises:
            ConfigError: the endpoint's URL is none, or the environment's key cannot be sent.
        """
        self.tokenizer = Words()
        self.endpoint = endpoint
        self.address = endpoint.address
        self._tools = [SEARCH_TOOL] if prompts.protocol == "tools" else None
        key = os.environ.get(API_KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"{API_KEY}: holds characters that no key has; set it again")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._retrying = AsyncRetrying(
            retry=retry_if_exception_type(_PassingError),
            stop=stop_after_attempt(endpoint.attempts),
            wait=wait_exponential_jitter(initial=0.5, max=20.0),
        )

    @contextmanager
    def session(self, *, temperature: float, stop: Sequence[str], max_tokens: int) -> Iterator["_Conversations"]:
        """See ``Generator.session``. At most ``endpoint.concurrency`` requests at a time; seeds are not sent."""
        request: dict[str, Any] = {"model": self.endpoint.model, "temperature": temperature}
        request |= {"tools": self._tools} if self._tools else {"stop": list(stop)}
        # A proxy from the environment is never meant for this machine.
        elsewhere = httpx.URL(self.address).host not in ("localhost", "127.0.0.1", "::1")
        client = httpx.AsyncClient(headers=self._headers, timeout=None, trust_env=elsewhere)
        with asyncio.Runner() as runner:
            try:
                yield _Conversations(self, runner, client, request)
            finally:
                runner.run(client.aclose())

    async def _answer(self, client: httpx.AsyncClient, request: dict[str, Any]) -> Generation:
        try:
            # A copy: an object of tenacity keeps the state of one call.
            generation: Generation = await self._retrying.copy()(self._ask, client, request)
        except RetryError as error:
            cause, tries = error.last_attempt.exception(), error.last_attempt.attempt_number
            raise EndpointError(f"{self.address}: no answer after {tries} attempts: {cause}") from cause
        return generation

    async def _ask(self, client: httpx.AsyncClient, request: dict[str, Any]) -> Generation:
        try:
            # Of httpx's own limits each is for one read: a server that drips would never reach it.
            async with asyncio.timeout(self.endpoint.timeout):
                response = await client.post(self.address, json=request)
        except TimeoutError as error:
            raise _PassingError(f"nothing within {self.endpoint.timeout:g} s") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _PassingError(f"{type(error).__name__}: {error}; is the server running?") from error
        status = f"status {response.status_code}{_detail(response)}"
        if response.status_code in (408, 409, 425, 429) or response.is_server_error:
            raise _PassingError(status)
        if response.status_code in (400, 413, 422) and "context" in response.text:
            # The conversation is longer than the model's context. That is this trajectory's end, and nobody else's.
            return Generation(self.tokenizer.said("", None, 1))
        if not response.is_success:
            raise EndpointError(f"{self.address}: {status}; check --endpoint, --endpoint-model and {API_KEY}")
        try:
            completion = _Completion.model_validate_json(response.content)
            choice = completion.choices[0]
        except (ValidationError, IndexError) as error:
            raise _PassingError("not an answer of /v1/chat/completions") from error
        text = _text(choice, with_end=self._tools is not None)
        counted = completion.usage.completion_tokens if completion.usage else None
        return Generation(self.tokenizer.said(text, counted, request["max_tokens"]))


class _Conversations:
    """A ``Session``: requests under way."""

    pace = 1

    def __init__(
        self, generator: EndpointGenerator, runner: asyncio.Runner, client: httpx.AsyncClient, request: dict[str, Any]
    ) -> None:
        self._generator, self._runner, self._client, self._request = generator, runner, client, request
        self._turns = asyncio.Semaphore(generator.endpoint.concurrency)
        self._under_way: set[asyncio.Task[tuple[int, Generation]]] = set()

    def submit(self, request: Request) -> None:
        """See ``Session``."""
        self._under_way.add(self._runner.get_loop().create_task(self._one(request)))

    def step(self) -> list[tuple[int, Generation]]:
        """See ``Session``: waits until at least one request is answered.

        Raises:
            EndpointError: the endpoint does not answer, or not as it should, after ``endpoint.attempts`` tries.
        """
        done, self._under_way = self._runner.run(self._some())
        return sorted(task.result() for task in done)

    def release(self, key: int) -> None:
        """Nothing is kept."""

    async def _some(self) -> tuple[set[asyncio.Task[Any]], set[asyncio.Task[Any]]]:
        return await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)

    async def _one(self, request: Request) -> tuple[int, Generation]:
        async with self._turns:
            messages = self._generator.tokenizer.messages(request.prompt)
            conversation = self._request | {"messages": messages, "max_tokens": request.max_new_tokens}
            return request.key, await self._generator._answer(self._client, conversation)


def _text(choice: _Choice, *, with_end: bool) -> str:
    """What a choice says, as a policy of ours would have said it."""
    message, text = choice.message, choice.message.content or ""
    thought = message.reasoning_content or message.reasoning
    if thought:
        text = f"<think>\n{thought.strip()}\n</think>\n\n{text}"
    for call in message.tool_calls or ():
        text += f'<tool_call>\n{{"name": "{call.function.name}", "arguments": {call.function.arguments}}}\n</tool_call>'
    if choice.finish_reason == "length":
        return text
    if with_end:
        return text + END
    opened = _OPEN.search(text)  # servers leave the stop string out
    return f"{text}</{opened[1]}>" if opened else text


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
