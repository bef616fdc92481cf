"""Renders a reference for the teacher's prompt within its token budget; the same text in replay, lead and distillation.

Actions are rendered verbatim to the last character: a reference that ends differently from trajectories would make the teacher
end differently. If the whole reference does not fit, passages are cut, never actions or tags; if that is not enough, the result
is ``None``, and the caller counts it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from search_e1.config import Prompts, ReferenceConfig
from search_e1.text.prompts import privileged_prompt
from search_e1.text.protocol import Protocol
from search_e1.text.protocols import protocol_of
from search_e1.types import ActionKind, Trajectory

_ACTIONS = {
    "searches": (ActionKind.SEARCH, ActionKind.TOOL),
    "searches_and_answer": (ActionKind.SEARCH, ActionKind.TOOL, ActionKind.ANSWER),
    "answer": (ActionKind.ANSWER,),
    "none": (),
}


class RenderedReference(NamedTuple):
    """The reference as the teacher sees it."""

    text: str
    prompt_ids: tuple[int, ...]
    """The privileged prompt with the text."""
    shortened: bool = False
    """Whether passages were cut."""


def render_reference(
    tokenizer: Any, prompts: Prompts, question: str, reference: Trajectory, config: ReferenceConfig, budget: int
) -> RenderedReference | None:
    """``reference`` rendered for the teacher's prompt; ``None`` if the prompt cannot fit into ``budget`` tokens."""
    protocol = protocol_of(tokenizer, prompts)

    def encode(text: str) -> tuple[int, ...]:
        return privileged_prompt(tokenizer, prompts, question, text)

    text = visible_part(reference, config, protocol)
    ids = encode(text)
    if len(ids) <= budget:
        return RenderedReference(text, ids)
    if config.shows != "whole" or config.shorten == "never":
        return None
    shorten = _fewer_passages if config.shorten == "passages" else _shorter_passages
    shorter = shorten(protocol, reference, lambda text: len(encode(text)) <= budget)
    return None if shorter is None else RenderedReference(shorter, encode(shorter), shortened=True)


def prompt_budget(config: ReferenceConfig, context_length: int, response: int) -> int:
    """Tokens left for the teacher's prompt before a response of ``response`` tokens."""
    return min(context_length, config.max_tokens or context_length) - response


def visible_part(reference: Trajectory, config: ReferenceConfig, protocol: Protocol) -> str:
    """The part that ``config.shows`` names: the whole text, or only the actions, verbatim from their tag, one per line."""
    if config.shows == "whole":
        return reference.text
    kinds = _ACTIONS[config.shows]
    texts = [turn.action_text for turn in reference.turns if turn.kind in kinds]
    actions = [text[begin:] for text in texts if (begin := protocol.begins(text)) is not None]
    return "".join(action.rstrip("\n") + "\n" for action in actions[:-1]) + "".join(actions[-1:])


def _render(protocol: Protocol, reference: Trajectory, passages: Sequence[Sequence[str] | None]) -> str:
    return "".join(
        turn.action_text + (turn.observation_text if kept is None else protocol.with_passages(turn.observation_text, kept))
        for turn, kept in zip(reference.turns, passages, strict=True)
    )


def _fewer_passages(protocol: Protocol, reference: Trajectory, fits: Callable[[str], bool]) -> str | None:
    """Drop lowest-ranked passages until it fits: each time the last of the observation with the most (ties: the first)."""
    passages = [protocol.passages(turn.observation_text) for turn in reference.turns]
    while longest := max(filter(None, passages), key=len, default=None):
        longest.pop()
        if fits(text := _render(protocol, reference, passages)):
            return text
    return None


def _shorter_passages(protocol: Protocol, reference: Trajectory, fits: Callable[[str], bool]) -> str | None:
    """Cut all passages to their first n words, with the largest n that fits; the heading stays."""
    passages = [protocol.passages(turn.observation_text) for turn in reference.turns]

    def cut(words: int) -> str:
        return _render(protocol, reference, [kept and [_first_words(passage, words) for passage in kept] for kept in passages])

    most = max((len(passage.split()) for kept in passages for passage in kept or ()), default=0)
    if not fits(cut(0)):
        return None
    low, high = 0, most  # `low` fits, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(cut(middle)) else (low, middle)
    return cut(low)


def _first_words(passage: str, count: int) -> str:
    heading, closing, text = passage.partition(") ")
    return " ".join([heading + closing.strip(), *text.split()[:count]]) + "\n"
