"""The evaluated policies of finished runs: what they scored and what they cost, as two tables.

A policy is charged with all that it takes to make it alone: a stage that several variants share costs each of them all of it.
Evaluations and the index are charged to nobody.
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

RESULTS, QUESTIONS = "results.parquet", "questions.parquet"
ALL = "all"
"""In place of a benchmark: all questions, each of which counts the same."""
METRICS = ("em", "em_sampled", "f1", "searches", "tokens")
_POLICY = re.compile(r"base|(?:grpo|ofsd)-\d+")
_CHARGED = ("grpo", "pool", "pairs", "lead", "ofsd")
"""In the order of the loop."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of stages that train, or that are sampled for training."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    sampled_tokens: int = 0
    trained_tokens: int = 0
    """Tokens that entered a loss, each as often as it did."""
    steps: int = 0
    """Of an optimizer."""

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
    """``base``, ``grpo-1``, ``ofsd-1``, ..."""
    evaluated: Evaluated
    last: bool = False
    own: Cost = Cost()
    """Since the policy before it. Of the last policy: with what came after it, a refused distillation."""
    charged: Cost = Cost()
    """Since the base policy."""
    lead: Lead = Lead()
    """Of the teacher that this policy is."""
    refused: bool | None = None
    """Whether distilling from it was refused; ``None`` where that was not tried."""


def read_results(run: Run) -> list[PolicyResult]:
    """The evaluated policies of a finished run, in the order of the loop.

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
    policy, since = results["base"], Cost()
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
    by_kind = {kind: run.of_rounds(kind) for kind in _CHARGED}
    for round in sorted(set().union(*by_kind.values())):
        yield from ((kind, round, stages[round]) for kind, stages in by_kind.items() if round in stages)


def _cost(stage: Stage) -> Cost:
    took = cost(stage)
    steps = stage.manifest.settings["grpo"]["steps"] if stage.name.startswith("grpo") else stage.figures.get("steps", 0)
    tokens = (took["sampled_tokens"] or 0, took["trained_tokens"] or 0)
    return Cost(took["seconds"], took["cpu_seconds"], *tokens, steps)


def metric(result: Result, name: str) -> float | None:
    """One of ``METRICS`` of a question; ``em_sampled`` is the mean over its samples, ``None`` without any."""
    if name == "em_sampled":
        return fmean(result.em_of_samples) if result.em_of_samples else None
    return float(getattr(result, name))


def policy_rows(results: Sequence[PolicyResult]) -> list[dict[str, Any]]:
    """A row for each policy and benchmark, and for all questions together."""
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
    """A row for each policy and question."""
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
    """``rows`` as a Parquet file. A column without any value has the type that it has elsewhere."""
    empty = {"hops": pyarrow.int64(), "failure": pyarrow.string(), "refused": pyarrow.bool_()}
    columns = {name: pyarrow.array([row[name] for row in rows]) for name in rows[0]}
    for name, column in columns.items():
        if pyarrow.types.is_null(column.type):
            columns[name] = column.cast(empty.get(name, pyarrow.float64()))
    partial = path.with_name(f".{path.name}.partial")
    parquet.write_table(pyarrow.table(columns), partial)
    partial.replace(path)
