"""Pairs mined from a pool, split into training pairs and held-out pairs for the lead."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_e1 import runs
from search_e1.config import Config
from search_e1.data import lines
from search_e1.rollout import pool
from search_e1.runs.context import StageContext
from search_e1.runs.stage_id import StageId
from search_e1.selfdistill import files
from search_e1.stages.inputs import Inputs
from search_e1.stages.stage import Stage, sections


@dataclass(frozen=True, slots=True)
class Pairs(Stage):
    """Writes ``train.jsonl`` and ``held_out.jsonl``. Figures: ``selfdistill.pairs.PoolHealth`` and the pair counts."""

    policy: str | Path
    pool: Path
    """The pool's directory."""
    round: int
    other_policy: bool = False
    """Whether a pool sampled by another policy is accepted."""
    parallel = False
    uses_device = False

    @property
    def id(self) -> StageId:
        return StageId("pairs", self.round)

    def settings(self, config: Config) -> Mapping[str, Any]:
        return sections(config, "reference", "pairs", "lead.pairs", "lead.max_share")

    def inputs(self, run: Inputs) -> Mapping[str, str]:
        """
        Raises:
            RunError: another policy sampled the pool.
        """
        sampled_by = run.sampled_by(self.pool, self.policy, self.other_policy)
        inputs = {"policy": sampled_by, "reader": run.checksum(self.policy)}
        if run.config.pairs.references_by == "gold" and run.config.data.demonstrations:
            inputs["demonstrations"] = lines.checksum(run.config.data.demonstrations)
        if (self.pool / pool.FILE).is_file():
            inputs["pool"] = runs.checksum(self.pool / pool.FILE)
        return inputs

    def work(self, run: Inputs, context: StageContext) -> Mapping[str, Any]:
        """
        Raises:
            DataError: the pool was sampled with another tokenizer.
        """
        reader = run.load_reader(self.policy)
        return files.mine(self.pool / pool.FILE, reader, run.config, seed=context.seed, out=context.out)
