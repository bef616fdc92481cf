"""The environment speaks words: it reads an action's text and says what to answer it with.

A ``Protocol`` is all that differs between ways of writing searches and answers. ``Tags``, Search-R1's, is here;
``tool_calls.ToolCalls`` is the chat template's own.
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
    """Name of the tool that is called, if it is another than search."""

    @classmethod
    def calling(cls, tool: str, argument: str) -> "Action":
        return cls(ActionKind.SEARCH, argument) if tool == SEARCH.name else cls(ActionKind.TOOL, argument, tool)


MALFORMED = Action(ActionKind.MALFORMED, None)


class Span(NamedTuple):
    """Characters ``begin`` to ``end`` of an action, and what they are part of. Where nothing is, there is thought."""

    begin: int
    end: int
    part: Literal["thought", "search", "answer", "tag"]


class Protocol(ABC):
    """How a policy says what it does, and how it is answered. Everything here is text in, ids and text out."""

    stop: tuple[str, ...]
    """Strings that end a generation, beside the end tokens of the model."""

    @abstractmethod
    def parse(self, text: str) -> Action:
        """What the text of one generation says."""

    @abstractmethod
    def write(self, thought: str, action: Action) -> str:
        """The text of a generation that thinks ``thought`` and does ``action``, which is not malformed: ``parse`` reads it."""

    @abstractmethod
    def observe(self, action: str, answer: Sequence[Passage] | str, max_tokens: int) -> tuple[str, tuple[int, ...]]:
        """Text and ids, at most ``max_tokens``, of what a call is answered with; ``action`` is the text sampled before it.

        Raises:
            ConfigError: ``max_tokens`` has no room for an observation without passages.
        """

    @abstractmethod
    def correct(self, action: str) -> tuple[str, tuple[int, ...]]:
        """Text and ids of what a malformed action is answered with."""

    @abstractmethod
    def spans(self, text: str) -> Iterator[Span]:
        """The parts of an action; of spans that overlap the later one counts."""

    @abstractmethod
    def begins(self, text: str) -> int | None:
        """Where the call or answer in an action begins; ``None`` if there is none."""

    @abstractmethod
    def passages(self, observation: str) -> list[str] | None:
        """The passages in the text of an observation, each with its new line; ``None`` if it holds none by its form."""

    @abstractmethod
    def with_passages(self, observation: str, passages: Sequence[str]) -> str:
        """The text of ``observation`` with ``passages`` in the place of its own."""


class Tags(Protocol):
    """Search-R1's: ``<search>``, ``<information>`` and ``<answer>`` in one long assistant turn; other tools have other tags."""

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
    """A whole action, an action that may be cut off, and a tag."""
    name = "|".join((*tools, "answer"))
    return (
        # The guards make a match start at the last opening tag before a closing one, and end at the first closing one.
        re.compile(rf"<({name})>((?:(?!<\1>|</(?:{name})>).)*)</\1>", re.DOTALL),
        re.compile(rf"<({name})>(.*?)(?:</\1>|\Z)", re.DOTALL),
        re.compile(rf"</?(?:think|{name})>"),
    )
