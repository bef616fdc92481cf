"""Samples the groups of many questions chunk by chunk: memory is bounded, and a killed process loses at most one chunk.

Chunks depend only on the config, so a chunk that is sampled again is identical bit for bit.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from search_e1.config import Prompts, RolloutConfig
from search_e1.retrieval.base import Retriever
from search_e1.rollout.engines.base import Engine
from search_e1.rollout.loop import OnTrajectory, Spent, rollout
from search_e1.rollout.starts import starts
from search_e1.rollout.unfinished import unfinished_in
from search_e1.runs.checkpoints import Checkpointer
from search_e1.types import Group, Question, Trajectory

logger = logging.getLogger(__name__)
PARTS = ("sampling", "retrieval", "rest")
"""The parts of a rollout's time; see ``Spent``."""
_BATCHES_AT_ONCE = 2  # when trajectories end, others fill the engine's batch


@dataclass(frozen=True, slots=True)
class RolloutSampler:
    """Samples groups with an engine, a retriever, prompts and limits."""

    engine: Engine
    retriever: Retriever
    prompts: Prompts
    limits: RolloutConfig
    checkpointer: Checkpointer = field(default_factory=Checkpointer)

    def chunks(self, questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
        """Chunks of questions that are rolled out together, with groups of ``size``."""
        at_once = max(1, self.limits.batch_size * _BATCHES_AT_ONCE // size)
        return (questions[at : at + at_once] for at in range(0, len(questions), at_once))

    def groups(
        self, chunk: Sequence[Question], size: int, *, temperature: float, seed: int,
        on_trajectory: OnTrajectory | None = None, spent: Spent | None = None,
    ) -> list[Group]:  # fmt: skip
        """A group of ``size`` trajectories for each question.

        Raises:
            ModelError, RetrievalError, EndpointError: see ``rollout``.
        """
        trajectories = rollout(
            self.engine, self.retriever, starts(self.engine.tokenizer, self.prompts, chunk, size), self.limits,
            temperature=temperature, seed=seed, prompts=self.prompts, on_trajectory=on_trajectory, spent=spent,
            unfinished=unfinished_in(self.checkpointer),
        )  # fmt: skip
        siblings = (tuple(trajectories[at : at + size]) for at in range(0, len(trajectories), size))
        return [Group(question=q, trajectories=group) for q, group in zip(chunk, siblings, strict=True)]


def tally(trajectories: Iterable[Trajectory], spent: Spent) -> dict[str, float]:
    """Sums over ``trajectories`` and the time ``spent`` on them; additive over chunks."""
    sums = dict.fromkeys(("trajectories", "em", "searches", "tokens", "empty"), 0.0)
    sums |= {f"seconds.{part}": getattr(spent, part) for part in PARTS}
    for t in trajectories:
        own = dict(trajectories=1, em=t.correct, searches=t.searches, tokens=t.sampled_tokens, empty=empty_searches(t))
        for name, value in {**own, f"stop.{t.stop_reason}": 1}.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def empty_searches(trajectory: Trajectory) -> int:
    """Number of searches that returned no passage."""
    return sum(turn.served and not turn.passage_ids for turn in trajectory.turns)


def warn_of_empty_searches(empty: float, searches: float) -> None:
    """Warn if most searches returned nothing: a policy learns little from empty observations."""
    if searches and 2 * empty > searches:
        logger.warning(
            "%.0f of %.0f searches found no passage: does the policy search for words of the questions (`search-e1 ask` shows "
            "its queries), are questions and passages in the same language, and does retrieval.language name it?",
            empty, searches,
        )  # fmt: skip
