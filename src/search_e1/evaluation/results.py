"""The content of an evaluation artifact: a result for each question, and figures over questions."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field

from search_e1.evaluation.failures import Failure
from search_e1.evaluation.recall import share_of
from search_e1.evaluation.statistics import Interval, interval, share_interval
from search_e1.runs import read_records
from search_e1.types import Record, StopReason

EVALUATION, QUESTIONS = "evaluation.json", "questions.jsonl"
FIGURES = ("em", "f1", "cover_em", "searches", "tokens")
"""The figures of every question's greedy trajectory."""
COUNTS = ("searches", "tokens")
"""The figures that are counts, not shares from 0 to 1."""


def _is_none(value: Any) -> bool:
    return value is None


def _is_empty(value: Any) -> bool:
    return not value


class Result(Record):
    """One question: its greedy trajectory, judged, and the outcomes of the sampled ones."""

    benchmark: str
    id: str
    hops: int | None
    question: str
    answers: tuple[str, ...]
    answer: str | None
    """The policy's answer; ``None`` if it gave none."""
    em: float
    f1: float
    cover_em: float
    searches: int
    tokens: int
    """Sampled tokens of the trajectory; observations are not counted."""
    stop_reason: StopReason
    em_of_samples: tuple[float, ...] = ()
    """EM of each sampled trajectory."""
    tokens_of_samples: tuple[int, ...] = ()
    yes_no: bool
    """Every right answer is yes or no, which is not searched for in passages."""
    read: bool | None
    """A passage, as the policy read it, contains an answer; ``None`` for yes/no and unanswerable questions."""
    in_topk: bool | None
    """See ``recall.Recall``; ``None`` if it was not measured."""
    in_corpus: bool | None
    failure: Failure | None
    """``None`` if the answer is right."""
    reward: float | None = Field(None, exclude_if=_is_none)
    """The run's reward, if ``rollout.reward`` is not exact match."""
    answer_type: str | None = Field(None, exclude_if=_is_none)
    """The question's ``metadata.answer_type``, or ``unanswerable``; set only with ``reward``."""


class Scores(Record):
    """Means over ``n`` questions, greedy unless stated otherwise, with 95% intervals (see ``statistics``)."""

    n: int
    em: float
    em_interval: Interval
    f1: float
    f1_interval: Interval
    cover_em: float
    """Share of answers that contain a right answer as whole words."""
    cover_em_interval: Interval
    searches: float
    searches_interval: Interval
    tokens: float
    tokens_interval: Interval
    em_sampled: float | None
    """Mean EM of the sampled trajectories; ``None`` if none were sampled."""
    em_sampled_interval: Interval | None
    em_by_sample: tuple[float, ...]
    """EM over every question's first sample, second sample, ...: like runs with different sampling seeds."""
    answerable: int | None
    """Questions whose answer (not yes/no) is in the corpus; ``None`` if unknown."""
    em_answerable: float | None
    """EM over the answerable questions; ``None`` if there are none."""
    em_answerable_interval: Interval | None
    read: float | None
    """Share of questions, without yes/no and unanswerable ones, with this property of ``Result``; likewise the next two."""
    in_topk: float | None
    in_corpus: float | None
    failures: dict[Failure, int]
    """Failure class -> number of wrong answers, in the order of ``Failure``, without empty classes."""
    reward: float | None = Field(None, exclude_if=_is_none)
    """Mean reward, if ``rollout.reward`` is not exact match."""
    reward_interval: Interval | None = Field(None, exclude_if=_is_none)


class Evaluation(Scores):
    """Scores over all questions (micro average) and over parts of them: ``evaluation.json``."""

    macro_em: float
    """Mean of the benchmarks' EM: the "average" of published tables."""
    macro_em_interval: Interval
    """Combined from the benchmarks' intervals."""
    macro_em_sampled: float | None
    macro_em_sampled_interval: Interval | None
    by_benchmark: dict[str, Scores]
    by_hops: dict[int, Scores]
    """Scores by hop count, over the questions where it is known."""
    stop_reasons: dict[StopReason, int]
    """Stop reason -> number of greedy trajectories."""
    sampled_tokens: int = 0
    """Total over all trajectories, greedy and sampled."""
    reward_name: str | None = Field(None, exclude_if=_is_none)
    """``rollout.reward``, if it is not exact match."""
    by_answer_type: dict[str, Scores] = Field({}, exclude_if=_is_empty)
    """Scores by the questions' ``metadata.answer_type``."""


def evaluation(results: Sequence[Result], seed: int, reward_name: str | None = None) -> Evaluation:
    """The figures over ``results``. ``seed`` seeds the bootstrap; ``reward_name`` names a reward other than exact match.

    Raises:
        ValueError: there are no results.
    """
    by_benchmark = _by(results, lambda result: result.benchmark)
    by_hops = _by([result for result in results if result.hops is not None], lambda result: result.hops)
    typed = [result for result in results if result.answer_type is not None]
    em = [[result.em for result in part] for part in by_benchmark.values()]
    sampled = [[fmean(result.em_of_samples) for result in part if result.em_of_samples] for part in by_benchmark.values()]
    return Evaluation(
        **_scores(results, seed),
        macro_em=fmean(map(fmean, em)),
        macro_em_interval=share_interval(*em, seed=seed),
        macro_em_sampled=fmean(map(fmean, sampled)) if all(sampled) else None,
        macro_em_sampled_interval=share_interval(*sampled, seed=seed) if all(sampled) else None,
        by_benchmark={name: Scores(**_scores(part, seed)) for name, part in by_benchmark.items()},
        by_hops={hops: Scores(**_scores(part, seed)) for hops, part in sorted(by_hops.items())},
        stop_reasons=dict(Counter(result.stop_reason for result in results).most_common()),
        sampled_tokens=sum(result.tokens + sum(result.tokens_of_samples) for result in results),
        reward_name=reward_name,
        by_answer_type={
            kind: Scores(**_scores(part, seed)) for kind, part in sorted(_by(typed, lambda result: result.answer_type).items())
        },
    )


def _by(results: Sequence[Result], key: Callable[[Result], Any]) -> dict[Any, list[Result]]:
    parts: dict[Any, list[Result]] = {}
    for result in results:
        parts.setdefault(key(result), []).append(result)
    return parts


def _scores(results: Sequence[Result], seed: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"n": len(results)}
    for name in FIGURES:
        figures |= _mean(name, [getattr(result, name) for result in results], seed)
    known = [result for result in results if result.in_corpus is not None]
    answerable = [result for result in known if result.in_corpus]
    classes = Counter(result.failure for result in results)
    return figures | {
        **_mean("em_sampled", [fmean(result.em_of_samples) for result in results if result.em_of_samples], seed),
        "em_by_sample": tuple(map(fmean, zip(*(result.em_of_samples for result in results), strict=True))),
        "answerable": len(answerable) if known else None,
        **_mean("em_answerable", [result.em for result in answerable], seed),
        **{name: share_of(getattr(r, name) for r in results) for name in ("read", "in_topk", "in_corpus")},
        "failures": {failure: classes[failure] for failure in Failure if classes[failure]},
        **(_mean("reward", rewards, seed) if (rewards := [r.reward for r in results if r.reward is not None]) else {}),
    }


def _mean(name: str, values: Sequence[float], seed: int) -> dict[str, Any]:
    if not values:
        return {name: None, f"{name}_interval": None}
    return {name: fmean(values), f"{name}_interval": (interval if name in COUNTS else share_interval)(values, seed=seed)}


def write(results: Sequence[Result], path: Path) -> None:
    """Write one JSON line per result."""
    path.write_text("".join(result.model_dump_json() + "\n" for result in results), encoding="utf-8")


def read(path: Path) -> Iterator[Result]:
    """The results in a file written by ``write``; see ``runs.read_records``."""
    return read_records(path, Result, "evaluate again")
