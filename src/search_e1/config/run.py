"""The configuration of a run: all sections, and checks across them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from search_e1.config.base import NonNegative, Positive, Section
from search_e1.config.coldstart import ColdstartConfig
from search_e1.config.distill import DistillConfig, LeadConfig, PairsConfig, PoolConfig, ReferenceConfig
from search_e1.config.grpo import GrpoConfig
from search_e1.config.inputs import NEW, DataConfig, PolicyConfig, RetrievalConfig
from search_e1.config.presets import Preset, apply_preset
from search_e1.config.prompts import Prompts
from search_e1.config.rollout import EvaluationConfig, RolloutConfig, VllmConfig
from search_e1.config.running import CheckpointsConfig, ParallelConfig, TrackingConfig


class Config(Section):
    """Everything a run depends on."""

    run: Path
    """Directory of the run."""
    seed: NonNegative = 0
    """Every stage derives its own seed from it."""
    preset: Preset = "search-e1"
    """Values of keys that are not given. `search-e1`: the defaults listed here: the published method, with the lead as a gate
    and a collapse guard, which it does not have (`lead.enforce = false` and `grpo.guard.drop = 0` turn them off). `harmless`:
    distill once, with verified teachers, merged at a strength that costs no EM on training questions (when-it-pays.md).
    `concise`: distill once with all teachers; the next round's GRPO repairs the damage."""
    rounds: Positive = 2
    """Rounds of GRPO and OFSD."""
    ofsd: Literal["every_round", "first_round", "last_round", "never"] = "every_round"
    """Rounds that distill after GRPO; other rounds sample no pool and measure no lead. `never`: GRPO alone."""
    preflight: Literal["stop", "warn", "off"] = "stop"
    """Before the first round: stop a run that certainly cannot learn and name the remedy, only warn, or skip the check
    (docs/doctor.md). Does not affect results; may change during a run."""
    bundle: bool = True
    """At the end of `train`, export the last policy as a bundle to use and share: `agent` in the run directory (docs/agent.md).
    Does not affect results; may change during a run."""
    policy: PolicyConfig
    prompts: Prompts | None = None
    """Prompt templates. Default: those saved with the policy (`search_e1.json` in its directory), else Search-R1's."""
    data: DataConfig
    retrieval: RetrievalConfig = RetrievalConfig()
    rollout: RolloutConfig = RolloutConfig()
    vllm: VllmConfig = VllmConfig()
    grpo: GrpoConfig = GrpoConfig()
    pool: PoolConfig = PoolConfig()
    reference: ReferenceConfig = ReferenceConfig()
    pairs: PairsConfig = PairsConfig()
    lead: LeadConfig = LeadConfig()
    distill: DistillConfig = DistillConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    parallel: ParallelConfig = ParallelConfig()
    coldstart: ColdstartConfig | None = None
    """Fine-tuning on demonstrations before the first round; only if this section is present."""

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, given: Any) -> Any:
        return apply_preset(given.get("preset"), given) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _has_passages(self) -> "Config":
        if not (self.data.corpus or self.retrieval.index or self.retrieval.url):
            raise ValueError("no passages: give data.corpus, retrieval.index or retrieval.url")
        return self

    @model_validator(mode="after")
    def _has_groups(self) -> "Config":
        if self.pool.source == "grpo" and not (self.grpo.keep_groups and self.grpo.steps):
            raise ValueError('pool.source = "grpo" needs grpo.keep_groups = true and grpo.steps; set them, or source = "fresh"')
        return self

    @model_validator(mode="after")
    def _has_demonstrations(self) -> "Config":
        if self.pairs.references_by == "gold" and not self.data.demonstrations:
            raise ValueError('pairs.references_by = "gold" needs data.demonstrations; give the path of that file')
        return self

    @model_validator(mode="after")
    def _starts(self) -> "Config":
        if self.policy.model == NEW and not self.coldstart:
            raise ValueError(f'policy.model = "{NEW}" needs the section [coldstart], which teaches it; add it')
        return self

    @model_validator(mode="after")
    def _trains(self) -> "Config":
        if self.ofsd == "never" and not self.grpo.steps:
            raise ValueError('ofsd = "never" and grpo.steps = 0 leave nothing to do; change one of them')
        return self

    def distills(self, round: int) -> bool:
        """Whether ``round`` (from 1) ends with distillation, given a lead."""
        only = {"first_round": 1, "last_round": self.rounds}
        return self.ofsd == "every_round" or only.get(self.ofsd) == round

    @property
    def distillations(self) -> int:
        """Number of rounds that distill."""
        return sum(self.distills(round) for round in range(1, self.rounds + 1))

    @property
    def evaluated_policies(self) -> int:
        """Number of policies that a run evaluates, if no distillation is refused."""
        return (self.policy.model != NEW) + bool(self.coldstart) + self.distillations + (self.rounds if self.grpo.steps else 0)

    def fingerprint(self) -> dict[str, Any]:
        """Identifies a run directory, as JSON: all settings except its path and those that do not affect results."""
        waiting = {"timeout", "attempts", "time_limit", "cache"}
        place = {"url", "timeout", "gpu_memory_utilization", "shared_gpu_memory_utilization"}
        return self.model_dump(
            mode="json",
            exclude={
                "run": True,
                "preset": True,
                "preflight": True,
                "bundle": True,
                "tracking": True,
                "checkpoints": True,
                "parallel": True,
                "retrieval": waiting,
                "rollout": {"rewards": {"judge": {"timeout", "time_limit", "concurrency", "cache"}}},
                "vllm": place,
            },
        )
