"""Token classes: the part of an action that each token belongs to."""

from enum import StrEnum
from typing import Any

from search_e1.config import Prompts
from search_e1.text.protocols import protocol_of
from search_e1.types import Turn


class TokenClass(StrEnum):
    """The part of an action that a sampled token belongs to."""

    THOUGHT = "thought"
    SEARCH = "search"  # the query
    ANSWER = "answer"
    TAG = "tag"  # a protocol tag or an end token: the choice of the action, and its end


def token_classes(tokenizer: Any, turn: Turn, prompts: Prompts | None = None) -> list[TokenClass]:
    """The class of each id of an action.

    Each id is decoded separately, and tags are searched in the joined pieces, so that every character belongs to one id. An id
    is a ``TAG`` if it is a special token or any of its characters is in a tag. Otherwise it has the class of its first
    character: inside ``<search>`` or ``<answer>`` (up to the end, if not closed), else ``THOUGHT``. An id that decodes to
    nothing is a ``THOUGHT``.
    """
    decode = {i: tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in set(turn.action_ids)}
    pieces = [decode[i] for i in turn.action_ids]
    text = "".join(pieces)
    labels = [TokenClass.THOUGHT] * len(text)
    for begin, end, part in protocol_of(tokenizer, prompts or Prompts()).spans(text):
        labels[begin:end] = [TokenClass(part)] * (end - begin)
    special = set(tokenizer.all_special_ids)
    classes: list[TokenClass] = []
    at = 0
    for i, piece in zip(turn.action_ids, pieces, strict=True):
        covered = labels[at : at + len(piece)] or [TokenClass.THOUGHT]
        classes.append(TokenClass.TAG if i in special or TokenClass.TAG in covered else covered[0])
        at += len(piece)
    return classes
