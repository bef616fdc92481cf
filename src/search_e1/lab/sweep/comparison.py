"""The variants of a sweep beside its reference: means over seeds and questions, and paired differences."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from search_e1.evaluation import compare
from search_e1.evaluation.compare import Figure
from search_e1.evaluation.statistics import intervals_over_seeds
from search_e1.lab.sweep.results import ALL, FIGURES, Cost, Evaluation, figure
from search_e1.types import Record

FILE = "comparison.parquet"
LAST = "last"
"""In the place of a stage: the last policy of each run, whichever that is."""

Key = tuple[str, str]
"""Benchmark and id of a question."""


class Row(Record):
    """One variant at one stage on one benchmark, over its seeds. Intervals are over seeds and questions."""

    variant: str
    stage: str
    benchmark: str
    seeds: tuple[int, ...]
    questions: int
    """Distinct ones."""
    figures: dict[str, Figure]
    """By name, of ``results.FIGURES``; without ``em_sampled`` where nothing was sampled."""
    differences: dict[str, Figure]
    """The variant minus the reference, over the seeds and questions that both have; empty for the reference."""
    lead: float | None
    """Mean over seeds of the lead that was measured on the way to this stage last."""
    refused: int
    """Runs in which a distillation was refused on the way to this stage."""
    cost: dict[str, float]
    """Means over seeds of what is charged: fields of ``results.Cost``."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every variant at every stage, the reference first; and what a reader has to know."""

    reference: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def at(self, stage: str, benchmark: str = ALL) -> list[Row]:
        return [row for row in self.rows if (row.stage, row.benchmark) == (stage, benchmark)]

    def records(self) -> list[dict[str, Any]]:
        """A row for each variant, stage, benchmark and figure."""
        return [record for row in self.rows for record in _records(row, self.reference)]


def compared(found: Sequence[Evaluation], reference: str, seed: int = 0) -> Comparison:
    """``found`` compared with the variant ``reference``; ``seed`` is that of the bootstrap.

    Raises:
        ValueError: there is nothing to compare.
    """
    if not found:
        raise ValueError("no finished run")
    variants = sorted(dict.fromkeys(one.variant for one in found), key=lambda name: name != reference)
    stages = [*_in_order(found), LAST]
    benchmarks = list(dict.fromkeys(benchmark for one in found for benchmark, _ in one.evaluated.results))
    rows = []
    for stage in stages:
        at = [one for one in found if one.stage == stage or (stage == LAST and one.last)]
        by_variant = {name: {one.seed: one for one in at if one.variant == name} for name in variants}
        for benchmark in (ALL, *(benchmarks if len(benchmarks) > 1 else ())):
            rows += [
                _row(name, stage, benchmark, by_seed, by_variant[reference] if name != reference else {}, found, seed)
                for name, by_seed in by_variant.items()
                if by_seed
            ]
    return Comparison(reference, tuple(rows), tuple(_notes(found, variants)))


def _in_order(found: Sequence[Evaluation]) -> list[str]:
    def place(stage: str) -> tuple[int, int]:
        kind, _, number = stage.partition("-")
        return int(number or 0), ("base", "grpo", "ofsd").index(kind)

    return sorted({one.stage for one in found}, key=place)


def _row(
    variant: str,
    stage: str,
    benchmark: str,
    by_seed: dict[int, Evaluation],
    others: dict[int, Evaluation],
    found: Sequence[Evaluation],
    seed: int,
) -> Row:
    values = {number: _values(one, benchmark) for number, one in by_seed.items()}
    theirs = {number: _values(one, benchmark) for number, one in others.items() if number in values}
    paired = {
        number: {
            key: values[number][key] - theirs[number][key] for key in values[number].keys() & theirs[number].keys()
        }
        for number in theirs
    }
    way = [_way(one, found) for one in by_seed.values()]
    leads = [known[-1] for on_it in way if (known := [v for one in on_it if (v := one.lead["lead"]) is not None])]
    return Row(
        variant=variant,
        stage=stage,
        benchmark=benchmark,
        seeds=tuple(by_seed),
        questions=len({key for asked in values.values() for key in asked}),
        figures=_figures(values, seed),
        differences=_figures(paired, seed),
        lead=fmean(leads) if leads else None,
        refused=sum(any(one.refused for one in on_it) for on_it in way),
        cost={name: fmean(one.charged.columns()[name] for one in by_seed.values()) for name in Cost().columns()},
    )


def _values(one: Evaluation, benchmark: str) -> dict[Key, np.ndarray]:
    """Question -> its ``FIGURES``, NaN for what it lacks."""
    return {
        key: np.array([figure(result, name) for name in FIGURES], dtype=np.float64)
        for key, result in one.evaluated.results.items()
        if benchmark in (ALL, key[0])
    }


def _figures(by_seed: dict[int, dict[Key, np.ndarray]], seed: int) -> dict[str, Figure]:
    keys = sorted({key for asked in by_seed.values() for key in asked})
    if not keys:
        return {}
    absent = np.full(len(FIGURES), np.nan)
    # [figures, seeds, questions]
    table = np.stack([[asked.get(key, absent) for key in keys] for asked in by_seed.values()]).transpose(2, 0, 1)
    there = [i for i in range(len(FIGURES)) if not np.isnan(table[i]).all()]
    intervals = intervals_over_seeds(table[there], seed=seed)
    return {
        FIGURES[i]: Figure(mean=float(np.nanmean(table[i])), interval=interval)
        for i, interval in zip(there, intervals, strict=True)
    }


def _way(to: Evaluation, found: Sequence[Evaluation]) -> list[Evaluation]:
    """The policies of its run up to this one."""
    run = [one for one in found if (one.variant, one.seed) == (to.variant, to.seed)]
    end = len(run) if to.last else run.index(to)  # the lead on a policy is no way to that policy
    return run[:end]


def _notes(found: Sequence[Evaluation], variants: Sequence[str]) -> Iterator[str]:
    first = {name: next(one for one in found if one.variant == name) for name in variants}
    yield from compare.mixed([first[name].evaluated for name in variants], allowed=True)
    seeds = {name: {one.seed for one in found if one.variant == name} for name in variants}
    every = set().union(*seeds.values())
    for name, there in seeds.items():
        if missing := every - there:
            yield f"{name} lacks seed {', '.join(map(str, sorted(missing)))}: differences are over the seeds that both have"
    if len(every) == 1:
        yield "one seed: intervals are over questions alone, and say nothing of another run"


def _records(row: Row, reference: str) -> Iterator[dict[str, Any]]:
    for name, value in row.figures.items():
        difference = row.differences.get(name)
        low, high = difference.interval if difference else (None, None)
        yield {
            "variant": row.variant, "stage": row.stage, "benchmark": row.benchmark, "figure": name, "seeds": len(row.seeds),
            "questions": row.questions, "mean": value.mean, "low": value.interval[0], "high": value.interval[1],
            "reference": reference, "difference": difference.mean if difference else None,
            "difference_low": low, "difference_high": high,
        }  # fmt: skip
