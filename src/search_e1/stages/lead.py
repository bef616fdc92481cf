"""The teacher's lead, measured before every distillation."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_e1 import runs
from search_e1.config import Config
from search_e1.runs import ranks
from search_e1.runs.context import StageContext
from search_e1.runs.stage_id import StageId
from search_e1.selfdistill import files, lead, profile
from search_e1.stages.inputs import Inputs
from search_e1.stages.stage import Stage, sections

FILE = "lead.json"


@dataclass(frozen=True, slots=True)
class MeasureLead(Stage):
    """Measures the teacher's lead on the held-out pairs.

    Writes ``lead.json``, and ``kl.jsonl`` with the per-token divergence on these pairs.
    """

    policy: str | Path
    pairs: Path
    """The pairs' directory."""
    round: int
    other_policy: bool = False
    """Whether pairs of another policy are accepted."""

    @property
    def id(self) -> StageId:
        return StageId("lead", self.round)

    def settings(self, config: Config) -> Mapping[str, Any]:
        return sections(config, "lead.samples", "rollout", "pool.temperature")

    def inputs(self, run: Inputs) -> Mapping[str, str]:
        """
        Raises:
            RunError: the pairs come from another policy.
        """
        run.sampled_by(self.pairs, self.policy, self.other_policy)
        return {**run.sampled_on(self.policy), "pairs": runs.checksum(self.pairs / files.HELD_OUT)}

    def work(self, run: Inputs, context: StageContext) -> Mapping[str, Any]:
        """
        Raises:
            DataError: no held-out pairs, or pairs of another tokenizer.
        """
        policy = run.load(self.policy)
        pairs = files.read(self.pairs / files.HELD_OUT, policy.tokenizer)
        with run.engine(self.policy, policy) as (engine, _):
            measured, divergences = lead.measure(
                policy, engine, run.retriever, pairs, run.config.lead, run.config.rollout,
                temperature=run.config.pool.temperature, seed=context.seed, progress=context.progress,
                checkpointer=context.checkpointer,
            )  # fmt: skip
        if ranks.is_first():
            (context.out / FILE).write_text(measured.model_dump_json(indent=2) + "\n")
            rows = "".join(row.model_dump_json() + "\n" for row in divergences)
            (context.out / profile.FILE).write_text(rows, encoding="utf-8")
        return measured.model_dump()
