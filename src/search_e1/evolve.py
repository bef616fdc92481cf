"""The outer loop: rounds of GRPO and self-distillation; each stage is an artifact of the run."""

import logging
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from search_e1 import runs
from search_e1.agent.make import SUMMARY, bundle_of_run
from search_e1.config import NEW, Config, migrate_fingerprint
from search_e1.errors import NoLeadError
from search_e1.evaluation.preflight import Finding, Level
from search_e1.evaluation.results import Evaluation
from search_e1.evaluation.statistics import Interval
from search_e1.runs import Artifact, notebook, ranks
from search_e1.runs.opening import opened
from search_e1.runs.stopping import Stop
from search_e1.selfdistill.lead import Lead
from search_e1.stages import preflight
from search_e1.stages.coldstart import Coldstart
from search_e1.stages.distill import Distill
from search_e1.stages.evaluate import Evaluate, Recall
from search_e1.stages.grpo import Grpo
from search_e1.stages.inputs import Inputs, Watch, no_progress
from search_e1.stages.lead import MeasureLead
from search_e1.stages.pairs import Pairs
from search_e1.stages.pool import pool_stage
from search_e1.stages.runner import StageRunner
from search_e1.stages.stage import Stage
from search_e1.training.guard import Collapse
from search_e1.training.sources import resolve
from search_e1.types import Record

logger = logging.getLogger(__name__)


class PolicySummary(Record):
    """One evaluated policy."""

    stage: str
    """``base``, ``coldstart``, ``grpo-1``, ``ofsd-1``, ``grpo-2``, ..."""
    path: str
    n: int
    """Number of questions."""
    em: float
    """Greedy EM, mean over all questions (micro average). Intervals are 95%: see ``evaluation.statistics``."""
    em_interval: Interval
    em_sampled: float | None
    """EM of trajectories sampled at ``evaluation.temperature``, micro average."""
    em_sampled_interval: Interval | None
    macro_em: float
    """Greedy EM, mean over benchmarks."""
    macro_em_interval: Interval
    f1: float
    searches: float
    tokens: float
    """Sampled tokens per question."""
    by_hops: dict[str, float]
    """Greedy EM by number of hops."""
    by_benchmark: dict[str, float]
    """Greedy EM by benchmark."""


class RoundSummary(Record):
    """The pairs and the lead of one round, and whether it was distilled."""

    pairs: dict[str, Any]
    """Pool health and numbers of pairs."""
    lead: Lead | None
    """``None`` without pairs to measure it on, or without a teacher (``distill.objective = "sft"``)."""
    refused: str | None
    """Why distillation was refused, if it was."""


class Summary(Record):
    """The contents of ``summary.json``."""

    seed: int
    policies: tuple[PolicySummary, ...]
    rounds: dict[str, RoundSummary]
    lead: dict[str, float | None]
    """Round -> the teacher's lead in sampled EM."""
    seconds: dict[str, float]
    """Wall-clock time by stage."""
    preflight: tuple[Finding, ...] = ()
    """Preflight findings about the data and the initial policy of round 1."""
    stopped_early: dict[str, Collapse] = {}
    """GRPO stages that the guard stopped, and why."""

    @property
    def policy(self) -> Path:
        """The directory of the last policy."""
        return Path(self.policies[-1].path)

    def _repr_html_(self) -> str:
        """For notebooks: one row per policy."""
        headings = ("policy", "n", "greedy EM (micro)", "sampled EM (micro)", "greedy EM (macro)", "searches", "tokens")
        rows = [
            (
                policy.stage,
                str(policy.n),
                _with_interval(policy.em, policy.em_interval),
                _with_interval(policy.em_sampled, policy.em_sampled_interval),
                _with_interval(policy.macro_em, policy.macro_em_interval),
                f"{policy.searches:.2f}",
                f"{policy.tokens:.0f}",
            )
            for policy in self.policies
        ]
        lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
        head = "".join(f"<th>{heading}</th>" for heading in headings)
        refused = (f"round {name}: not distilled: {round.refused}" for name, round in self.rounds.items() if round.refused)
        notes = "".join(f"<p>{escape(note)}</p>" for note in refused)
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>{notes}"


def _with_interval(em: float | None, interval: Interval | None) -> str:
    return f"{em:.3f} ({interval[0]:.3f}-{interval[1]:.3f})" if em is not None and interval else ""


def train(
    config: Config,
    watch: Watch | None = None,
    stop: Stop | None = None,
    *,
    branch_of: Path | None = None,
    shared: Path | None = None,
    other_versions: bool = False,
) -> Summary:
    """Run or resume the whole loop in ``config.run``; returns the summary that is written to ``summary.json``.

    Under torchrun all ranks call this; rank 0 decides and writes.

    Args:
        watch: receives progress; by default one line per stage in a notebook, and nothing elsewhere.
        stop: says when to stop; see ``stopping.on_signals``.
        branch_of: another run, whose finished artifacts are reused where ``config`` would make the same ones.
        shared: a directory in which several runs share identical artifacts.
        other_versions: resume a run that was started with other versions of the packages that affect results.

    Raises:
        SearchE1Error: a mistake in config, data or policy (before any training), a failed part, another run's directory.
        Stopped: a signal stopped the run; call again to resume.
    """
    with opened(
        config.run,
        config.fingerprint(),
        migrate=migrate_fingerprint,
        branch_of=branch_of,
        shared=shared,
        other_versions=other_versions,
    ) as root:
        run = Inputs(config, root, watch or (notebook.watch(config.rounds) if notebook.in_notebook() else no_progress))
        runner = StageRunner(run, stop)
        runner.check()
        for stage in _first_stages(config):
            stage.check(run)
        run.check(config.policy.model)
        summary = _Summary(runner)
        policy: str | Path = config.policy.model
        if policy != NEW:
            summary.evaluate("base", policy)
        if config.coldstart:
            policy = summary.make(Coldstart()).path / "policy"
            summary.evaluate("coldstart", policy)
        if config.preflight != "off":
            summary.judge(policy)
        for round in range(1, config.rounds + 1):
            if config.grpo.steps:
                trained = summary.make(Grpo(policy, round))
                policy = trained.path / "policy"
                summary.evaluate(trained.manifest.stage, policy)
            if not config.distills(round):
                continue
            pool = summary.make(pool_stage(config, policy, round))
            pairs = summary.make(Pairs(policy, pool.path, round))
            if not pairs.manifest.result["train_pairs"]:
                summary.end_round(round, pairs, None, refused="no pairs: " + _why_no_pairs(pairs))
                continue
            lead = summary.make(MeasureLead(policy, pairs.path, round)) if config.distill.has_teacher else None
            try:
                distilled = summary.make(Distill(policy, pairs.path, lead.path if lead else None, round))
            except NoLeadError as error:
                summary.end_round(round, pairs, lead, refused=str(error))
                continue
            summary.end_round(round, pairs, lead)
            policy = distilled.path / "policy"
            summary.evaluate(distilled.manifest.stage, policy)
        written = summary.write()
        if config.bundle and ranks.is_first():
            bundle_of_run(root, run.checksum(policy))
        return written


def _first_stages(config: Config) -> Iterator[Stage]:
    """One stage of each kind that has checks to run before the loop."""
    policy = config.policy.model
    if config.coldstart:
        yield Coldstart()
    if config.grpo.steps:
        yield Grpo(policy, 1)
    if config.distillations:
        yield Distill(policy, Path(), None, 1)


def _why_no_pairs(pairs: Artifact) -> str:
    counts = {name: value for name, value in pairs.manifest.result.items() if isinstance(value, int) and value}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in counts.items())


class _Summary:
    """Collects the summary while the loop runs; rewrites the file after every addition, so that it shows what is complete."""

    def __init__(self, runner: StageRunner) -> None:
        self.runner = runner
        self.config = runner.run.config
        self.policies: list[PolicySummary] = []
        self.rounds: dict[str, RoundSummary] = {}
        self.seconds: dict[str, float] = {}
        self.findings: tuple[Finding, ...] = ()
        self.stopped: dict[str, Collapse] = {}

    def make(self, stage: Stage) -> Artifact:
        artifact = self.runner.make(stage)
        self.seconds[artifact.manifest.stage] = artifact.manifest.seconds
        if collapse := artifact.manifest.result.get("stopped_early"):
            self.stopped[artifact.manifest.stage] = Collapse.model_validate(collapse)
        return artifact

    def evaluate(self, name: str, policy: str | Path) -> None:
        recall = self.make(Recall()) if self.config.evaluation.recall else None
        self.evaluation = self.make(Evaluate(policy, name, recall))
        result = Evaluation.model_validate(self.evaluation.manifest.result)
        self.policies.append(
            PolicySummary(
                stage=name,
                path=str(resolve(str(policy))),
                n=result.n,
                em=result.em,
                em_interval=result.em_interval,
                em_sampled=result.em_sampled,
                em_sampled_interval=result.em_sampled_interval,
                macro_em=result.macro_em,
                macro_em_interval=result.macro_em_interval,
                f1=result.f1,
                searches=result.searches,
                tokens=result.tokens,
                by_hops={str(hops): row.em for hops, row in result.by_hops.items()},
                by_benchmark={name: row.em for name, row in result.by_benchmark.items()},
            )
        )
        self.write()

    def judge(self, policy: str | Path) -> None:
        """Run the preflight on the data and the latest evaluation, which is of ``policy``; log the findings.

        Raises:
            PreflightError: the run cannot learn, and ``preflight`` is ``stop``.
        """
        self.findings = tuple(preflight.read(self.make(preflight.Preflight(policy, self.evaluation)), self.config))
        self.write()
        if self.config.preflight == "stop":
            preflight.refuse(self.findings)
        for finding in self.findings if ranks.is_first() else ():
            level = logging.DEBUG if finding.level is Level.OK else logging.WARNING
            logger.log(level, "preflight, %s: %s", finding.check, f"{finding.text} {finding.remedy}".strip())

    def end_round(self, round: int, pairs: Artifact, lead: Artifact | None, refused: str | None = None) -> None:
        measured = Lead.model_validate(lead.manifest.result) if lead else None
        self.rounds[str(round)] = RoundSummary(pairs=pairs.manifest.result, lead=measured, refused=refused)
        self.write()

    def write(self) -> Summary:
        summary = Summary(
            seed=self.config.seed,
            policies=tuple(self.policies),
            rounds=self.rounds,
            lead={name: round.lead.lead if round.lead else None for name, round in self.rounds.items()},
            seconds=self.seconds,
            preflight=self.findings,
            stopped_early=self.stopped,
        )
        if ranks.is_first():
            runs.write_atomically(self.runner.run.root / SUMMARY, summary.model_dump_json(indent=2) + "\n")
        return summary
