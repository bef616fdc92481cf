"""An answer and its sources: the passages that the policy read, and which of them hold the answer.

A passage holds an answer if the answer's words occur consecutively in the part of the passage that the policy read, matched as
in retrieval recall (``evaluation.recall``). An answer that no passage holds is a guess and counts as not found in the
documents; so does no answer. Yes and no are accepted without a passage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from search_e1.data.answers import word_spans
from search_e1.evaluation.recall import holds, patterns_of, words
from search_e1.runs.nfc import nfc
from search_e1.text.protocol import Protocol
from search_e1.types import ActionKind, Passage, Record, Trajectory, Turn

NOT_FOUND = "not found in these documents"


class Support(StrEnum):
    """How an answer is supported."""

    HELD = "held"
    """A passage that was read holds the answer."""
    YES_NO = "yes_no"
    """Yes or no, which no passage can hold."""
    GUESS = "guess"
    """No passage that was read holds the answer."""
    NONE = "none"
    """The policy gave no answer."""


def passage_json(passage: Passage) -> dict[str, Any]:
    """A passage as clients get it, flat: its metadata (origin), then id, title and text."""
    return {**passage.metadata, "id": passage.id, "title": passage.title, "text": passage.text}


class Source(Record):
    """A passage that was read."""

    passage: Passage
    """The passage in NFC, which the offsets in ``marks`` refer to."""
    query: str
    """The query that found it first."""
    turn: int
    """Index of that query's turn in the trajectory, from 0."""
    holds: bool
    """Whether the part that was read, title included, holds the answer."""
    marks: tuple[tuple[int, int], ...] = ()
    """Spans of the answer in ``passage.text``, in characters: start, and end (exclusive)."""

    def as_json(self) -> dict[str, Any]:
        """The passage (see ``passage_json``) with ``holds``, ``marks`` and ``query``."""
        marks = [list(mark) for mark in self.marks]
        return passage_json(self.passage) | {"holds": self.holds, "marks": marks, "query": self.query}


class Answer(Record):
    """The agent's answer to a question."""

    question: str
    text: str | None
    """The policy's answer; ``None`` if it gave none."""
    support: Support
    sources: tuple[Source, ...]
    """The passages that were read: those that hold the answer first, otherwise in reading order."""
    trajectory: Trajectory

    @property
    def found(self) -> bool:
        """Whether the documents support the answer; see ``Support``."""
        return self.support in (Support.HELD, Support.YES_NO)

    def __str__(self) -> str:
        return self.text if self.found and self.text is not None else NOT_FOUND

    def as_json(self) -> dict[str, Any]:
        """The answer without token ids, as ``ask --json`` and the server return it."""
        return {
            "question": self.question, "answer": self.text, "found": self.found, "support": self.support,
            "sources": [source.as_json() for source in self.sources],
            "searches": [turn.argument for turn in self.trajectory.turns if turn.kind is ActionKind.SEARCH],
            "stop_reason": self.trajectory.stop_reason, "sampled_tokens": self.trajectory.sampled_tokens,
        }  # fmt: skip


@dataclass(slots=True)
class Reading:
    """The passages that a trajectory has read so far; call ``answer`` when it has ended."""

    protocol: Protocol
    _read: dict[str, tuple[Passage, str, int, list[str]]] = field(default_factory=dict)
    """Passage id -> passage, the query that found it first, that query's turn, and the text read each time."""
    _turns: int = 0

    def add(self, turn: Turn, passages: Sequence[Passage]) -> list[Passage]:
        """Add a turn with the passages retrieved for it; returns those that were read at least in part."""
        shown = self.protocol.passages(turn.observation_text) or [] if passages else []
        read = list(zip(passages, shown, strict=False))  # the last ones may have been truncated away
        for passage, text in read:
            entry = self._read.setdefault(passage.id, (passage, turn.argument or "", self._turns, []))
            entry[3].append(text)
        self._turns += 1
        return [passage for passage, _ in read]

    def answer(self, question: str, trajectory: Trajectory) -> Answer:
        """The answer of ``trajectory``, all of whose turns were added."""
        found = patterns_of([trajectory.answer]) if trajectory.answer is not None else ()
        sources = [
            _source(passage, query, number, bool(found and holds(texts, found)), trajectory.answer or "")
            for passage, query, number, texts in self._read.values()
        ]
        return Answer(
            question=question, text=trajectory.answer, support=_support(trajectory.answer, sources),
            sources=tuple(sorted(sources, key=lambda source: not source.holds)), trajectory=trajectory,
        )  # fmt: skip


def _source(passage: Passage, query: str, turn: int, held: bool, answer: str) -> Source:
    plain = Passage(id=passage.id, title=nfc(passage.title), text=nfc(passage.text), metadata=passage.metadata)
    return Source(passage=plain, query=query, turn=turn, holds=held, marks=tuple(locate(plain.text, answer)) if held else ())


def _support(answer: str | None, sources: Sequence[Source]) -> Support:
    if answer is None:
        return Support.NONE
    if words(answer) in ("yes", "no"):
        return Support.YES_NO
    return Support.HELD if any(source.holds for source in sources) else Support.GUESS


def locate(text: str, answer: str) -> list[tuple[int, int]]:
    """Non-overlapping spans of the words of ``answer`` in ``text``, which is in NFC: start and end (exclusive) characters.

    Articles, case and anything between words are ignored; an answer without words has no span.
    """
    wanted, spans = words(answer).split(), word_spans(text)
    found, at = [], 0
    while wanted and at + len(wanted) <= len(spans):
        if [word for word, _, _ in spans[at : at + len(wanted)]] == wanted:
            found.append((spans[at][1], spans[at + len(wanted) - 1][2]))
            at += len(wanted)
        else:
            at += 1
    return found
