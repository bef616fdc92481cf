"""The evaluated policies of finished runs: scores and costs, as two tables.

A policy is charged with the full cost of making it alone: a stage shared by several variants is charged in full to each.
Evaluations and the index are not charged.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow
from pyarrow import parquet

from search_e1.evaluation import compare
from search_e1.evaluation.compare import Evaluated
from search_e1.evaluation.report.figures import cost
from search_e1.evaluation.report.files import Run as RunDirectory
from search_e1.evaluation.report.files import Stage, open_run, policy_of, read_json
from search_e1.evaluation.results import Result
from search_e1.lab.sweep.spec import Run
from search_e1.runs.stage_id import OF_ROUND

RESULTS, QUESTIONS = "results.parquet", "questions.parquet"
ALL = "all"
"""Instead of a benchmark: all questions, weighted equally."""
METRICS = ("em", "em_sampled", "f1", "searches", "tokens")
_POLICY = re.compile(r"base|coldstart|(?:grpo|ofsd)-\d+")


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of stages that train or sample for training."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    sampled_tokens: int = 0
    trained_tokens: int = 0
    """Tokens that entered a loss, counted each time."""
    steps: int = 0
    """Training steps."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Cost)))


@dataclass(frozen=True, slots=True)
class Lead:
    """A teacher's measured lead in EM, with its 95% interval."""

    lead: float | None = None
    lead_low: float | None = None
    lead_high: float | None = None


@dataclass(slots=True)
class PolicyResult:
    """One evaluated policy of a run."""

    variant: str
    seed: int
    stage: str
    """``base``, ``coldstart``, ``grpo-1``, ``ofsd-1``, ..."""
    evaluated: Evaluated
    last: bool = False
    own: Cost = Cost()
    """Cost since the previous policy; for the last policy, including a refused distillation after it."""
    charged: Cost = Cost()
    """Cost since the start of the run."""
    lead: Lead = Lead()
    """Lead of this policy as a teacher."""
    refused: bool | None = None
    """Whether distilling from it was refused; ``None`` if that was not attempted."""


def read_results(run: Run) -> list[PolicyResult]:
    """The evaluated policies of a finished run, in loop order.

    Raises:
        RunError: a manifest or an evaluation is missing or damaged.
    """
    directory = open_run(run.config.run)
    evaluations = {policy_of(stage): stage for stage in directory.evaluations if _POLICY.fullmatch(policy_of(stage))}
    results = {
        name: PolicyResult(run.variant, run.seed, name, compare.load(stage.path, f"{run.name}:{name}"))
        for name, stage in evaluations.items()
    }
    rounds = read_json(directory.path / "summary.json")["rounds"]
    policy, since = next(iter(results.values())), Cost()  # without a base policy, the first is the cold start's
    for kind, round, stage in _charged_stages(directory):
        since += _cost(stage)
        if kind == "pairs":
            policy.refused = bool(rounds[str(round)]["refused"])
        elif kind == "lead":
            measured = stage.figures
            lead = measured["em_privileged"] - measured["em_plain"]
            policy.lead = Lead(lead, measured["low"], measured["high"])
        elif stage.name in results:
            policy = results[stage.name]
            policy.own, since = since, Cost()
    policy.last = True
    policy.own += since
    charged = Cost()
    for result in results.values():
        charged += result.own
        result.charged = charged
    return list(results.values())


def _charged_stages(run: RunDirectory) -> Iterator[tuple[str, int, Stage]]:
    """Kind and round of each charged stage, in loop order; the cold start is of round 0."""
    if coldstart := run.stages.get("coldstart"):
        yield "coldstart", 0, coldstart
    by_kind = {kind: run.of_rounds(kind) for kind in OF_ROUND}
    for round in sorted(set().union(*by_kind.values())):
        yield from ((kind, round, stages[round]) for kind, stages in by_kind.items() if round in stages)


def _cost(stage: Stage) -> Cost:
    took = cost(stage)
    tokens = (took["sampled_tokens"] or 0, took["trained_tokens"] or 0)
    return Cost(took["seconds"], took["cpu_seconds"], *tokens, stage.figures.get("steps", 0))


def metric(result: Result, name: str) -> float | None:
    """The value of one of ``METRICS`` for a question; ``em_sampled`` is the mean over its samples, ``None`` without any."""
    if name == "em_sampled":
        return fmean(result.em_of_samples) if result.em_of_samples else None
    return float(getattr(result, name))


def policy_rows(results: Sequence[PolicyResult]) -> list[dict[str, Any]]:
    """One row per policy and benchmark, and one per policy for all questions together."""
    return [row for result in results for row in _policy_rows(result)]


def _policy_rows(result: PolicyResult) -> Iterator[dict[str, Any]]:
    questions = list(result.evaluated.results.values())
    for benchmark in (*dict.fromkeys(question.benchmark for question in questions), ALL):
        part = [question for question in questions if benchmark in (ALL, question.benchmark)]
        values = {name: [v for question in part if (v := metric(question, name)) is not None] for name in METRICS}
        yield {
            "variant": result.variant, "seed": result.seed, "stage": result.stage, "last": result.last,
            "benchmark": benchmark, "n": len(part), **{name: fmean(v) if v else None for name, v in values.items()},
            **asdict(result.lead), "refused": result.refused, **asdict(result.charged),
            **{f"stage_{name}": value for name, value in asdict(result.own).items()},
        }  # fmt: skip


def question_rows(results: Sequence[PolicyResult]) -> list[dict[str, Any]]:
    """One row per policy and question."""
    return [
        {
            "variant": result.variant, "seed": result.seed, "stage": result.stage, "last": result.last,
            "benchmark": question.benchmark, "id": question.id, "hops": question.hops,
            **{name: metric(question, name) for name in METRICS}, "failure": question.failure,
        }
        for result in results
        for question in result.evaluated.results.values()
    ]  # fmt: skip


def write_parquet(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write ``rows`` as a Parquet file. An empty column gets the type that it has in other files."""
    empty = {"hops": pyarrow.int64(), "failure": pyarrow.string(), "refused": pyarrow.bool_()}
    columns = {name: pyarrow.array([row[name] for row in rows]) for name in rows[0]}
    for name, column in columns.items():
        if pyarrow.types.is_null(column.type):
            columns[name] = column.cast(empty.get(name, pyarrow.float64()))
    partial = path.with_name(f".{path.name}.partial")
    parquet.write_table(pyarrow.table(columns), partial)
    partial.replace(path)
