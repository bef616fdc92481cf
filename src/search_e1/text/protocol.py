"""Protocols: how actions are parsed from text, and how observations are written.

A ``Protocol`` holds everything that differs between formats of searches and answers. ``Tags``, Search-R1's format, is here;
``tool_calls.ToolCalls`` is the chat template's own format.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from search_e1.config import Prompts
from search_e1.text.prompts import observation, passages_of, with_passages
from search_e1.text.tools import SEARCH, tools_of
from search_e1.types import ActionKind, Passage


@dataclass(frozen=True, slots=True)
class Action:
    kind: ActionKind
    argument: str | None
    tool: str = ""
    """Name of the called tool, if not search."""

    @classmethod
    def calling(cls, tool: str, argument: str) -> "Action":
        return cls(ActionKind.SEARCH, argument) if tool == SEARCH.name else cls(ActionKind.TOOL, argument, tool)


MALFORMED = Action(ActionKind.MALFORMED, None)


class Span(NamedTuple):
    """Characters ``begin`` to ``end`` of an action, and their part. Characters outside all spans are thought."""

    begin: int
    end: int
    part: Literal["thought", "search", "answer", "tag"]


class Protocol(ABC):
    """Parses actions and writes observations: text in, text and ids out."""

    stop: tuple[str, ...]
    """Strings that end a generation, in addition to the model's end tokens."""

    @abstractmethod
    def parse(self, text: str) -> Action:
        """The action in the text of one generation."""

    @abstractmethod
    def write(self, thought: str, action: Action) -> str:
        """The text of a generation with ``thought`` and a well-formed ``action``, which ``parse`` recovers."""

    @abstractmethod
    def observe(self, action: str, answer: Sequence[Passage] | str, max_tokens: int) -> tuple[str, tuple[int, ...]]:
        """Text and ids (at most ``max_tokens``) of the observation after a call; ``action`` is the sampled text before it.

        Raises:
            ConfigError: an observation without passages exceeds ``max_tokens``.
        """

    @abstractmethod
    def correct(self, action: str) -> tuple[str, tuple[int, ...]]:
        """Text and ids of the correction after a malformed action."""

    @abstractmethod
    def spans(self, text: str) -> Iterator[Span]:
        """The parts of an action; a later span overrides an earlier one that overlaps."""

    @abstractmethod
    def begins(self, text: str) -> int | None:
        """Offset of the call or answer in an action; ``None`` if there is none."""

    @abstractmethod
    def passages(self, observation: str) -> list[str] | None:
        """The passages in the text of an observation, each with its newline; ``None`` if it does not have that form."""

    @abstractmethod
    def with_passages(self, observation: str, passages: Sequence[str]) -> str:
        """The text of ``observation`` with its passages replaced by ``passages``."""


class Tags(Protocol):
    """Search-R1's format: ``<search>``, ``<information>`` and ``<answer>`` in one assistant turn, plus a tag per other tool."""

    def __init__(self, tokenizer: Any, prompts: Prompts) -> None:
        self._tokenizer, self._correction = tokenizer, prompts.correction
        self._tools = tuple(tool.name for tool in tools_of(prompts))
        self.stop = tuple(f"</{name}>" for name in (*self._tools, "answer"))
        self._action, self._argument, self._tag = _patterns(self._tools)

    def parse(self, text: str) -> Action:
        return parse_action(text, self._tools)

    def write(self, thought: str, action: Action) -> str:
        name = action.tool or action.kind
        return f"<think> {thought}</think><{name}> {action.argument}</{name}>"

    def observe(self, action: str, answer: Sequence[Passage] | str, max_tokens: int) -> tuple[str, tuple[int, ...]]:
        return observation(self._tokenizer, answer, max_tokens, self._tools)

    def correct(self, action: str) -> tuple[str, tuple[int, ...]]:
        return self._correction, tuple(self._tokenizer.encode(self._correction, add_special_tokens=False))

    def spans(self, text: str) -> Iterator[Span]:
        for match in self._argument.finditer(text):
            yield Span(*match.span(2), "answer" if match[1] == "answer" else "search")
        for match in self._tag.finditer(text):
            yield Span(*match.span(), "tag")

    def begins(self, text: str) -> int | None:
        match = self._action.search(text)
        return match.start() if match else None

    def passages(self, observation: str) -> list[str] | None:
        return passages_of(observation)

    def with_passages(self, observation: str, passages: Sequence[str]) -> str:
        return with_passages(passages)


def parse_action(text: str, tools: tuple[str, ...] = (SEARCH.name,)) -> Action:
    """The first complete call or answer in the text of one generation.

    Text after the closing tag is ignored. A call without an argument is malformed; an empty answer is an answer.
    """
    match = _patterns(tools)[0].search(text)
    if match is None:
        return MALFORMED
    name, argument = match[1], match[2].strip()
    if name == "answer":
        return Action(ActionKind.ANSWER, argument)
    return Action.calling(name, argument) if argument else MALFORMED


@lru_cache(maxsize=16)
def _patterns(tools: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Patterns of a complete action, a possibly truncated action, and a tag."""
    name = "|".join((*tools, "answer"))
    return (
        # The lookaheads make a match start at the last opening tag before a closing one, and end at the first closing one.
        re.compile(rf"<({name})>((?:(?!<\1>|</(?:{name})>).)*)</\1>", re.DOTALL),
        re.compile(rf"<({name})>(.*?)(?:</\1>|\Z)", re.DOTALL),
        re.compile(rf"</?(?:think|{name})>"),
    )
