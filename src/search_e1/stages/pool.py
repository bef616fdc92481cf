"""The pool: trajectories that pairs are mined from, freshly sampled or kept by GRPO."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_e1 import runs
from search_e1.config import Config
from search_e1.errors import RunError
from search_e1.rollout import pool
from search_e1.runs import ranks
from search_e1.runs.context import StageContext
from search_e1.runs.stage_id import StageId
from search_e1.stages.inputs import Inputs, subsample
from search_e1.stages.stage import Stage, sections


@dataclass(frozen=True, slots=True)
class Pool(Stage):
    """Samples groups from ``policy`` into ``groups.jsonl``."""

    policy: str | Path
    round: int

    @property
    def id(self) -> StageId:
        return StageId("pool", self.round)

    def settings(self, config: Config) -> Mapping[str, Any]:
        return sections(config, "pool", "rollout")

    def inputs(self, run: Inputs) -> Mapping[str, str]:
        return run.sampled_on(self.policy)

    def work(self, run: Inputs, context: StageContext) -> Mapping[str, Any]:
        config = run.config
        questions = subsample(run.train_questions, config.pool.questions, context.seed)
        with run.engine(self.policy) as (engine, prompts):
            return pool.sample(
                engine, run.retriever, questions, prompts, config.pool, config.rollout,
                seed=context.seed, out=context.out, progress=context.progress, checkpointer=context.checkpointer,
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class KeptPool(Stage):
    """Takes the groups that GRPO kept beside ``policy``, for ``pool.source = "grpo"``."""

    policy: str | Path
    round: int
    parallel = False
    uses_device = False

    @property
    def id(self) -> StageId:
        return StageId("pool", self.round)

    @property
    def source(self) -> Path:
        return Path(self.policy).parent / pool.FILE

    def settings(self, config: Config) -> Mapping[str, Any]:
        return sections(config, "pool")

    def inputs(self, run: Inputs) -> Mapping[str, str]:
        """
        Raises:
            RunError: GRPO kept no groups.
        """
        if not self.source.is_file():
            raise RunError(
                f"{self.source}: missing; give a policy that GRPO has trained with grpo.keep_groups = true, or set "
                'pool.source = "fresh"'
            )
        return {"policy": run.checksum(self.policy), "groups": runs.checksum(self.source)}

    def work(self, run: Inputs, context: StageContext) -> Mapping[str, Any]:
        assert ranks.is_first()
        return pool.take(self.source, context.out, run.config.pool.questions)


def pool_stage(config: Config, policy: str | Path, round: int) -> Stage:
    """The pool stage for ``pool.source``."""
    return (KeptPool if config.pool.source == "grpo" else Pool)(policy, round)
