"""The outer loop: GRPO and self-distillation, round after round, each stage an artifact of the run."""

from pathlib import Path
from typing import Any

from search_e1 import runs
from search_e1.config import Config, bound_now
from search_e1.errors import NoLeadError
from search_e1.runs import Artifact
from search_e1.runs.opening import opened
from search_e1.runs.stopping import Stop
from search_e1.selfdistill.lead import Lead
from search_e1.stages.all import Stages, read_evaluation
from search_e1.stages.inputs import Watch, unwatched
from search_e1.training import policy as policies
from search_e1.types import Record

SUMMARY = "summary.json"


class PolicySummary(Record):
    """One evaluated policy."""

    stage: str
    """``base``, ``grpo-1``, ``ofsd-1``, ``grpo-2``, ..."""
    path: str
    em: float
    """Greedy, mean over all questions."""
    em_sampled: float | None
    f1: float
    searches: float
    tokens: float
    """Sampled tokens a question."""
    by_hops: dict[str, float]
    """EM by number of hops."""
    by_benchmark: dict[str, float]
    """EM by benchmark."""


class RoundSummary(Record):
    """What the distillation of one round had to go by."""

    pairs: dict[str, Any]
    """The pool's health and the numbers of pairs."""
    lead: Lead | None
    """``None`` where there was no pair to measure it on, or no teacher (``distill.objective = "sft"``)."""
    refused: str | None
    """Why nothing was distilled, if nothing was."""


class Summary(Record):
    """What ``summary.json`` holds."""

    seed: int
    policies: tuple[PolicySummary, ...]
    rounds: dict[str, RoundSummary]
    lead: dict[str, float | None]
    """Round -> the teacher's lead in EM."""
    seconds: dict[str, float]
    """Wall-clock time by stage."""

    @property
    def policy(self) -> Path:
        """The directory of the last policy."""
        return Path(self.policies[-1].path)


def train(
    config: Config,
    watch: Watch = unwatched,
    stop: Stop | None = None,
    *,
    branch_of: Path | None = None,
    shared: Path | None = None,
    other_versions: bool = False,
) -> Summary:
    """Run the whole loop in ``config.run``, or what is left of it; returns what ``summary.json`` then holds.

    ``stop`` says when to stop; see ``stopping.on_signals``. ``branch_of``: another run, whose finished artifacts are taken over
    where ``config`` would make the same.
    ``shared``: a directory where several runs share the artifacts that they would make the same.
    ``other_versions``: go on with a run that was begun under other versions of the packages that decide about results.
    On all machines of a run but the first this takes part in its stages.

    Raises:
        SearchE1Error: a mistake in config, data or policy (before any training), a failed part, another run's directory.
        Stopped: a signal ended it; to go on, call it again.
    """
    if Stages(config, config.run, watch, stop).follow():
        return Summary.model_validate_json((config.run / SUMMARY).read_text(encoding="utf-8"))
    with (
        opened(
            config.run,
            config.binding(),
            bound_now=bound_now,
            branch_of=branch_of,
            shared=shared,
            other_versions=other_versions,
        ) as root,
        (stages := Stages(config, root, watch, stop)).together(),
    ):
        stages.check(config.policy.model)
        stages.check_memory(config.policy.model, "grpo", "distill")
        summary = _Summary(config, stages)
        policy: str | Path = config.policy.model
        summary.evaluate("base", policy)
        for round in range(1, config.rounds + 1):
            if config.grpo.steps:
                grpo = summary.add(stages.grpo(policy, round))
                policy = grpo.path / "policy"
                summary.evaluate(f"grpo-{round}", policy)
            if not config.distills(round):
                continue
            pool = summary.add(stages.pool(policy, round))
            pairs = summary.add(stages.pairs(policy, pool.path, round))
            if not pairs.manifest.result["train_pairs"]:
                summary.refuse(round, pairs, None, "no pairs: " + _why_no_pairs(pairs))
                continue
            taught = config.distill.objective == "ofsd"
            lead = summary.add(stages.lead(policy, pairs.path, round)) if taught else None
            try:
                ofsd = summary.add(stages.distill(policy, pairs.path, lead.path if lead else None, round))
            except NoLeadError as error:
                summary.refuse(round, pairs, lead, str(error))
                continue
            summary.distilled(round, pairs, lead)
            policy = ofsd.path / "policy"
            summary.evaluate(f"ofsd-{round}", policy)
        return summary.write()


def _why_no_pairs(pairs: Artifact) -> str:
    health = {k: v for k, v in pairs.manifest.result.items() if isinstance(v, int)}
    return ", ".join(f"{name} {value}" for name, value in health.items())


class _Summary:
    """Collects while the loop runs, and writes after every addition, so that a look at the file shows what there is."""

    def __init__(self, config: Config, stages: Stages) -> None:
        self.config = config
        self.stages = stages
        self.policies: list[PolicySummary] = []
        self.rounds: dict[str, RoundSummary] = {}
        self.seconds: dict[str, float] = {}

    def add(self, artifact: Artifact) -> Artifact:
        self.seconds[artifact.manifest.stage] = artifact.manifest.seconds
        return artifact

    def evaluate(self, name: str, policy: str | Path) -> None:
        artifact = self.add(self.stages.evaluate(policy, name))
        result = read_evaluation(artifact)
        self.policies.append(
            PolicySummary(
                stage=name,
                path=str(policies.resolve(str(policy))),
                em=result.em,
                em_sampled=result.em_sampled,
                f1=result.f1,
                searches=result.searches,
                tokens=result.tokens,
                by_hops={str(hops): row.em for hops, row in result.by_hops.items()},
                by_benchmark={name: row.em for name, row in result.by_benchmark.items()},
            )
        )
        self.write()

    def distilled(self, round: int, pairs: Artifact, lead: Artifact | None) -> None:
        self._round(round, pairs, lead, None)

    def refuse(self, round: int, pairs: Artifact, lead: Artifact | None, why: str) -> None:
        self._round(round, pairs, lead, why)
        self.write()

    def _round(self, round: int, pairs: Artifact, lead: Artifact | None, refused: str | None) -> None:
        measured = Lead.model_validate(lead.manifest.result) if lead else None
        self.rounds[str(round)] = RoundSummary(pairs=pairs.manifest.result, lead=measured, refused=refused)

    def write(self) -> Summary:
        summary = Summary(
            seed=self.config.seed,
            policies=tuple(self.policies),
            rounds=self.rounds,
            lead={name: round.lead.lead if round.lead else None for name, round in self.rounds.items()},
            seconds=self.seconds,
        )
        runs.write_atomically(self.stages.root / SUMMARY, summary.model_dump_json(indent=2) + "\n")
        return summary
