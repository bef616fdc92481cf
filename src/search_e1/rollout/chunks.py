"""Groups of many questions, rolled out chunk by chunk, so that memory is bounded and a kill loses no more than a chunk.

Which questions make a chunk follows from the config alone: a chunk that is done again is the same to the bit.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from search_e1.config import Prompts, RolloutConfig
from search_e1.retrieval.base import Retriever
from search_e1.rollout.engines.base import Generator
from search_e1.rollout.loop import OnTrajectory, Spent, rollout, starts
from search_e1.rollout.unfinished import Unfinished
from search_e1.runs import ranks
from search_e1.runs.checkpoints import Checkpointer
from search_e1.types import Group, Question, Trajectory

PARTS = ("sampling", "retrieval", "rest")
"""What the seconds of a rollout go into."""
_BATCHES_AT_ONCE = 2  # as trajectories end, others fill the generator's batches


@dataclass(frozen=True, slots=True)
class Asking:
    """All that it takes to ask questions."""

    generator: Generator
    retriever: Retriever
    prompts: Prompts
    limits: RolloutConfig
    checkpointer: Checkpointer = field(default_factory=Checkpointer)

    def chunks(self, questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
        """Questions that are asked together, ``size`` times each."""
        at_once = max(1, self.limits.batch_size * _BATCHES_AT_ONCE // size)
        return (questions[at : at + at_once] for at in range(0, len(questions), at_once))

    def groups(
        self,
        chunk: Sequence[Question],
        size: int,
        *,
        temperature: float,
        seed: int,
        on_trajectory: OnTrajectory | None = None,
        spent: Spent | None = None,
    ) -> list[Group]:
        """``size`` trajectories of each question.

        Raises:
            ModelError, RetrievalError, EndpointError: see ``rollout``.
        """
        trajectories = rollout(
            self.generator,
            self.retriever,
            starts(self.generator.tokenizer, self.prompts, chunk, size),
            self.limits,
            temperature=temperature,
            seed=seed,
            prompts=self.prompts,
            on_trajectory=on_trajectory,
            spent=spent,
            unfinished=unfinished_in(self.checkpointer),
        )
        return [
            Group(question=question, trajectories=tuple(trajectories[i * size : (i + 1) * size]))
            for i, question in enumerate(chunk)
        ]


def unfinished_in(checkpointer: Checkpointer) -> Unfinished:
    """Where this rank's interrupted rollouts lie while a stage is unfinished."""
    directory = checkpointer.directory
    if directory:
        directory.mkdir(parents=True, exist_ok=True)
    return Unfinished(directory and directory / f"unfinished-{ranks.rank()}.json", checkpointer.stop)


def tally(trajectories: Iterable[Trajectory], spent: Spent) -> dict[str, float]:
    """Sums over ``trajectories``, on which ``spent`` went: what the figures of several chunks are made of."""
    sums = {"trajectories": 0.0, "em": 0.0, "searches": 0.0, "tokens": 0.0}
    sums |= {f"seconds.{part}": getattr(spent, part) for part in PARTS}
    for t in trajectories:
        stop = f"stop.{t.stop_reason}"
        sums[stop] = sums.get(stop, 0.0) + 1
        sums["trajectories"] += 1
        sums["em"] += t.reward
        sums["searches"] += t.searches
        sums["tokens"] += t.sampled_tokens
    return sums
