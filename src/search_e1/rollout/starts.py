"""Starts of rollouts, and rows: the trajectories being sampled from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from search_e1.config import Prompts
from search_e1.data.answers import f1
from search_e1.rollout.rewards.scorer import Scorer
from search_e1.text.prompts import plain_prompt
from search_e1.types import Question, StopReason, Trajectory, Turn


@dataclass(slots=True)
class Start:
    """The start of a rollout: a question, its prompt, and turns already taken (usually none)."""

    question: Question
    prompt_ids: tuple[int, ...]
    turns: Sequence[Turn] = ()
    sample: int = 0
    """Number of the trajectory within its group; equal numbers sample identical trajectories."""
    seed: int | None = None
    """Overrides the loop's seed."""
    temperature: float | None = None
    """Overrides the session's temperature."""
    max_sampled: int | None = None
    """Maximum sampled ids of the trajectory, over all actions."""


@dataclass(slots=True)
class Row:
    """A trajectory being sampled."""

    start: Start
    reward: Scorer
    turns: list[Turn] = field(default_factory=list)
    context: list[int] = field(default_factory=list)
    stop: StopReason | None = None

    def __post_init__(self) -> None:
        self.context += self.start.prompt_ids
        for turn in self.start.turns:
            self.append(turn)

    @property
    def budget(self) -> float:
        """How many ids may still be sampled, regardless of the room in the context."""
        if self.start.max_sampled is None:
            return math.inf
        return self.start.max_sampled - sum(len(turn.action_ids) for turn in self.turns[len(self.start.turns) :])

    @property
    def answer(self) -> str | None:
        """The answer of an ended trajectory; ``None`` if it has none."""
        return self.turns[-1].argument if self.stop is StopReason.ANSWERED else None

    def append(self, turn: Turn) -> None:
        self.turns.append(turn)
        self.context += turn.action_ids + turn.observation_ids

    def finish(self) -> Trajectory:
        assert self.stop is not None
        # A final observation without an action after it (the context was full) was never read, so it is not recorded.
        if self.turns and self.turns[-1].observation_ids:
            last = self.turns[-1]
            self.turns[-1] = last.model_copy(update={"observation_ids": (), "observation_text": "", "passage_ids": ()})
        question, answer = self.start.question, self.answer
        return Trajectory(
            question_id=question.id, prompt_ids=self.start.prompt_ids, turns=tuple(self.turns), stop_reason=self.stop,
            answer=answer, reward=self.reward(answer, question), f1=f1(answer, question.answers),
        )  # fmt: skip


def starts(tokenizer, prompts: Prompts, questions: Sequence[Question], group_size: int = 1) -> list[Start]:
    """Starts with the plain prompt, ``group_size`` per question, siblings adjacent."""
    prompted = ((question, plain_prompt(tokenizer, prompts, question.text)) for question in questions)
    return [Start(question, ids, sample=sample) for question, ids in prompted for sample in range(group_size)]
