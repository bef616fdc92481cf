"""A remote engine: any server of OpenAI's ``/v1/chat/completions``. For evaluation and ``ask``, not for training.

An endpoint exchanges text, so the sampled ids are unknown: ids in a trajectory are indices into a list of words
(``words.Words``). Observations are separate messages, from the user under ``tags`` and from the tool under ``tools``. vLLM,
llama.cpp and OpenAI all support this, unlike continuing an assistant's message or prompts without a chat template
(``/v1/completions``).
"""

import json
import re
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import httpx
from pydantic import BaseModel, Field

from search_e1.config import Prompts
from search_e1.rollout.engines.base import Generation, Request
from search_e1.rollout.engines.remote import RemoteEngine, api_url
from search_e1.rollout.engines.words import END, Words
from search_e1.runs.http import read_json
from search_e1.text.prompts import neutralize
from search_e1.text.tools import tools_of
from search_e1.types import StopReason

_CHARS = 64  # per token of an action; longer text is cut
_MOST_CALLS = 16  # per message; more than one is malformed anyway


class _Function(BaseModel):
    name: str
    arguments: str | dict[str, Any]  # some servers send the object itself


class _Call(BaseModel):
    id: str | None = None
    function: _Function


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    completion_tokens: int | None = None


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1, max_length=16)]
    usage: _Usage | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    url: str
    """With or without a trailing `/v1` or `/v1/chat/completions`."""
    model: str
    """The server's name of the model."""
    timeout: float = 300.0
    """Seconds for one attempt of a request, up to the last byte of the answer."""
    attempts: int | None = None
    """Maximum attempts of a request; default: as many as ``time_limit`` allows."""
    time_limit: float = 600.0
    """Seconds for all attempts of a request, waits included."""
    concurrency: int = 8
    """Concurrent requests."""
    keys: str = "--endpoint, --endpoint-model"
    """The user's names of `url` and `model`, for messages."""

    @property
    def address(self) -> str:
        """
        Raises:
            ConfigError: ``url`` is not an http or https URL, or contains a password.
        """
        return str(api_url(self.url, self.keys.split(",")[0], "/chat/completions"))


class EndpointEngine(RemoteEngine):
    """Samples from an endpoint's model: an ``Engine`` over words, without log-probabilities; seeds are not sent."""

    context_length = sys.maxsize  # unknown; the server reports when a conversation is too long

    def __init__(self, endpoint: Endpoint, prompts: Prompts) -> None:
        """
        Raises:
            ConfigError: the endpoint's URL is invalid, or the API key cannot be sent.
        """
        self.tokenizer = Words()
        self.endpoint = endpoint
        tools = tools_of(prompts)
        self._protocol = prompts.protocol
        self._names = tuple(tool.name for tool in tools)
        self._tools = [tool.schema for tool in tools] if prompts.protocol == "tools" else None
        self._tag = re.compile(rf"<(/?)({'|'.join((*self._names, 'answer'))})>")
        super().__init__(
            httpx.URL(endpoint.address),
            timeout=endpoint.timeout,
            attempts=endpoint.attempts,
            time_limit=endpoint.time_limit,
            concurrency=endpoint.concurrency,
            check=endpoint.keys,
        )

    def _payload(self, request: Request, temperature: float, stop: Sequence[str]) -> dict[str, Any]:
        payload: dict[str, Any] = {"model": self.endpoint.model, "temperature": temperature}
        payload |= {"tools": self._tools} if self._tools else {"stop": list(stop)}
        return payload | {
            "messages": self.tokenizer.messages(request.prompt),
            "max_tokens": request.max_new_tokens,
        }

    def _read(self, content: bytes, payload: dict[str, Any]) -> Generation:
        completion = _Completion.model_validate_json(content)
        choice, most = completion.choices[0], payload["max_tokens"]
        message = choice.message
        if choice.finish_reason == "content_filter":
            return self._ended(StopReason.REFUSED, "finish_reason content_filter")
        if message.refusal and not message.content and not message.tool_calls:
            return self._ended(StopReason.REFUSED, self.server.hide(message.refusal[:_CHARS]))
        counted = completion.usage.completion_tokens if completion.usage else None
        return Generation(self.tokenizer.said(self._text(choice, _CHARS * most), counted, most))

    def _ended(self, stop: StopReason, words: str) -> Generation:
        return Generation(self.tokenizer.said("", None, 1), stop=stop, words=words)

    def _text(self, choice: _Choice, most: int) -> str:
        """A choice's text as a policy would have written it, at most ``most`` characters.

        Separate reasoning, and text beside separate tool calls, are neutralized: markup that they quote is not an action.
        """
        message, text = choice.message, ""
        thought = (message.reasoning_content or message.reasoning or "")[:most].strip()
        if thought:
            text = f"<think>\n{self._quoted(thought)}\n</think>\n\n"
        content = (message.content or "")[: most + 1].replace(END, "(end)")
        calls = (message.tool_calls or ()) if self._tools else ()
        text += self._quoted(content) if calls else content
        text += "".join(_written(_Call.model_validate(call)) for call in calls[:_MOST_CALLS])
        if len(text) > most or choice.finish_reason == "length":
            return text[:most]
        return text + END if self._tools else self._closed(text)

    def _quoted(self, text: str) -> str:
        return neutralize(self.tokenizer, text, self._protocol, tools=self._names)

    def _closed(self, text: str) -> str:
        """``text`` with the stop string, which servers omit."""
        last = next(iter(deque(self._tag.finditer(text), maxlen=1)), None)
        return f"{text}</{last[2]}>" if last and not last[1] else text


def _written(call: _Call) -> str:
    """A call as text, with the server's id; ``<`` is escaped, so that no argument can close the tag."""
    arguments = call.function.arguments
    try:
        text = json.dumps(read_json(arguments) if isinstance(arguments, str) else arguments, ensure_ascii=False)
    except ValueError:
        text = str(arguments)  # invalid JSON: kept as text, and malformed
    head = json.dumps(({"id": call.id} if call.id else {}) | {"name": call.function.name}, ensure_ascii=False)
    written = f'{head[:-1]}, "arguments": {text}}}'.replace("<", "\\u003c")
    return f"<tool_call>\n{written}\n</tool_call>"
