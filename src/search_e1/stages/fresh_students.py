"""On-policy self-distillation: each step samples its students from the current policy.

Stored students go off-policy as soon as the policy changes: it is then trained on states that it no longer visits. SDFT
(arXiv:2601.19897) and OPSD (arXiv:2601.18734) are on-policy; version 2 of Search-E1 (arXiv:2605.22511) calls its method
on-policy too. The teacher is the same as offline: the stage's initial policy under the privileged prompt.
"""

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from search_e1.rollout.loop import rollout
from search_e1.rollout.progress import StepRollouts
from search_e1.rollout.starts import starts
from search_e1.rollout.unfinished import unfinished_in
from search_e1.runs import derived_seed, ranks
from search_e1.runs.context import StageContext
from search_e1.selfdistill.samples import classes_of, sample_of
from search_e1.stages.inputs import Inputs
from search_e1.stages.training_engine import open_training_engine
from search_e1.training.policy import Policy
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Pair, Sample


class FreshStudents:
    """Samples one new student for each of ``distill.batch_size`` references per step; every reference once per epoch."""

    def __init__(
        self,
        run: Inputs,
        policy: Policy,
        trained: TrainedPolicy,
        pairs: Sequence[Pair],
        context: StageContext,
        path: str | Path,
        stack: ExitStack,
    ) -> None:
        """``path``: the policy that an engine other than ``torch`` loads first; ``stack`` closes the engine."""
        self.figures: Mapping[str, float] = {}
        self._run, self._policy, self._context = run, policy, context
        self._pairs = list({(p.question.id, p.reference.response_ids): p for p in reversed(pairs)}.values())[::-1]
        self._size = run.config.distill.batch_size
        self.steps = -(-len(self._pairs) // self._size)
        """Steps per epoch."""
        self._engine = stack.enter_context(open_training_engine(run.config, path, trained, policy.tokenizer))
        self._rollout_progress = StepRollouts(context.progress, self.steps * run.config.distill.epochs)

    def next(self, step: int) -> Mapping[str, Sequence[Sample]]:
        epoch, at = divmod(step, self.steps)
        order = self._pairs
        if self._run.config.distill.order == "shuffled":
            order = random.Random(derived_seed(self._context.seed, "epoch", epoch)).sample(order, len(order))
        places = range(at * self._size, min((at + 1) * self._size, len(order)))[ranks.rank() :: ranks.count()]
        pairs = self._with_fresh_students(step, places, [order[place] for place in places])
        config, policy = self._run.config.distill, self._policy
        weights = config.class_weights.model_dump()
        samples = [
            sample_of(pair, classes_of(policy.tokenizer, policy.prompts, pair.student), weights, config.mask) for pair in pairs
        ]
        fitting = [s for s in samples if len(s) <= self._engine.context_length and s.positions]
        self.figures = _figures(pairs, samples, fitting)
        return {"distill": fitting}

    def summary(self, steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """``pairs`` (references), figures of all ``students``, and ``positions`` (tokens in the loss) per epoch.

        ``pairs`` alone if an earlier version began the stage and did not count students.
        """
        if not all("students" in step for step in steps):
            return {"pairs": len(self._pairs)}
        tokens = [step["sampled_tokens"] * step["students"] for step in steps]
        return {
            "pairs": len(self._pairs),
            "students": int(sum(step["students"] for step in steps)),
            "students_too_long": round(sum(step["too_long"] * step["students"] for step in steps)),
            "sampled_tokens": round(sum(tokens)),
            "positions": round(sum(step["positions"] for step in steps) / self._run.config.distill.epochs),
            "masked": sum(step["masked"] * own for step, own in zip(steps, tokens, strict=True)) / sum(tokens),
        }

    def _with_fresh_students(self, step: int, places: Sequence[int], pairs: Sequence[Pair]) -> list[Pair]:
        """``pairs`` with students sampled from the current policy."""
        config, prompts = self._run.config, self._policy.prompts
        plain = starts(self._policy.tokenizer, prompts, [pair.question for pair in pairs])
        begun = [replace(start, sample=place) for start, place in zip(plain, places, strict=True)]
        with self._engine.updated() as engine:
            trajectories = rollout(
                engine, self._run.retriever, begun, config.rollout,
                temperature=config.pool.temperature, seed=derived_seed(self._context.seed, step), prompts=prompts,
                unfinished=unfinished_in(self._context.checkpointer), on_trajectory=self._rollout_progress.of(step, len(begun)),
            )  # fmt: skip
        return [pair.model_copy(update={"student": t}) for pair, t in zip(pairs, trajectories, strict=True)]


def _figures(pairs: Sequence[Pair], samples: Sequence[Sample], fitting: Sequence[Sample]) -> dict[str, float]:
    """Over the step's students on all ranks: their number, their positions in the loss, and means of the rest.

    ``masked``: the share of their sampled tokens without weight.
    """
    sums = {
        "students": float(len(pairs)),
        "reward": sum(pair.student.reward for pair in pairs),
        "searches": float(sum(pair.student.searches for pair in pairs)),
        "sampled_tokens": float(sum(pair.student.sampled_tokens for pair in pairs)),
        "too_long": float(len(samples) - len(fitting)),
        "positions": float(sum(len(sample.positions) for sample in fitting)),
        "weighted": float(sum(len(sample.positions) for sample in samples)),
    }
    parts = ranks.all_gather_object(sums)
    totals = {name: sum(part[name] for part in parts) for name in sums}
    masked = 1 - totals.pop("weighted") / totals["sampled_tokens"]
    counts = {name: totals.pop(name) for name in ("students", "positions")}
    means = {name: value / counts["students"] for name, value in totals.items()}
    return {**counts, **means, "masked": masked}
