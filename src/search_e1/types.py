"""The records that flow through the system: question -> trajectory -> group -> pair.

All are frozen, check their invariants when they are made, and go to JSON and back
(``record.model_dump_json()``, ``Record.model_validate_json(line)``).
"""

from enum import StrEnum
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Record(BaseModel):
    """Base of all records: immutable, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Question(Record):
    """A question and every answer that counts as right."""

    id: str = Field(min_length=1)
    text: str = Field(min_length=1)
    answers: tuple[str, ...] = Field(min_length=1)
    benchmark: str = ""
    hops: int | None = None
    metadata: dict[str, Any] = {}


class Passage(Record):
    """A piece of the corpus. ``contents`` is the corpus convention: the title in quotes, a new line, the text."""

    id: str
    title: str
    text: str

    @property
    def contents(self) -> str:
        return f'"{self.title}"\n{self.text}'

    @classmethod
    def from_contents(cls, id: str, contents: str) -> Self:
        """The inverse of ``contents``; without a new line all of it is text."""
        head, newline, text = contents.partition("\n")
        title = head[1:-1] if len(head) > 1 and head[0] == head[-1] == '"' else head
        return cls(id=id, title=title, text=text) if newline else cls(id=id, title="", text=head)


class ActionKind(StrEnum):
    SEARCH = "search"
    ANSWER = "answer"
    MALFORMED = "malformed"


class StopReason(StrEnum):
    """Why a trajectory ended. All but ``ANSWERED`` score zero."""

    ANSWERED = "answered"
    MAX_TURNS = "max_turns"  # the last generation asked for one more search
    MAX_TOKENS = "max_tokens"  # no room for another token
    MALFORMED = "malformed"  # the last generation was neither a search nor an answer


class Turn(Record):
    """One action of the policy and what the environment inserted after it.

    ``action_ids`` are the ids exactly as they were sampled; text after the closing tag within the same token
    belongs to them. ``observation_ids`` were inserted and carry no loss; they are empty on the last turn.
    """

    action_ids: tuple[int, ...] = Field(min_length=1)
    action_text: str
    kind: ActionKind
    argument: str | None = None
    """The query of a search, the text of an answer, ``None`` if malformed."""
    observation_ids: tuple[int, ...] = ()
    observation_text: str = ""
    passage_ids: tuple[str, ...] = ()
    sampling_logprobs: tuple[float, ...] | None = None
    """Of ``action_ids`` under the generator that sampled them, at the sampling temperature."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind is ActionKind.MALFORMED) != (self.argument is None):
            raise ValueError(f"a {self.kind} action with argument {self.argument!r}")
        if self.sampling_logprobs is not None and len(self.sampling_logprobs) != len(self.action_ids):
            raise ValueError(f"{len(self.sampling_logprobs)} sampling_logprobs for {len(self.action_ids)} action_ids")
        if self.kind is ActionKind.ANSWER and self.observation_ids:
            raise ValueError("an observation after an answer")
        if self.passage_ids and self.kind is not ActionKind.SEARCH:
            raise ValueError("passages without a search")
        return self

    @property
    def served(self) -> bool:
        """Whether this is a search that was answered with passages."""
        return self.kind is ActionKind.SEARCH and bool(self.observation_ids)


class Trajectory(Record):
    """What one rollout left behind: prompt, turns, and how it ended."""

    question_id: str
    prompt_ids: tuple[int, ...] = Field(min_length=1)
    turns: tuple[Turn, ...]
    stop_reason: StopReason
    answer: str | None = None
    reward: float = 0.0
    """Exact match of the answer, 0 or 1. Never overwritten by an advantage."""
    f1: float = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.stop_reason is StopReason.ANSWERED) != (self.answer is not None):
            raise ValueError(f"stop_reason {self.stop_reason} with answer {self.answer!r}")
        if self.reward and self.answer is None:
            raise ValueError("a reward without an answer")
        if any(turn.kind is ActionKind.ANSWER for turn in self.turns[:-1]):
            raise ValueError("a turn after an answer")
        if self.turns and self.turns[-1].observation_ids:
            raise ValueError("an observation that nothing follows")
        return self

    @property
    def response_ids(self) -> tuple[int, ...]:
        """All ids after the prompt: the actions as sampled, each followed by its observation."""
        return tuple(i for turn in self.turns for ids in (turn.action_ids, turn.observation_ids) for i in ids)

    @property
    def action_mask(self) -> tuple[int, ...]:
        """As long as ``response_ids``: 1 where the policy sampled the id, 0 where it was inserted."""
        return tuple(m for turn in self.turns for m in (1,) * len(turn.action_ids) + (0,) * len(turn.observation_ids))

    @property
    def text(self) -> str:
        """The response as text, for people and for privileged prompts; never encoded for training on it."""
        return "".join(turn.action_text + turn.observation_text for turn in self.turns)

    @property
    def searches(self) -> int:
        return sum(turn.served for turn in self.turns)

    @property
    def sampled_tokens(self) -> int:
        return sum(len(turn.action_ids) for turn in self.turns)

    @property
    def correct(self) -> bool:
        return self.reward > 0


class Group(Record):
    """The trajectories of one question."""

    question: Question
    trajectories: tuple[Trajectory, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        strangers = {t.question_id for t in self.trajectories} - {self.question.id}
        if strangers:
            raise ValueError(f"trajectories of {sorted(strangers)} in the group of {self.question.id!r}")
        return self

    @property
    def reference(self) -> Trajectory | None:
        """The correct trajectory with the fewest searches (ties: fewest sampled tokens, then the first), if any."""
        correct = [t for t in self.trajectories if t.correct]
        return min(correct, key=lambda t: (t.searches, t.sampled_tokens), default=None)


class Pair(Record):
    """A reference (correct, efficient) and the sibling that is to learn from it."""

    question: Question
    reference: Trajectory
    student: Trajectory
    reference_shown: str | None = None
    """What the teacher sees of the reference, if that is not all of it; empty: nothing."""
    shortened: bool = False
    """Passages of the reference were cut so that the teacher's prompt fits."""
    mismatched: bool = False
    """The reference is another question's, on purpose."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.reference.correct:
            raise ValueError("a reference that is not correct")
        own = self.reference.question_id == self.question.id
        if self.student.question_id != self.question.id or own is self.mismatched:
            raise ValueError("a pair across questions")
        return self

    @property
    def shown(self) -> str:
        """What the teacher sees of the reference: the same text when the lead is measured and when it is distilled."""
        return self.reference.text if self.reference_shown is None else self.reference_shown
