"""Groups of many questions, rolled out chunk by chunk: memory is bounded, and a kill loses at most a chunk.

Which questions make a chunk follows from the config alone, so a chunk that is sampled again is the same to the bit.
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
"""What the seconds of a rollout are spent on."""
_BATCHES_AT_ONCE = 2  # as trajectories end, others fill the engine's batches


@dataclass(frozen=True, slots=True)
class RolloutSampler:
    """Samples groups: an engine, a retriever, and how to ask."""

    engine: Engine
    retriever: Retriever
    prompts: Prompts
    limits: RolloutConfig
    checkpointer: Checkpointer = field(default_factory=Checkpointer)

    def chunks(self, questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
        """Questions that are rolled out together, ``size`` times each."""
        at_once = max(1, self.limits.batch_size * _BATCHES_AT_ONCE // size)
        return (questions[at : at + at_once] for at in range(0, len(questions), at_once))

    def groups(
        self, chunk: Sequence[Question], size: int, *, temperature: float, seed: int,
        on_trajectory: OnTrajectory | None = None, spent: Spent | None = None,
    ) -> list[Group]:  # fmt: skip
        """``size`` trajectories of each question.

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
    """Sums over ``trajectories``, which took ``spent``; figures over several chunks are made of them."""
    sums = dict.fromkeys(("trajectories", "em", "searches", "tokens", "empty"), 0.0)
    sums |= {f"seconds.{part}": getattr(spent, part) for part in PARTS}
    for t in trajectories:
        own = dict(trajectories=1, em=t.correct, searches=t.searches, tokens=t.sampled_tokens, empty=empty_searches(t))
        for name, value in {**own, f"stop.{t.stop_reason}": 1}.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def empty_searches(trajectory: Trajectory) -> int:
    """Searches that found no passage."""
    return sum(turn.served and not turn.passage_ids for turn in trajectory.turns)


def warn_of_empty_searches(empty: float, searches: float) -> None:
    """Say in one line that most searches found nothing: a policy learns little from empty observations."""
    if searches and 2 * empty > searches:
        logger.warning(
            "%.0f of %.0f searches found no passage: are questions and passages in one language? BM25 does not split text "
            'without spaces between words (Chinese, Japanese, Thai); retrieval.kind = "dense" reads it', empty, searches,
        )  # fmt: skip
