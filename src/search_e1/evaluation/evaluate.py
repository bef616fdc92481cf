"""How good a policy is: greedy and sampled rollouts of every question, scored by benchmark and by hops."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from search_e1.config import EvaluationConfig, RolloutConfig
from search_e1.errors import DataError
from search_e1.progress import Progress, silent
from search_e1.prompts import Prompts
from search_e1.retrieval.base import Retriever
from search_e1.rollout.generator import Generator
from search_e1.rollout.loop import OnTrajectory, rollout, starts
from search_e1.types import Group, Question, Record, StopReason, Trajectory

TRAJECTORIES, SAMPLED = "trajectories.jsonl", "sampled.jsonl"
_RESAMPLES = 10_000
_BATCHES_AT_ONCE = 8  # as trajectories end, others fill the generator's batches; what is held in memory stays bounded


class Scores(Record):
    """Means over ``n`` questions, of the greedy trajectories unless said."""

    n: int
    em: float
    em_interval: tuple[float, float]
    """95% bootstrap interval of ``em`` over questions."""
    em_sampled: float | None
    """Mean EM of the sampled trajectories; ``None`` if none were sampled."""
    f1: float
    searches: float
    tokens: float
    """Sampled tokens of a trajectory; observations are not counted."""


class Evaluation(Scores):
    """The scores over all questions, and over parts of them."""

    macro_em: float
    """Mean over benchmarks of their EM: the "average" of published tables."""
    by_benchmark: dict[str, Scores]
    by_hops: dict[int, Scores]
    """Of the questions whose hop count is known."""
    stop_reasons: dict[StopReason, int]
    """Reason -> greedy trajectories that ended so."""
    sampled_tokens: int = 0
    """Of all trajectories together, greedy and sampled."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What is left of a question once its trajectories are written."""

    benchmark: str
    hops: int | None
    em: float
    em_sampled: float | None
    f1: float
    searches: int
    tokens: int
    stop: StopReason


def evaluate(
    generator: Generator,
    retriever: Retriever,
    questions_by_benchmark: Mapping[str, Sequence[Question]],
    prompts: Prompts,
    config: EvaluationConfig,
    limits: RolloutConfig,
    *,
    seed: int,
    out: Path,
    progress: Progress = silent,
) -> Evaluation:
    """Roll out every question once greedily and ``config.samples`` times at ``config.temperature``.

    Groups go to ``out``, a JSON line for each question in order: greedy ones to ``TRAJECTORIES``, sampled ones to ``SAMPLED``.
    Sampling is seeded with ``seed``, so that it depends on nothing that ran before; torch's global state is left as it was.

    Raises:
        DataError: a benchmark has no questions, or there is no benchmark.
        RetrievalError: from the retriever.
    """
    empty = [name for name, questions in questions_by_benchmark.items() if not questions]
    if empty or not questions_by_benchmark:
        raise DataError(
            f"no questions to evaluate on in {empty or 'data.eval'}; give files that hold some in data.eval"
        )
    names = [name for name, questions in questions_by_benchmark.items() for _ in questions]
    questions = [question for part in questions_by_benchmark.values() for question in part]
    told = _Told(progress, total=len(questions) * (1 + config.samples))

    def groups(file: str, size: int, temperature: float) -> Iterator[Group]:
        with (out / file).open("w", encoding="utf-8") as stream:
            for group in _groups(generator, retriever, questions, prompts, limits, size, temperature, told):
                stream.write(group.model_dump_json() + "\n")
                yield group

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        outcomes = [_outcome(name, group) for name, group in zip(names, groups(TRAJECTORIES, 1, 0.0), strict=True)]
        if config.samples:
            sampled = groups(SAMPLED, config.samples, config.temperature)
            outcomes = [
                replace(outcome, em_sampled=fmean(t.reward for t in group.trajectories))
                for outcome, group in zip(outcomes, sampled, strict=True)
            ]
    return _summary(outcomes, seed).model_copy(update={"sampled_tokens": told.tokens})


class _Told:
    """Counts trajectories as they end, with the running EM."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total = progress, total
        self.done, self.right, self.tokens = 0, 0.0, 0

    def __call__(self, index: int, trajectory: Trajectory) -> None:
        self.done += 1
        self.right += trajectory.reward
        self.tokens += trajectory.sampled_tokens
        self.progress(self.done, self.total, f"EM {self.right / self.done:.3f}")


def _groups(
    generator: Generator,
    retriever: Retriever,
    questions: Sequence[Question],
    prompts: Prompts,
    limits: RolloutConfig,
    size: int,
    temperature: float,
    on_trajectory: OnTrajectory,
) -> Iterator[Group]:
    at_once = max(1, limits.batch_size * _BATCHES_AT_ONCE // size)
    for at in range(0, len(questions), at_once):
        batch = questions[at : at + at_once]
        trajectories = rollout(
            generator,
            retriever,
            starts(generator.tokenizer, prompts, batch, size),
            limits,
            temperature=temperature,
            correction=prompts.correction,
            on_trajectory=on_trajectory,
        )
        for i, question in enumerate(batch):
            yield Group(question=question, trajectories=tuple(trajectories[i * size : (i + 1) * size]))


def _outcome(benchmark: str, group: Group) -> _Outcome:
    [t] = group.trajectories
    hops = group.question.hops
    return _Outcome(benchmark, hops, t.reward, None, t.f1, t.searches, t.sampled_tokens, t.stop_reason)


def _summary(outcomes: Sequence[_Outcome], seed: int) -> Evaluation:
    by_benchmark = _by(outcomes, lambda outcome: outcome.benchmark, seed)
    by_hops = _by([o for o in outcomes if o.hops is not None], lambda outcome: outcome.hops, seed)
    return Evaluation(
        **_scores(outcomes, seed),
        macro_em=fmean(scores.em for scores in by_benchmark.values()),
        by_benchmark=by_benchmark,
        by_hops=dict(sorted(by_hops.items())),
        stop_reasons=dict(Counter(outcome.stop for outcome in outcomes).most_common()),
    )


def _by(outcomes: Sequence[_Outcome], key: Callable[[_Outcome], Any], seed: int) -> dict[Any, Scores]:
    parts: dict[Any, list[_Outcome]] = {}
    for outcome in outcomes:
        parts.setdefault(key(outcome), []).append(outcome)
    return {name: Scores(**_scores(part, seed)) for name, part in parts.items()}


def _scores(outcomes: Sequence[_Outcome], seed: int) -> dict[str, Any]:
    em = fmean(outcome.em for outcome in outcomes)
    sampled = [outcome.em_sampled for outcome in outcomes if outcome.em_sampled is not None]
    return dict(
        n=len(outcomes),
        em=em,
        em_interval=bootstrap_interval(em, len(outcomes), seed),
        em_sampled=fmean(sampled) if sampled else None,
        f1=fmean(outcome.f1 for outcome in outcomes),
        searches=fmean(outcome.searches for outcome in outcomes),
        tokens=fmean(outcome.tokens for outcome in outcomes),
    )


def bootstrap_interval(em: float, n: int, seed: int) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of ``n`` zeros and ones whose mean is ``em``.

    Drawing ``n`` of them with replacement and counting the ones is a draw of Binomial(n, em), so nothing is really resampled.
    """
    means = np.random.default_rng(seed).binomial(n, em, size=_RESAMPLES) / n
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
