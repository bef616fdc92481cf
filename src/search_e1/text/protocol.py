"""The environment speaks words: it reads an action's text and says what to answer it with.

A ``Protocol`` is all that differs between ways of writing searches and answers. ``Tags``, Search-R1's, is here;
``tools.ToolCalls`` is the chat template's own.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from search_e1.config import Prompts
from search_e1.text.prompts import (
    STOP_STRINGS,
    observation,
    passages_of,
    with_passages,
)
from search_e1.types import ActionKind, Passage

# The inner guards make a match start at the *last* opening tag before its closing one, and end at the first closing one.
ACTION = re.compile(r"<(search|answer)>((?:(?!<\1>|</(?:search|answer)>).)*)</\1>", re.DOTALL)
_TAG = re.compile(r"</?(?:think|search|answer)>")
_ARGUMENT = re.compile(r"<(search|answer)>(.*?)(?:</\1>|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Action:
    kind: ActionKind
    argument: str | None


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
    def observe(self, action: str, passages: Sequence[Passage], max_tokens: int) -> tuple[str, tuple[int, ...]]:
        """Text and ids, at most ``max_tokens``, of what a search is answered with; ``action`` is the text sampled before it.

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
        """Where the search or answer in an action begins; ``None`` if there is none."""

    @abstractmethod
    def passages(self, observation: str) -> list[str] | None:
        """The passages in the text of an observation, each with its new line; ``None`` if it holds none by its form."""

    @abstractmethod
    def with_passages(self, observation: str, passages: Sequence[str]) -> str:
        """The text of ``observation`` with ``passages`` in the place of its own."""


class Tags(Protocol):
    """Search-R1's: ``<search>``, ``<information>`` and ``<answer>`` in one long assistant turn."""

    stop = STOP_STRINGS

    def __init__(self, tokenizer: Any, prompts: Prompts) -> None:
        self._tokenizer = tokenizer
        self._correction = prompts.correction

    def parse(self, text: str) -> Action:
        return parse_action(text)

    def observe(self, action: str, passages: Sequence[Passage], max_tokens: int) -> tuple[str, tuple[int, ...]]:
        return observation(self._tokenizer, passages, max_tokens)

    def correct(self, action: str) -> tuple[str, tuple[int, ...]]:
        return self._correction, tuple(self._tokenizer.encode(self._correction, add_special_tokens=False))

    def spans(self, text: str) -> Iterator[Span]:
        for match in _ARGUMENT.finditer(text):
            yield Span(*match.span(2), "search" if match[1] == "search" else "answer")
        for match in _TAG.finditer(text):
            yield Span(*match.span(), "tag")

    def begins(self, text: str) -> int | None:
        match = ACTION.search(text)
        return match.start() if match else None

    def passages(self, observation: str) -> list[str] | None:
        return passages_of(observation)

    def with_passages(self, observation: str, passages: Sequence[str]) -> str:
        return with_passages(passages)


def parse_action(text: str) -> Action:
    """The first complete search or answer in the text of one generation.

    Text after the closing tag is ignored. A search without a query is malformed; an empty answer is an answer.
    """
    match = ACTION.search(text)
    if match is None:
        return MALFORMED
    kind, argument = ActionKind(match[1]), match[2].strip()
    if kind is ActionKind.SEARCH and not argument:
        return MALFORMED
    return Action(kind, argument)
