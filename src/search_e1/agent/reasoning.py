"""Separates a policy's reasoning from its answer while the text is being sampled."""

import re

from search_e1.text.protocol import Protocol
from search_e1.types import ActionKind, Turn

_BEGUN_TAG = re.compile(r"<[^<>]*\Z")


class Reasoning:
    """Passes on the text of actions up to the answer, each piece as soon as it is certain not to belong to the answer."""

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol
        # Endings that would turn the text so far into an answer: its closing tag, or the end of the message.
        self._ends = [end for end in protocol.stop if "answer" in end] or list(protocol.stop)
        self._text, self._told = "", 0

    def feed(self, piece: str) -> str:
        """Add the sampled ``piece``; returns the text that is now certain to be reasoning."""
        self._text += piece
        begun = _BEGUN_TAG.search(self._text)
        sure = begun.start() if begun else len(self._text)
        for end in self._ends:
            begins = self._protocol.begins(self._text + end)
            sure = sure if begins is None else min(sure, begins)
        return self._upto(sure if self._ends else 0)

    def turn(self, turn: Turn, said: str | None = None) -> str:
        """Complete the action; returns the rest of its reasoning. ``said``: its text, if it was not fed."""
        self._text = self._text if said is None else said
        begins = self._protocol.begins(turn.action_text) if turn.kind is ActionKind.ANSWER else None
        rest = self._upto(len(self._text) if begins is None else begins)
        self._text, self._told = "", 0
        return rest

    def _upto(self, end: int) -> str:
        piece = self._text[self._told : end]
        self._told = max(self._told, min(end, len(self._text)))
        return piece
