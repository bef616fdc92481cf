"""The records that flow through the system: question -> trajectory -> group -> pair -> sample.

All are frozen, validate their invariants on construction, and round-trip through JSON
(``record.model_dump_json()``, ``Record.model_validate_json(line)``).
"""

import json
from collections.abc import Iterator, Mapping
from enum import StrEnum
from html import escape
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Record(BaseModel):
    """Base of all records: immutable, rejects unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


_ReprArgs = Iterator[tuple[str, Any]]
"""Names and values that ``repr`` shows instead of the fields, to keep token ids off the screen."""
_MAX_REPR_CHARS = 60


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= _MAX_REPR_CHARS else f"{text[:_MAX_REPR_CHARS]}..."


class Question(Record):
    """A question and every answer that counts as correct; no answers only if the question is unanswerable."""

    id: str = Field(min_length=1)
    text: str = Field(min_length=1)
    answers: tuple[str, ...]
    benchmark: str = ""
    hops: int | None = None
    metadata: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check_answers(self) -> Self:
        if not self.answers and not self.unanswerable:
            raise ValueError("a question needs an answer, or metadata.unanswerable = true")
        return self

    @property
    def unanswerable(self) -> bool:
        """Whether the metadata says that the corpus holds no answer. In a run, ``rollout.rewards.not_found`` is correct."""
        return self.metadata.get("unanswerable") is True

    def __repr_args__(self) -> _ReprArgs:
        more = f"and {len(self.answers) - 3} more"
        yield from (("id", self.id), ("text", _short(self.text)))
        yield "answers", self.answers if len(self.answers) <= 3 else (*self.answers[:3], more)
        yield from ((name, value) for name, value in (("benchmark", self.benchmark), ("hops", self.hops)) if value)


def _texts(metadata: Any) -> Any:
    """Metadata with values other than strings and integers as JSON, nulls dropped; empty if not a mapping."""
    return {
        str(key): value if isinstance(value, str) or type(value) is int else json.dumps(value, ensure_ascii=False, default=str)
        for key, value in (metadata.items() if isinstance(metadata, Mapping) else ())
        if value is not None
    }


class Passage(Record):
    """A piece of the corpus. ``contents`` is the corpus convention: the title in quotes, a newline, the text."""

    id: str
    title: str
    text: str
    metadata: Annotated[dict[str, str | int], BeforeValidator(_texts), Field(exclude_if=lambda metadata: not metadata)] = {}
    """Provenance, shown with answers: `file`, `page`, `heading`, `url`, or any other key of the corpus."""

    @property
    def contents(self) -> str:
        return f'"{self.title}"\n{self.text}'

    @classmethod
    def from_contents(cls, id: str, contents: str, metadata: Any = None) -> Self:
        """The inverse of ``contents``; without a newline, everything is text."""
        head, newline, text = contents.partition("\n")
        title = head[1:-1] if len(head) > 1 and head[0] == head[-1] == '"' else head
        title, text = (title, text) if newline else ("", head)
        return cls(id=id, title=title, text=text, metadata=metadata)


class ActionKind(StrEnum):
    SEARCH = "search"
    ANSWER = "answer"
    TOOL = "tool"
    """A call of a tool other than search."""
    MALFORMED = "malformed"

    @property
    def is_call(self) -> bool:
        """Whether the environment answers it with a tool's output."""
        return self in (ActionKind.SEARCH, ActionKind.TOOL)


class StopReason(StrEnum):
    """Why a trajectory ended. All but ``ANSWERED`` score zero."""

    ANSWERED = "answered"
    MAX_TURNS = "max_turns"  # the last generation requested another tool call
    MAX_TOKENS = "max_tokens"  # the token budget is used up
    MALFORMED = "malformed"  # the last generation was neither a tool call nor an answer
    REFUSED = "refused"  # an endpoint's content filter refused it


class Turn(Record):
    """One action of the policy and the observation that the environment inserted after it.

    ``action_ids`` are the ids exactly as sampled; they include any text after the closing tag within the same token.
    ``observation_ids`` were inserted and carry no loss; they are empty on the last turn.
    """

    action_ids: tuple[int, ...] = Field(min_length=1)
    action_text: str
    kind: ActionKind
    argument: str | None = None
    """The query of a search, the argument of another call, the text of an answer, ``None`` if malformed."""
    tool: str = ""
    """Name of the called tool, if not search."""
    observation_ids: tuple[int, ...] = ()
    observation_text: str = ""
    passage_ids: tuple[str, ...] = ()
    sampling_logprobs: tuple[float, ...] | None = None
    """Log-probabilities of ``action_ids`` under the engine that sampled them, at the sampling temperature."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind is ActionKind.MALFORMED) != (self.argument is None):
            raise ValueError(f"a {self.kind} action with argument {self.argument!r}")
        if self.sampling_logprobs is not None and len(self.sampling_logprobs) != len(self.action_ids):
            raise ValueError(f"{len(self.sampling_logprobs)} sampling_logprobs for {len(self.action_ids)} action_ids")
        if self.kind is ActionKind.ANSWER and self.observation_ids:
            raise ValueError("an observation after an answer")
        if self.passage_ids and not self.kind.is_call:
            raise ValueError("passages without a search")
        if bool(self.tool) != (self.kind is ActionKind.TOOL):
            raise ValueError(f"a {self.kind} action with tool {self.tool!r}")
        return self

    def __repr_args__(self) -> _ReprArgs:
        yield from (("kind", str(self.kind)), ("argument", _short(self.argument)))
        yield from (("sampled_tokens", len(self.action_ids)), ("observation_tokens", len(self.observation_ids)))
        yield "passage_ids", self.passage_ids

    @property
    def served(self) -> bool:
        """Whether this is a search that was answered with passages."""
        return self.kind is ActionKind.SEARCH and bool(self.observation_ids)


class Trajectory(Record):
    """The record of one rollout: prompt, turns, and how it ended."""

    question_id: str
    prompt_ids: tuple[int, ...] = Field(min_length=1)
    turns: tuple[Turn, ...]
    stop_reason: StopReason
    answer: str | None = None
    reward: float = 0.0
    """Reward of the answer under `rollout.reward`, from 0 to 1; exact match (0 or 1) by default. Never overwritten by an
    advantage."""
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
        """All ids after the prompt: each action as sampled, followed by its observation."""
        return tuple(i for turn in self.turns for ids in (turn.action_ids, turn.observation_ids) for i in ids)

    @property
    def action_mask(self) -> tuple[int, ...]:
        """Mask of the length of ``response_ids``: 1 for sampled ids, 0 for inserted ids."""
        return tuple(m for turn in self.turns for m in (1,) * len(turn.action_ids) + (0,) * len(turn.observation_ids))

    @property
    def text(self) -> str:
        """The response as text, for display and privileged prompts; never re-encoded for training."""
        return "".join(turn.action_text + turn.observation_text for turn in self.turns)

    @property
    def searches(self) -> int:
        return sum(turn.served for turn in self.turns)

    @property
    def sampled_tokens(self) -> int:
        return sum(len(turn.action_ids) for turn in self.turns)

    @property
    def correct(self) -> bool:
        return self.reward >= 1

    def __repr_args__(self) -> _ReprArgs:
        yield from (("question_id", self.question_id), ("reward", self.reward), ("answer", _short(self.answer)))
        yield from (("stop_reason", str(self.stop_reason)), ("searches", self.searches))
        yield "sampled_tokens", self.sampled_tokens

    def _repr_html_(self) -> str:
        """For notebooks: the outcome, then the turns with collapsed observations."""
        outcome = f"answer {_short(self.answer)!r}" if self.answer is not None else f"no answer ({self.stop_reason})"
        searches = f"{self.searches} search{'' if self.searches == 1 else 'es'}"
        facts = f"{self.question_id}: {outcome}, reward {self.reward:g}, {searches}, {self.sampled_tokens} tokens"
        turns = (
            _html_text(turn.action_text)
            + (f"<details><summary>found</summary>{_html_text(turn.observation_text)}</details>" * bool(turn.observation_text))
            for turn in self.turns
        )
        return f"<div><b>{_escape_html(facts)}</b>{''.join(turns)}</div>"


def _html_text(text: str) -> str:
    return f'<pre style="white-space:pre-wrap;unicode-bidi:isolate">{_escape_html(text)}</pre>'


def _escape_html(text: str) -> str:
    """Untrusted text, escaped for HTML. Lone surrogates, which cannot be sent to a browser, become ``?``."""
    return escape(text.encode("utf-8", "replace").decode())


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

    def __repr_args__(self) -> _ReprArgs:
        yield from (("question", self.question), ("trajectories", len(self.trajectories)))
        yield "correct", sum(t.correct for t in self.trajectories)

    @property
    def reference(self) -> Trajectory | None:
        """The correct trajectory with the fewest searches (ties: fewest sampled tokens, then the first), if any.

        For an unanswerable question, only trajectories that searched count: without a search, "not found" is a guess.
        """
        correct = [t for t in self.trajectories if t.correct and (t.searches or not self.question.unanswerable)]
        return min(correct, key=lambda t: (t.searches, t.sampled_tokens), default=None)


class Pair(Record):
    """A reference (correct, efficient) and the sibling that learns from it."""

    question: Question
    reference: Trajectory
    student: Trajectory
    reference_shown: str | None = None
    """The text of the reference in the teacher's prompt, if not the whole reference; empty if the teacher sees none."""
    shortened: bool = False
    """Whether passages of the reference were cut to fit the teacher's prompt."""
    teacher_prompt_ids: tuple[int, ...] = ()
    """The privileged prompt, used both to measure the lead and to distill."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.reference.correct:
            raise ValueError("a reference that is not correct")
        if {self.student.question_id, self.reference.question_id} != {self.question.id}:
            raise ValueError("a pair across questions")
        return self

    def __repr_args__(self) -> _ReprArgs:
        yield from (("question", self.question), ("reference", self.reference), ("student", self.student))


class Sample(Record):
    """What a trainer learns from: a prompt, a response, and which response tokens count.

    ::

        prompt_ids     [ 5  6  7]
        response_ids   [         11 12 13 21 22 14 15]     11-13 a search, 21-22 its observation, 14-15 an answer
        action_mask    [          1  1  1  0  0  1  1]
        weights        [          1  1  1  0  0  2  2]     loss weight of each token
    """

    question_id: str
    prompt_ids: tuple[int, ...] = Field(min_length=1)
    response_ids: tuple[int, ...]
    action_mask: tuple[int, ...]
    """1 for ids that the policy sampled or imitates, 0 for inserted ids. As long as the response."""
    weights: tuple[float, ...] | None = None
    """Loss weight of each token, 1 by default; tokens of weight 0 are skipped. As long as the response."""
    advantages: tuple[float, ...] | None = None
    """Advantage of each token. As long as the response."""
    sampling_logprobs: tuple[float, ...] | None = None
    """Log-probability of each id under the engine that sampled it, at the sampling temperature. As long as the response."""
    old_logprobs: tuple[float, ...] | None = None
    """The same under the trainer's policy at the start of the step: the denominator of ratios. As long as the response."""
    ref_logprobs: tuple[float, ...] | None = None
    """The same under the reference policy of the KL penalty. As long as the response."""
    teacher_prompt_ids: tuple[int, ...] | None = None
    """The teacher's prompt before the same response, if there is a teacher."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("action_mask", "weights", "advantages", "sampling_logprobs", "old_logprobs", "ref_logprobs"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.response_ids):
                raise ValueError(f"{len(values)} {name} for {len(self.response_ids)} response_ids")
        if set(self.action_mask) - {0, 1}:
            raise ValueError("action_mask holds something other than 0 and 1")
        return self

    def __repr_args__(self) -> _ReprArgs:
        yield from (("question_id", self.question_id), ("prompt_tokens", len(self.prompt_ids)))
        yield from (("response_tokens", len(self.response_ids)), ("positions", len(self.positions)))

    @property
    def positions(self) -> tuple[int, ...]:
        """Response offsets of the tokens that count: sampled, with a nonzero weight."""
        weights = self.weights or self.action_mask
        return tuple(i for i, (mask, weight) in enumerate(zip(self.action_mask, weights, strict=True)) if mask and weight)

    def __len__(self) -> int:
        """Tokens of the longest row that goes through the model: the longer prompt plus the response."""
        return max(len(self.prompt_ids), len(self.teacher_prompt_ids or ())) + len(self.response_ids)
