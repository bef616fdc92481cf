"""Evaluation of a policy on the evaluation questions, and retrieval recall on them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_e1 import runs
from search_e1.config import Config
from search_e1.errors import ConfigError
from search_e1.evaluation import recall as recalls
from search_e1.evaluation.evaluate import evaluate
from search_e1.evaluation.results import EVALUATION, Evaluation
from search_e1.rollout.engines.endpoint import Endpoint
from search_e1.runs import Artifact
from search_e1.runs.context import StageContext
from search_e1.runs.safe import is_name
from search_e1.runs.stage_id import StageId
from search_e1.stages.inputs import Inputs
from search_e1.stages.stage import Stage, sections


@dataclass(frozen=True, slots=True)
class Recall(Stage):
    """Retrieval recall of each evaluation question, independent of the policy; writes ``recall.jsonl``."""

    parallel = False
    uses_device = False

    @property
    def id(self) -> StageId:
        return StageId("recall")

    def settings(self, config: Config) -> Mapping[str, Any]:
        return sections(config, "rollout", "data.max_eval")

    def inputs(self, run: Inputs) -> Mapping[str, str]:
        corpus = {"corpus": run.corpus_checksum} if run.config.retrieval.url and run.config.data.corpus else {}
        return {**run.evaluated_on(), **corpus}

    def work(self, run: Inputs, context: StageContext) -> Mapping[str, Any]:
        topk = run.config.rollout.topk
        rows = recalls.measure(run.retriever, run.passage_texts(), run.eval_questions, topk, context.progress)
        lines = "".join(row.model_dump_json() + "\n" for row in rows)
        (context.out / recalls.FILE).write_text(lines, encoding="utf-8")
        return recalls.figures(rows)


@dataclass(frozen=True, slots=True)
class Evaluate(Stage):
    """Evaluates ``policy``, or an endpoint's model, on the evaluation questions; see ``evaluation.evaluate`` for the files."""

    policy: str | Path | Endpoint
    name: str
    recall: Artifact | None = None
    benchmarks: Sequence[str] = ()
    """Benchmarks of ``data.eval`` to evaluate on; empty: all."""

    @property
    def id(self) -> StageId:
        """
        Raises:
            ConfigError: ``name`` cannot be the name of a directory.
        """
        if not is_name(self.name):
            raise ConfigError(
                f"--name {self.name!r}: cannot be the name of a directory; use letters, digits, '.', '+', '-' and '_'"
            )
        return StageId("evaluation", of=self.name)

    @property
    def seed_name(self) -> str:
        return "evaluation"  # the same for every policy, so that two evaluations differ in the policy alone

    def settings(self, config: Config) -> Mapping[str, Any]:
        return sections(config, "evaluation", "rollout", "data.max_eval")

    def inputs(self, run: Inputs) -> Mapping[str, str]:
        policy = self.policy
        if isinstance(policy, Endpoint):
            evaluated = {"endpoint": policy.address, "model": policy.model, "ids": "words of an endpoint, not trainable"}
        else:
            evaluated = {"policy": run.checksum(policy)}
        inputs = {**evaluated, **run.evaluated_on(run.benchmarks(self.benchmarks))}
        if self.recall:
            inputs["recall"] = runs.checksum(self.recall.path / recalls.FILE)
        return inputs

    def work(self, run: Inputs, context: StageContext) -> Mapping[str, Any]:
        rows = recalls.read(self.recall.path / recalls.FILE) if self.recall else ()
        questions = {name: run.eval_questions[name] for name in run.benchmarks(self.benchmarks)}
        with run.engine(self.policy) as (engine, prompts):
            evaluation = evaluate(
                engine, run.retriever, questions, prompts, run.config.evaluation, run.config.rollout,
                seed=context.seed, out=context.out, progress=context.progress,
                recalls={(row.benchmark, row.id): row for row in rows}, checkpointer=context.checkpointer,
            )  # fmt: skip
        return evaluation.model_dump(mode="json")


def read_evaluation(artifact: Artifact) -> Evaluation:
    """The figures of an evaluation's artifact."""
    return Evaluation.model_validate(json.loads((artifact.path / EVALUATION).read_text()))
