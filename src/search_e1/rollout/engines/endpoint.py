"""An engine somewhere else: any server of OpenAI's ``/v1/chat/completions``. For evaluation and ``ask``, not for training.

An endpoint takes and gives text, so that nothing here knows which ids were sampled: those in a trajectory are places in a
list of words (``words.Words``). Observations are messages of their own: the user's under ``tags``, the tool's under
``tools``. That is what vLLM, llama.cpp and OpenAI all take; going on within an assistant's message, and prompts without a
chat template (``/v1/completions``), are not.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from search_e1.config import Prompts
from search_e1.rollout.engines.base import Generation, Request
from search_e1.rollout.engines.remote import RemoteEngine, api_url
from search_e1.rollout.engines.words import END, Words
from search_e1.text.tools import tools_of


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
    keys: str = "--endpoint, --endpoint-model"
    """Where the user gave `url` and `model`: for messages."""

    @property
    def address(self) -> str:
        """
        Raises:
            ConfigError: ``url`` is not an http or https URL, or holds a password.
        """
        return api_url(self.url, self.keys.split(",")[0], "/chat/completions") + "/chat/completions"


class EndpointEngine(RemoteEngine):
    """Samples from what an endpoint serves. A ``Engine`` of words, without log-probabilities; seeds are not sent."""

    context_length = sys.maxsize  # not known; a conversation that is too long for it ends as malformed

    def __init__(self, endpoint: Endpoint, prompts: Prompts) -> None:
        """
        Raises:
            ConfigError: the endpoint's URL is none, or the environment's key cannot be sent.
        """
        self.tokenizer = Words()
        self.endpoint = endpoint
        tools = tools_of(prompts)
        self._tools = [tool.schema for tool in tools] if prompts.protocol == "tools" else None
        names = "|".join((*(tool.name for tool in tools), "answer"))
        self._unclosed = re.compile(rf"<({names})>(?!.*</?(?:{names})>)", re.DOTALL)
        super().__init__(
            endpoint.address,
            timeout=endpoint.timeout,
            attempts=endpoint.attempts,
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
        text = _text(completion.choices[0], None if self._tools else self._unclosed)
        counted = completion.usage.completion_tokens if completion.usage else None
        return Generation(self.tokenizer.said(text, counted, payload["max_tokens"]))

    def _too_long(self) -> Generation:
        # That is this trajectory's end, and nobody else's.
        return Generation(self.tokenizer.said("", None, 1))


def _text(choice: _Choice, unclosed: re.Pattern[str] | None) -> str:
    """What a choice says, as a policy of ours would have said it. ``unclosed``: a tag that a stop string would close."""
    message, text = choice.message, choice.message.content or ""
    thought = message.reasoning_content or message.reasoning
    if thought:
        text = f"<think>\n{thought.strip()}\n</think>\n\n{text}"
    for call in message.tool_calls or ():
        text += f'<tool_call>\n{{"name": "{call.function.name}", "arguments": {call.function.arguments}}}\n</tool_call>'
    if choice.finish_reason == "length":
        return text
    if unclosed is None:
        return text + END
    opened = unclosed.search(text)  # servers leave the stop string out
    return f"{text}</{opened[1]}>" if opened else text
