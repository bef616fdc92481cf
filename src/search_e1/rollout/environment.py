"""The environment: answers the tool calls of a rollout, batched per tool."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from search_e1.config import Prompts, RolloutConfig
from search_e1.errors import RetrievalError
from search_e1.retrieval.base import Retriever
from search_e1.text.protocol import Protocol
from search_e1.text.tools import Call, Handler, tools_of
from search_e1.types import Passage


class ToolCall(NamedTuple):
    """An action that calls a tool."""

    tool: str
    call: Call
    action_text: str


class Observation(NamedTuple):
    """The observation after a call."""

    fields: dict[str, Any]
    """Fields of the turn."""
    passages: Sequence[Passage]


class Environment:
    """Answers calls with observations."""

    def __init__(self, retriever: Retriever, protocol: Protocol, prompts: Prompts, config: RolloutConfig) -> None:
        """
        Raises:
            ConfigError: a tool does not exist, or the retriever does not support it.
        """
        self._protocol, self._max_tokens = protocol, config.max_observation_tokens
        self._handlers: Mapping[str, Handler] = {t.name: t.open(retriever, config.topk) for t in tools_of(prompts)}

    def answer(self, calls: Sequence[ToolCall]) -> list[Observation]:
        """The observation of each call.

        Raises:
            RetrievalError: from the retriever, or a tool did not answer all of its calls.
        """
        observations: dict[int, Observation] = {}
        for name, handler in self._handlers.items():
            indices = [i for i, call in enumerate(calls) if call.tool == name]
            answers = handler([calls[i].call for i in indices]) if indices else ()
            if len(answers) != len(indices):
                raise RetrievalError(f"tool {name!r}: {len(answers)} results for {len(indices)} calls")
            for i, answer in zip(indices, answers, strict=True):
                text, ids = self._protocol.observe(calls[i].action_text, answer, self._max_tokens)
                passages = () if isinstance(answer, str) else answer
                seen = tuple(passage.id for passage in passages)
                fields = dict(observation_text=text, observation_ids=ids, passage_ids=seen)
                observations[i] = Observation(fields, passages)
        return [observations[i] for i in range(len(calls))]
