"""The content of an evaluation artifact: a result for each question, and figures over questions."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field

from search_e1.evaluation.failures import Failure
from search_e1.evaluation.statistics import Interval, interval, share_interval
from search_e1.runs import read_records
from search_e1.types import Record, StopReason

EVALUATION, QUESTIONS = "evaluation.json", "questions.jsonl"
FIGURES = ("em", "f1", "cover_em", "searches", "tokens")
"""The figures of every question's greedy trajectory."""
COUNTS = ("searches", "tokens")
"""The figures that are no shares from 0 to 1."""


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
    """The right answers are yes or no, which no passage contains."""
    read: bool | None
    """A passage, as the policy read it, contains an answer; ``None`` for yes/no questions and unanswerable ones."""
    in_topk: bool | None
    """See ``recall.Recall``; ``None`` if it was not measured."""
    in_corpus: bool | None
    failure: Failure | None
    """``None`` if the answer is right."""
    reward: float | None = Field(None, exclude_if=_is_none)
    """Under ``rollout.reward``, where that is not exact match."""
    answer_type: str | None = Field(None, exclude_if=_is_none)
    """Of the question's metadata, or ``unanswerable``; where ``reward`` is there."""


class Scores(Record):
    """Means over ``n`` questions, of greedy trajectories unless stated, with 95% intervals (see ``statistics``)."""

    n: int
    em: float
    em_interval: Interval
    f1: float
    f1_interval: Interval
    cover_em: float
    """Share of answers that contain a right one as whole words."""
    cover_em_interval: Interval
    searches: float
    searches_interval: Interval
    tokens: float
    tokens_interval: Interval
    em_sampled: float | None
    """Mean EM of the sampled trajectories; ``None`` if none were sampled."""
    em_sampled_interval: Interval | None
    em_by_sample: tuple[float, ...]
    """EM of every question's first sampled trajectory, of every second, ...: like runs with different sampling seeds."""
    answerable: int | None
    """Questions with an answer to look for (not yes/no) that is in the corpus; ``None`` if that is unknown."""
    em_answerable: float | None
    """EM over these; ``None`` if there is none."""
    em_answerable_interval: Interval | None
    read: float | None
    """Share of the questions with an answer to look for that is in what was read; likewise the next two."""
    in_topk: float | None
    in_corpus: float | None
    failures: dict[Failure, int]
    """Class -> wrong answers, in the order of decision, without empty classes."""
    reward: float | None = Field(None, exclude_if=_is_none)
    """Mean under ``rollout.reward``, where that is not exact match."""
    reward_interval: Interval | None = Field(None, exclude_if=_is_none)


class Evaluation(Scores):
    """Scores over all questions (micro average) and over parts of them: ``evaluation.json``."""

    macro_em: float
    """Mean of the benchmarks' EM: the "average" of published tables."""
    macro_em_interval: Interval
    """From the benchmarks' intervals."""
    macro_em_sampled: float | None
    macro_em_sampled_interval: Interval | None
    by_benchmark: dict[str, Scores]
    by_hops: dict[int, Scores]
    """Over the questions whose hop count is known."""
    stop_reasons: dict[StopReason, int]
    """Reason -> greedy trajectories that ended for it."""
    sampled_tokens: int = 0
    """Total of all trajectories, greedy and sampled."""
    reward_name: str | None = Field(None, exclude_if=_is_none)
    """``rollout.reward``, where that is not exact match."""
    by_answer_type: dict[str, Scores] = Field({}, exclude_if=_is_empty)
    """The same by the questions' ``metadata.answer_type``."""


def evaluation(results: Sequence[Result], seed: int, reward_name: str | None = None) -> Evaluation:
    """The figures over ``results``; ``seed`` is the bootstrap's, ``reward_name`` the name of a reward other than exact match.

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
        **{name: _share(results, name) for name in ("read", "in_topk", "in_corpus")},
        "failures": {failure: classes[failure] for failure in Failure if classes[failure]},
        **(_mean("reward", rewards, seed) if (rewards := [r.reward for r in results if r.reward is not None]) else {}),
    }


def _mean(name: str, values: Sequence[float], seed: int) -> dict[str, Any]:
    if not values:
        return {name: None, f"{name}_interval": None}
    return {name: fmean(values), f"{name}_interval": (interval if name in COUNTS else share_interval)(values, seed=seed)}


def _share(results: Sequence[Result], name: str) -> float | None:
    known = [value for result in results if (value := getattr(result, name)) is not None]
    return fmean(known) if known else None


def write(results: Sequence[Result], path: Path) -> None:
    """One JSON line each."""
    path.write_text("".join(result.model_dump_json() + "\n" for result in results), encoding="utf-8")


def read(path: Path) -> Iterator[Result]:
    """The results of a file that ``write`` wrote; see ``runs.read_records``."""
    return read_records(path, Result, "evaluate again")
