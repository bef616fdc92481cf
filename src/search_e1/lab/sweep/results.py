"""What a sweep came to, as two tables: a row for each evaluated policy and benchmark, and one for each question.

What a policy is charged with is what it takes to make it alone: a stage that several variants share costs each of them all
of it. Evaluations and the index are charged to nobody.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from search_e1.evaluation import compare
from search_e1.evaluation.compare import Evaluated
from search_e1.evaluation.report.figures import cost
from search_e1.evaluation.report.files import Run as RunDirectory
from search_e1.evaluation.report.files import Stage, open_run, policy_of, read_json
from search_e1.evaluation.results import Result
from search_e1.lab.sweep.spec import Run

RESULTS, QUESTIONS = "results.parquet", "questions.parquet"
ALL = "all"
"""In the place of a benchmark: all questions, each of which counts the same."""
FIGURES = ("em", "em_sampled", "f1", "searches", "tokens")
_POLICY = re.compile(r"base|(?:grpo|ofsd)-\d+")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of stages that train, or that are sampled for training."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    sampled_tokens: int = 0
    trained_tokens: int = 0
    """Tokens that entered a loss, each as often as it did."""
    steps: int = 0
    """Of an optimiser."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Cost)))

    def columns(self, prefix: str = "") -> dict[str, Any]:
        return {f"{prefix}{field.name}": getattr(self, field.name) for field in fields(Cost)}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluated policy of a run."""

    variant: str
    seed: int
    stage: str
    """``base``, ``grpo-1``, ``ofsd-1``, ..."""
    last: bool
    """The run's last policy."""
    evaluated: Evaluated
    own: Cost
    """Since the policy before it. Of the last policy: with what came after it, a refused distillation."""
    charged: Cost
    """Since the base policy."""
    lead: dict[str, float | None]
    """Of the teacher that this policy is, where it was measured: ``lead``, ``lead_low``, ``lead_high``."""
    refused: bool | None
    """Whether distilling from it was refused; ``None`` where that was not tried."""


def evaluations(run: Run) -> list[Evaluation]:
    """The evaluated policies of a finished run, in the order of the loop.

    Raises:
        RunError: a manifest or an evaluation is missing or damaged.
    """
    opened = open_run(run.config.run)
    places = [stage for stage in opened.evaluations if _POLICY.fullmatch(policy_of(stage))]
    order = [(policy_of(stage), stage) for stage in places]
    own: dict[str, Cost] = {name: Cost() for name, _ in order}
    leads: dict[str, Stage] = {}
    refused: dict[str, bool] = {}
    policy, since = "base", Cost()
    refusals = {
        number for number, round in read_json(opened.path / "summary.json")["rounds"].items() if round["refused"]
    }
    for name, stage in _training(opened):
        kind, _, number = name.partition("-")
        since += _cost(stage)
        if kind == "pairs":
            refused[policy] = number in refusals
        if kind == "lead":
            leads[policy] = stage
        if name in own:
            own[name], policy, since = since, name, Cost()
    own[policy] += since
    charged, found = Cost(), []
    for name, stage in order:
        charged += own[name]
        found.append(
            Evaluation(
                run.variant,
                run.seed,
                name,
                name == policy,
                compare.load(stage.path, f"{run.name}:{name}"),
                own[name],
                charged,
                _lead(leads.get(name)),
                refused.get(name),
            )
        )
    return found


def _training(run: RunDirectory) -> Iterator[tuple[str, Stage]]:
    """What is charged, in the order of the loop."""
    kinds = ("grpo", "pool", "pairs", "lead", "ofsd")
    by_kind = {kind: run.of_rounds(kind) for kind in kinds}
    for number in sorted({number for stages in by_kind.values() for number in stages}):
        for kind in kinds:
            if number in by_kind[kind]:
                yield f"{kind}-{number}", by_kind[kind][number]


def _cost(stage: Stage) -> Cost:
    told = cost(stage)
    steps = stage.manifest.settings["grpo"]["steps"] if stage.name.startswith("grpo") else stage.figures.get("steps", 0)
    return Cost(
        told["seconds"], told["cpu_seconds"], told["sampled_tokens"] or 0, told["trained_tokens"] or 0, steps
    )  # fmt: skip


def _lead(stage: Stage | None) -> dict[str, float | None]:
    if stage is None:
        return dict.fromkeys(("lead", "lead_low", "lead_high"))
    told = stage.figures
    return {"lead": told["em_privileged"] - told["em_plain"], "lead_low": told["low"], "lead_high": told["high"]}


def figure(result: Result, name: str) -> float | None:
    """One of ``FIGURES`` of a question; ``em_sampled`` is the mean over its samples, ``None`` without any."""
    if name == "em_sampled":
        return fmean(result.em_of_samples) if result.em_of_samples else None
    return float(getattr(result, name))


def rows(found: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """A row for each evaluation and benchmark, and for all questions together."""
    return [row for evaluation in found for row in _rows(evaluation)]


def _rows(of: Evaluation) -> Iterator[dict[str, Any]]:
    results = list(of.evaluated.results.values())
    for benchmark in (*dict.fromkeys(result.benchmark for result in results), ALL):
        part = [result for result in results if benchmark in (ALL, result.benchmark)]
        yield {
            "variant": of.variant, "seed": of.seed, "stage": of.stage, "last": of.last, "benchmark": benchmark,
            "n": len(part), **{name: _mean(part, name) for name in FIGURES}, **of.lead, "refused": of.refused,
            **of.charged.columns(), **of.own.columns("stage_"),
        }  # fmt: skip


def _mean(results: Sequence[Result], name: str) -> float | None:
    values = [value for result in results if (value := figure(result, name)) is not None]
    return fmean(values) if values else None


def question_rows(found: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """A row for each evaluation and question."""
    return [
        {
            "variant": of.variant, "seed": of.seed, "stage": of.stage, "last": of.last, "benchmark": result.benchmark,
            "id": result.id, "hops": result.hops, **{name: figure(result, name) for name in FIGURES},
            "failure": result.failure,
        }
        for of in found
        for result in of.evaluated.results.values()
    ]  # fmt: skip


_TEXTS = ("variant", "stage", "benchmark", "id", "failure", "figure", "reference")
_BOOLS = ("last", "refused")
_COUNTS = ("seed", "n", "hops", "seeds", "questions")


def write_parquet(table: Sequence[dict[str, Any]], path: Path) -> None:
    """``table`` as a Parquet file; every column has the same type whatever is in it."""
    import pyarrow
    from pyarrow import parquet

    def kind(name: str) -> Any:
        if name in _TEXTS:
            return pyarrow.string()
        if name in _BOOLS:
            return pyarrow.bool_()
        whole = name in _COUNTS or name.endswith(("sampled_tokens", "trained_tokens", "steps"))
        return pyarrow.int64() if whole else pyarrow.float64()

    schema = pyarrow.schema([(name, kind(name)) for name in table[0]])
    partial = path.with_name(f".{path.name}.partial")
    parquet.write_table(pyarrow.Table.from_pylist(list(table), schema), partial)
    partial.replace(path)
