"""Preflight: judges from the first evaluation, and in doubt from a few sampled groups, whether the run can learn."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_e1 import runs
from search_e1.config import Config, PoolConfig
from search_e1.errors import PreflightError
from search_e1.evaluation import preflight, recall, results
from search_e1.evaluation.evaluate import TIMINGS
from search_e1.evaluation.preflight import Finding, Level, Observed
from search_e1.rollout import pool
from search_e1.runs import Artifact, ranks
from search_e1.runs.context import StageContext
from search_e1.runs.stage_id import StageId
from search_e1.stages.inputs import Inputs, subsample
from search_e1.stages.stage import Stage, sections

_QUESTIONS, _SEARCHED = 16, 64


@dataclass(frozen=True, slots=True)
class Preflight(Stage):
    """Writes findings about the initial ``policy`` to ``preflight.json``.

    They come from its evaluation. If no trajectory there has a reward, groups of training questions are sampled as in GRPO,
    into ``groups.jsonl``. If these have no reward either, passages are searched for the answers of training questions. Only
    then can a finding say that nothing can be learned.
    """

    policy: str | Path
    evaluation: Artifact

    @property
    def id(self) -> StageId:
        return StageId("preflight")

    def settings(self, config: Config) -> Mapping[str, Any]:
        return sections(config, "rollout", "grpo.group_size", "grpo.temperature", "data.max_train", "data.max_eval")

    def inputs(self, run: Inputs) -> Mapping[str, str]:
        evaluated = runs.checksum(self.evaluation.path / results.QUESTIONS)
        return {**run.sampled_on(self.policy), **run.evaluated_on(), "evaluation": evaluated}

    def work(self, run: Inputs, context: StageContext) -> Mapping[str, Any]:
        evaluated = list(results.read(self.evaluation.path / results.QUESTIONS)) if ranks.is_first() else []
        seen, rows = ranks.broadcast_object((preflight.observe_results(evaluated), _recalls(evaluated)))
        if not seen.rewarded:
            sampled = self._probe(run, context)
            seen += sampled
            if not sampled.rewarded:
                rows = train_recall(run, context.seed)
        found = findings(run, seen, rows, self.policy)
        if ranks.is_first():
            lines = json.dumps([finding.model_dump(mode="json") for finding in found], indent=2)
            (context.out / preflight.FILE).write_text(lines + "\n", encoding="utf-8")
        levels = [finding.level for finding in found]
        shown = ", ".join(f"{levels.count(level)} {level}" for level in Level if level in levels)
        context.progress(1, 1, f"{shown}; {duration(run, self.evaluation).text}")
        return {"worst": preflight.worst(found), "observed": seen.model_dump()}

    def _probe(self, run: Inputs, context: StageContext) -> Observed:
        """Sample groups of training questions on all ranks and count their outcomes."""
        config = run.config
        questions = subsample(run.train_questions, _QUESTIONS, context.seed)
        size = max(config.grpo.group_size, -(-preflight.CERTAIN_TRAJECTORIES // len(questions)))
        settings = PoolConfig(group_size=size, temperature=config.grpo.temperature)
        with run.engine(self.policy) as (engine, prompts):
            pool.sample(
                engine, run.retriever, questions, prompts, settings, config.rollout,
                seed=context.seed, out=context.out, progress=context.progress, checkpointer=context.checkpointer,
            )  # fmt: skip
        groups = preflight.observe(pool.read(context.out / pool.FILE)) if ranks.is_first() else Observed()
        return ranks.broadcast_object(groups)


def findings(run: Inputs, seen: Observed, rows: Sequence[recall.Recall], policy: str | Path) -> list[Finding]:
    """All findings: from the trajectories in ``seen``, from the recall ``rows``, and from the files."""
    found = [preflight.form(seen), preflight.search(seen)]
    found += [preflight.groups(seen)] if seen.groups else []
    return [*found, *of_files(run, seen, rows), *filter(None, [_template(run, policy)])]


def of_files(run: Inputs, seen: Observed, rows: Sequence[recall.Recall]) -> list[Finding]:
    """Findings about passages and questions, independent of the policy."""
    topk, count = run.config.rollout.topk, run.passage_count
    few = None if count is None else preflight.passages(count, topk)
    possible = [preflight.answers(rows, topk, seen), few, preflight.overlap(run.train_questions, run.eval_questions)]
    return [finding for finding in possible if finding]


def _template(run: Inputs, policy: str | Path) -> Finding | None:
    if run.config.coldstart or run.has_prompts(policy):
        return None  # trained on the prompts already, or by the cold start
    return preflight.template(bool(run.load_reader(policy).tokenizer.chat_template))


def train_recall(run: Inputs, seed: int) -> list[recall.Recall]:
    """The recall of up to ``_SEARCHED`` training questions. The whole corpus is read only if no top-k has an answer."""
    questions = {"train": subsample(run.train_questions, _SEARCHED, seed)}
    rows = recall.measure(run.retriever, None, questions, run.config.rollout.topk)
    if any(row.in_topk for row in rows):
        return rows
    return recall.measure(run.retriever, run.passage_texts(), questions, run.config.rollout.topk)


def _recalls(evaluated: Iterable[results.Result]) -> list[recall.Recall]:
    known = (r for r in evaluated if r.in_topk is not None)
    return [recall.Recall(benchmark=r.benchmark, id=r.id, in_topk=r.in_topk, in_corpus=r.in_corpus) for r in known]


def read(artifact: Artifact, config: Config) -> list[Finding]:
    """The findings of a preflight's artifact; only warnings if the run distills from demonstrations, which may still work."""
    rows = json.loads((artifact.path / preflight.FILE).read_text(encoding="utf-8"))
    found = [Finding.model_validate(row) for row in rows]
    demonstrated = config.pairs.references_by == "gold" and config.distillations
    return [finding.warning() for finding in found] if demonstrated else found


def duration(run: Inputs, evaluation: Artifact) -> Finding:
    """Estimated sampling time of the run, at the speed of an evaluation's greedy trajectories."""
    timings = json.loads((evaluation.path / TIMINGS).read_text(encoding="utf-8"))
    by_benchmark = evaluation.manifest.result["by_benchmark"]
    count = sum(by_benchmark[name]["n"] for name in timings)
    seconds = sum(timings[name]["seconds_a_question"] * by_benchmark[name]["n"] for name in timings) / ranks.count()
    sampled = preflight.amounts(run.config, len(run.train_questions), count)
    return preflight.time(sampled, count / seconds, evaluation.manifest.result["tokens"])


def refuse(found: Sequence[Finding]) -> None:
    """
    Raises:
        PreflightError: one of the findings says that the run cannot learn.
    """
    for finding in found:
        if finding.level is Level.STOP:
            raise PreflightError(
                f'the run cannot learn: {finding.text} {finding.remedy} To train anyway, set preflight = "warn".'
            )
