"""Compares the variants of a sweep with its reference variant: means over seeds and questions, and paired differences."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from search_e1.evaluation import compare
from search_e1.evaluation.compare import Figure
from search_e1.evaluation.statistics import intervals_over_seeds
from search_e1.lab.sweep.results import ALL, METRICS, Cost, PolicyResult, metric
from search_e1.types import Record

FILE = "comparison.parquet"
LAST = "last"
"""Instead of a stage: the last policy of each run."""

Scores = Mapping[tuple[str, str], np.ndarray]
"""Benchmark and question id -> values of ``METRICS``, NaN for missing ones."""


class VariantRow(Record):
    """One variant at one stage on one benchmark, over all seeds. Intervals are over seeds and questions."""

    variant: str
    stage: str
    benchmark: str
    seeds: tuple[int, ...]
    questions: int
    """Number of distinct questions."""
    metrics: dict[str, Figure]
    """Metric -> figure; without ``em_sampled`` if nothing was sampled."""
    differences: dict[str, Figure]
    """The variant minus the reference variant, over the seeds and questions that both have; empty for the reference variant."""
    lead: float | None
    """Mean over seeds of the last lead measured before this stage."""
    refused: int
    """Number of runs in which a distillation was refused before this stage."""
    cost: dict[str, float]
    """Fields of ``Cost`` charged to the policy, as means over seeds."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every variant at every stage, the reference variant first, and notes for the reader."""

    reference: str
    rows: tuple[VariantRow, ...]
    notes: tuple[str, ...]

    def at(self, stage: str, benchmark: str = ALL) -> list[VariantRow]:
        return [row for row in self.rows if (row.stage, row.benchmark) == (stage, benchmark)]

    def records(self) -> list[dict[str, Any]]:
        """One row per variant, stage, benchmark and metric."""
        return [record for row in self.rows for record in _records(row, self.reference)]


def compare_variants(results: Sequence[PolicyResult], reference: str, seed: int = 0) -> Comparison:
    """Compare ``results`` with the variant ``reference``; ``seed`` seeds the bootstrap.

    Raises:
        ValueError: there is nothing to compare.
    """
    if not results:
        raise ValueError("no finished run")
    variants = sorted(dict.fromkeys(result.variant for result in results), key=lambda name: name != reference)
    benchmarks = list(dict.fromkeys(benchmark for result in results for benchmark, _ in result.evaluated.results))
    rows = []
    for stage in (*sorted({result.stage for result in results}, key=_place_in_loop), LAST):
        at = [result for result in results if result.stage == stage or (stage == LAST and result.last)]
        by_variant = {name: {r.seed: r for r in at if r.variant == name} for name in variants}
        for benchmark in (ALL, *(benchmarks if len(benchmarks) > 1 else ())):
            rows += [
                _row(name, stage, benchmark, by_seed, {} if name == reference else by_variant[reference], results, seed)
                for name, by_seed in by_variant.items()
                if by_seed
            ]
    return Comparison(reference, tuple(rows), tuple(_notes(results, variants)))


def _place_in_loop(stage: str) -> tuple[int, str]:
    kind, _, round = stage.partition("-")
    return int(round or 0), kind  # grpo comes before ofsd


def _row(
    variant: str,
    stage: str,
    benchmark: str,
    by_seed: Mapping[int, PolicyResult],
    reference: Mapping[int, PolicyResult],
    results: Sequence[PolicyResult],
    seed: int,
) -> VariantRow:
    scores = {number: _scores(result, benchmark) for number, result in by_seed.items()}
    others = {number: _scores(result, benchmark) for number, result in reference.items() if number in scores}
    paired = {
        number: {key: scores[number][key] - other[key] for key in scores[number].keys() & other.keys()}
        for number, other in others.items()
    }
    before = [_policies_before(result, results) for result in by_seed.values()]
    leads = [known[-1] for run in before if (known := [v for r in run if (v := r.lead.lead) is not None])]
    costs = [asdict(result.charged) for result in by_seed.values()]
    return VariantRow(
        variant=variant, stage=stage, benchmark=benchmark, seeds=tuple(by_seed),
        questions=len({key for asked in scores.values() for key in asked}), metrics=_figures(scores, seed),
        differences=_figures(paired, seed), lead=fmean(leads) if leads else None,
        refused=sum(any(result.refused for result in run) for run in before),
        cost={name: fmean(cost[name] for cost in costs) for name in asdict(Cost())},
    )  # fmt: skip


def _scores(result: PolicyResult, benchmark: str) -> Scores:
    return {
        key: np.array([metric(question, name) for name in METRICS], dtype=np.float64)
        for key, question in result.evaluated.results.items()
        if benchmark in (ALL, key[0])
    }


def _figures(by_seed: Mapping[int, Scores], seed: int) -> dict[str, Figure]:
    keys = sorted({key for scores in by_seed.values() for key in scores})
    if not keys:
        return {}
    absent = np.full(len(METRICS), np.nan)
    # [metrics, seeds, questions]
    table = np.stack([[scores.get(key, absent) for key in keys] for scores in by_seed.values()]).transpose(2, 0, 1)
    present = [i for i in range(len(METRICS)) if not np.isnan(table[i]).all()]
    intervals = intervals_over_seeds(table[present], seed=seed)
    return {
        METRICS[i]: Figure(mean=float(np.nanmean(table[i])), interval=interval)
        for i, interval in zip(present, intervals, strict=True)
    }


def _policies_before(to: PolicyResult, results: Sequence[PolicyResult]) -> list[PolicyResult]:
    """The policies before ``to`` in its run; for the last policy including itself, whose lead was measured after it."""
    run = [result for result in results if (result.variant, result.seed) == (to.variant, to.seed)]
    return run if to.last else run[: run.index(to)]


def _notes(results: Sequence[PolicyResult], variants: Sequence[str]) -> Iterator[str]:
    first = {name: next(result for result in results if result.variant == name) for name in variants}
    yield from compare.mixed([first[name].evaluated for name in variants], allowed=True)
    seeds = {name: {result.seed for result in results if result.variant == name} for name in variants}
    every = set().union(*seeds.values())
    for name, own in seeds.items():
        if missing := every - own:
            yield f"{name} lacks seed {', '.join(map(str, sorted(missing)))}: differences are over the seeds that both have"
    if len(every) == 1:
        yield "one seed: intervals are over questions only and do not cover variation between runs"


def _records(row: VariantRow, reference: str) -> Iterator[dict[str, Any]]:
    for name, value in row.metrics.items():
        difference = row.differences.get(name)
        low, high = difference.interval if difference else (None, None)
        yield {
            "variant": row.variant, "stage": row.stage, "benchmark": row.benchmark, "metric": name,
            "seeds": len(row.seeds), "questions": row.questions, "mean": value.mean, "low": value.interval[0],
            "high": value.interval[1], "reference": reference, "difference": difference.mean if difference else None,
            "difference_low": low, "difference_high": high,
        }  # fmt: skip
