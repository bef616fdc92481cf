"""OpenAI's chat completions, as far as they apply to an agent that answers one question: request and response objects."""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from search_e1.agent.answer import Answer, passage_json
from search_e1.agent.queue import Event
from search_e1.serving.refusals import Refused
from search_e1.types import ActionKind, Passage, StopReason

_REASONS = {StopReason.MAX_TOKENS: "length", StopReason.REFUSED: "content_filter"}
_SEED = 9223372036854776000
"""Largest seed in OpenAI's schema."""
_TOOLS = "the agent has its own tools and accepts no others"
_SAMPLING = "it samples as in its evaluation, by temperature and seed alone"
_TEXT = "it answers in text only"
_ONLY: dict[str, tuple[list[Any], str]] = {
    "n": ([1], "there is one answer to a question"),
    "top_p": ([1], _SAMPLING),
    "frequency_penalty": ([0], _SAMPLING),
    "presence_penalty": ([0], _SAMPLING),
    "logit_bias": ([{}], _SAMPLING),
    "logprobs": ([False], "it reports none"),
    "top_logprobs": ([0], "it reports none"),
    "stop": ([[]], "it stops once it has answered"),
    "reasoning_effort": ([], "it reasons as it was trained to"),
    "verbosity": ([], _TEXT),
    "prediction": ([], _SAMPLING),
    "tools": ([[]], _TOOLS),
    "functions": ([[]], _TOOLS),
    "tool_choice": (["none", "auto"], _TOOLS),
    "function_call": (["none", "auto"], _TOOLS),
    "parallel_tool_calls": ([True, False], _TOOLS),
    "web_search_options": ([], _TOOLS),
    "response_format": ([{"type": "text"}], _TEXT),
    "modalities": ([["text"]], _TEXT),
    "audio": ([], _TEXT),
}
"""Parameter without effect -> its accepted values (besides null), and why others are refused."""
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)
    type: str
    text: str | None = None


class _Message(BaseModel):
    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Any = None


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Padding of OpenAI's streams; not implemented here."""


class _Own(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    reasoning: bool = True


_Whole = Annotated[int, BeforeValidator(lambda n: int(n) if isinstance(n, float) and n.is_integer() else n)]
"""An integer; 1.0 counts as one, as in JSON."""


class ChatRequest(BaseModel):
    """Body of ``POST /v1/chat/completions``; ``parse`` checks the rest."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    model: str
    messages: list[_Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    seed: _Whole | None = Field(None, ge=-_SEED, le=_SEED)
    max_tokens: _Whole | None = Field(None, ge=1)
    max_completion_tokens: _Whole | None = Field(None, ge=1)
    search_e1: _Own | None = None

    @property
    def most(self) -> int | None:
        """Maximum number of tokens to sample."""
        return min((n for n in (self.max_tokens, self.max_completion_tokens) if n is not None), default=None)

    def question(self, most_chars: int) -> str:
        """The user's last message.

        Raises:
            Refused: it is missing, empty, longer than ``most_chars``, or contains something other than text.
        """
        number = max((i for i, message in enumerate(self.messages) if message.role == "user"), default=None)
        if number is None:
            raise Refused(400, "messages: no message of the role user, so there is no question", param="messages")
        param = f"messages[{number}].content"
        content = self.messages[number].content
        text = content if isinstance(content, str) else "".join(_texts(content, param))
        if not text.strip():
            raise Refused(400, f"{param}: the question is empty", param=param)
        if len(text) > most_chars:
            message = f"{param}: a question of {len(text)} characters; this server accepts {most_chars}"
            raise Refused(400, message, param=param, code="context_length_exceeded")
        return text


def parse(body: bytes, model: str) -> ChatRequest:
    """Parse a request to the agent called ``model``.

    Raises:
        Refused: it is invalid, names another model, or requests something that the agent does not support.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        message = " ".join(f"{where}: {problem['msg']}".removeprefix(": ").split())
        raise Refused(400, message, param=where or None) from error
    for name, value in (request.model_extra or {}).items():
        if value is None or name in _IGNORED:
            continue
        if name not in _ONLY:
            raise Refused(
                400, f"{name[:100]}: unknown to this server; leave it out", param=name[:100], code="unknown_parameter"
            )
        allowed, why = _ONLY[name]
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            raise Refused(400, f"{name}: {why}; leave it out", param=name, code="unsupported_parameter")
    if request.stream_options and not request.stream:
        raise Refused(400, "stream_options: only with stream = true", param="stream_options")
    if request.model != model:
        message = f"model: no model {request.model[:100]!r} here, only {model!r}"
        raise Refused(404, message, param="model", code="model_not_found")
    return request


def _texts(content: Any, param: str) -> Iterator[str]:
    if not isinstance(content, list):
        raise Refused(400, f"{param}: neither a text nor a list of parts", param=param)
    for i, part in enumerate(content):
        try:
            found = _Part.model_validate(part)
        except ValidationError as error:
            raise Refused(400, f"{param}[{i}]: not a part of a message", param=f"{param}[{i}]") from error
        if found.type != "text" or found.text is None:
            what = f"a part of type {found.type[:40]!r}" if found.type != "text" else "a text part without its text"
            raise Refused(400, f"{param}[{i}]: {what}; a question is text", param=f"{param}[{i}]")
        yield found.text


@dataclass(slots=True)
class Completion:
    """Builds the response objects of one request."""

    model: str
    base: str
    """URL of the server, without a trailing slash."""
    not_read: int
    """Number of messages in the request besides the question."""
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer, reasoning: str | None) -> dict[str, Any]:
        """The ``chat.completion`` object."""
        message: dict[str, Any] = {
            "role": "assistant",
            "content": str(answer),
            "refusal": None,
            "annotations": self._annotations(answer),
        }
        message |= {"search_e1": self._own(answer)} | ({} if reasoning is None else {"reasoning_content": reasoning})
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _reason(answer)}
        return self._head("chat.completion") | {"choices": [choice], "usage": usage(answer)}

    def first(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""})

    def reasoning(self, piece: str) -> dict[str, Any]:
        return self._chunk({"reasoning_content": piece})

    def turn(self, event: Event) -> dict[str, Any] | None:
        """The chunk for an answered search or other tool call; ``None`` for other turns."""
        assert not isinstance(event, str)
        turn, passages = event
        read = [self.origin(passage) for passage in passages]
        if turn.kind is ActionKind.SEARCH and turn.served:
            return self._chunk({"search_e1": {"search": {"query": turn.argument, "passages": read}}})
        if turn.kind is ActionKind.TOOL:
            call = {"tool": turn.tool, "argument": turn.argument, "passages": read}
            return self._chunk({"search_e1": {"call": call}})
        return None

    def last(self, answer: Answer) -> list[dict[str, Any]]:
        """The chunks of the answer and the end."""
        end = {"annotations": self._annotations(answer), "search_e1": {"answer": self._own(answer)}}
        return [self._chunk({"content": str(answer)}), self._chunk(end, _reason(answer))]

    def used(self, answer: Answer) -> dict[str, Any]:
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage(answer)}

    def origin(self, passage: Passage) -> dict[str, Any]:
        """A passage without its text."""
        return {key: value for key, value in passage_json(passage).items() if key != "text"} | {"url": self.url(passage)}

    def url(self, passage: Passage) -> str:
        """The passage's own URL if it has one, else its URL on this server."""
        own = passage.metadata.get("url")
        if isinstance(own, str) and own.lower().startswith(("http://", "https://")):  # never `javascript:`
            return own
        return f"{self.base}/passages/{quote(passage.id, safe='')}"

    def _own(self, answer: Answer) -> dict[str, Any]:
        return answer.as_json() | {"not_read": self.not_read}

    def _annotations(self, answer: Answer) -> list[dict[str, Any]]:
        end = len(str(answer))
        held: Sequence[Passage] = [source.passage for source in answer.sources if source.holds]
        return [
            {
                "type": "url_citation",
                "url_citation": {"start_index": 0, "end_index": end, "title": passage.title, "url": self.url(passage)},
            }
            for passage in held
        ]

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._head("chat.completion.chunk") | {"choices": [choice]}


def usage(answer: Answer) -> dict[str, int]:
    """Token counts: all tokens that the policy read (prompt and observations), and all that it sampled."""
    trajectory = answer.trajectory
    read = len(trajectory.prompt_ids) + sum(len(turn.observation_ids) for turn in trajectory.turns)
    sampled = trajectory.sampled_tokens
    return {"prompt_tokens": read, "completion_tokens": sampled, "total_tokens": read + sampled}


def _reason(answer: Answer) -> str:
    return _REASONS.get(answer.trajectory.stop_reason, "stop")


def schema(model: str, most_chars: int) -> dict[str, Any]:
    """OpenAPI schema of the request, without anything that is refused."""
    text = {"type": "string", "pattern": r"\S", "maxLength": most_chars}
    part = {"type": "object", "properties": {"type": {"const": "text"}, "text": text}, "required": ["type", "text"]}
    asked = {
        "type": "object",
        "properties": {
            "role": {"const": "user"},
            "content": {"anyOf": [text, {"type": "array", "items": part, "minItems": 1, "maxItems": 1}]},
        },
        "required": ["role", "content"],
    }
    whole = {"type": ["integer", "null"], "minimum": 1}
    properties: dict[str, Any] = {
        "model": {"const": model},
        "messages": {"type": "array", "minItems": 1, "items": asked},
        "stream": {"type": ["boolean", "null"]},
        "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 2},
        "seed": {"type": ["integer", "null"], "minimum": -_SEED, "maximum": _SEED},
        "max_tokens": whole,
        "max_completion_tokens": whole,
        "search_e1": {
            "type": ["object", "null"],
            "properties": {"reasoning": {"type": "boolean"}},
            "additionalProperties": False,
        },
    }
    properties |= {name: {"enum": [None, *allowed]} for name, (allowed, _) in _ONLY.items()}
    properties |= {name: {} for name in _IGNORED}
    body = {"type": "object", "properties": properties, "required": ["model", "messages"], "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}}
