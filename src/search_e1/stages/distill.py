"""Distillation on stored pairs, or supervised fine-tuning on their references."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from search_e1 import runs
from search_e1.config import Config, DistillConfig
from search_e1.errors import DataError
from search_e1.runs import derived_seed, ranks
from search_e1.runs.context import StageContext
from search_e1.runs.stage_id import StageId
from search_e1.selfdistill import files
from search_e1.selfdistill.lead import Lead, gate
from search_e1.selfdistill.samples import classes_of, reference_sample_of, sample_of
from search_e1.stages.fresh_students import FreshStudents
from search_e1.stages.inputs import Inputs
from search_e1.stages.lead import FILE as LEAD
from search_e1.stages.merge import choose_strength
from search_e1.stages.stage import Stage, sections
from search_e1.stages.training_engine import check_training_engine
from search_e1.stages.verified import verified
from search_e1.training.loop import Schedule, train
from search_e1.training.objectives import open_objective
from search_e1.training.policy import Policy, context_length, with_adapter
from search_e1.training.record import ends
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Pair, Sample


@dataclass(frozen=True, slots=True)
class Distill(Stage):
    """Distills ``policy`` on the pairs; adapters are merged. Writes ``policy/`` and ``steps.jsonl``.

    Figures: pairs (for ``sft`` and fresh students: distinct references), pairs_too_long, or students and students_too_long
    (fresh ones), positions (tokens in the loss per epoch), masked (share of sampled tokens without weight), pairs_shortened
    (passages dropped from the reference to fit the context), steps, halved, mean loss (kl or cross_entropy, nats per token)
    over the first and the last tenth of the steps, seconds. With adapters: the merged strength, and EM and tokens for each
    strength tried. With verified teachers: how many were sampled, were correct, and searched more than their reference.
    """

    policy: str | Path
    pairs: Path
    """The pairs' directory."""
    lead: Path | None
    """The measured lead's directory; ``None`` where the objective has no teacher."""
    round: int
    other_policy: bool = False
    """Whether pairs of another policy are accepted."""

    @property
    def id(self) -> StageId:
        return StageId("ofsd", self.round)

    def settings(self, config: Config) -> Mapping[str, Any]:
        return sections(config, "distill", *(("rollout", "pool") if _needs_sampling(config) else ()))

    def inputs(self, run: Inputs) -> Mapping[str, str]:
        """
        Raises:
            RunError: the pairs come from another policy.
            NoLeadError: the measured lead does not pass the gate.
        """
        run.sampled_by(self.pairs, self.policy, self.other_policy)
        if run.config.distill.has_teacher:
            assert self.lead, "nothing is distilled unmeasured"
            measured = Lead.model_validate_json((self.lead / LEAD).read_text())
            gate(measured, run.config.lead, verified=run.config.distill.verifies)
        sampled = run.sampled_on(self.policy) if _needs_sampling(run.config) else {"policy": run.checksum(self.policy)}
        return {**sampled, "pairs": runs.checksum(self.pairs / files.TRAIN)}

    def check(self, run: Inputs) -> None:
        """
        Raises:
            ConfigError: an unknown objective.
        """
        open_objective(run.config.distill.objective, "distill.objective", run.config)
        if run.config.distill.students == "fresh":
            check_training_engine(run.config, self.policy, "distillation with fresh students")

    def work(self, run: Inputs, context: StageContext) -> Mapping[str, Any]:
        """
        Raises:
            DataError: no pairs, none that fits the context, or pairs of another tokenizer.
            NoLeadError: no teacher follows its reference.
        """
        config = run.config.distill
        policy = run.load_to_train(self.policy, config.training, adapters=config.weights == "lora")
        pairs = files.read(self.pairs / files.TRAIN, policy.tokenizer)
        if config.order == "easiest_first":
            pairs.sort(key=lambda pair: (pair.reference.searches, pair.reference.sampled_tokens))
        model = with_adapter(policy.model, config.lora) if config.weights == "lora" else policy.model
        objective = open_objective(config.objective, "distill.objective", run.config)
        sharding = run.config.parallel.sharding
        trained = TrainedPolicy(
            model, config.training, frozen_start=objective.needs_start, sharding=sharding, dtype=policy.dtype
        )
        pairs, verification = verified(run, trained, policy, pairs, context) if config.verifies else (pairs, {})
        samples = make_samples(policy, pairs, config)
        source: EpochSource | FreshStudents
        with ExitStack() as stack:
            if config.students == "fresh":
                source = FreshStudents(run, policy, trained, pairs, context, self.policy, stack)
            else:
                source = EpochSource(samples, config.batch_size, context.seed, shuffled=config.order == "shuffled")
            schedule = Schedule(source.steps * config.epochs, config.learning_rate)
            steps = train(trained, source, {"distill": objective}, config.training, schedule, context)
        strength = choose_strength(run, trained, policy, pairs, context) if config.weights == "lora" else {}
        policy.model = trained.finish()
        if ranks.is_first():
            policy.save(context.out / "policy")
        imitates = config.objective == "sft"
        trained_on = {
            "pairs": len(samples),
            "pairs_too_long": _examples(pairs, config) - len(samples),
            "positions": sum(len(sample.positions) for sample in samples),
            "masked": 0.0 if imitates else masked_share(samples),
        }
        return {
            **(source.summary(steps) if isinstance(source, FreshStudents) else trained_on),
            "pairs_shortened": 0 if imitates else sum(pair.shortened for pair in pairs),
            "steps": len(steps),
            "halved": sum(step.get("halved", 0) for step in steps),
            **ends(steps, "loss", 0.1, name="cross_entropy" if imitates else "kl"),
            **strength,
            **verification,
            "seconds": sum(step["seconds"] for step in steps),
        }


def _needs_sampling(config: Config) -> bool:
    """Whether the stage samples from the policy, so that its result depends on questions and retrieval too."""
    distill = config.distill
    return distill.students == "fresh" or distill.verifies or len(distill.merge.strengths) > 1


def make_samples(policy: Policy, pairs: Sequence[Pair], config: DistillConfig) -> list[Sample]:
    """The training samples of ``pairs``: each student with its teacher's prompt, or for ``sft`` each distinct reference.

    Raises:
        DataError: no pairs, or none fits the policy's context.
    """
    if not pairs:
        raise DataError("no pairs to distill on; sample a larger pool (pool.questions, pool.group_size) or check its health")
    weights = config.class_weights.model_dump()
    classes = partial(classes_of, policy.tokenizer, policy.prompts)
    if config.objective == "sft":
        pairs = list({(p.question.id, p.reference.response_ids): p for p in reversed(pairs)}.values())[::-1]
        samples = [reference_sample_of(p, classes(p.reference), weights) for p in pairs]
    else:
        samples = [sample_of(p, classes(p.student), weights, config.mask) for p in pairs]
    length = context_length(policy.model.config)
    fitting = [sample for sample in samples if len(sample) <= length and sample.positions]
    if not fitting:
        raise DataError(
            f"none of the {len(samples)} pairs fits the policy's context of {length} tokens; use a policy with a longer "
            "context, or lower rollout.max_tokens"
        )
    return fitting


def masked_share(samples: Sequence[Sample]) -> float:
    """Share of the students' sampled tokens without weight in the loss."""
    sampled = sum(sum(sample.action_mask) for sample in samples)
    return 1 - sum(len(sample.positions) for sample in samples) / sampled


def _examples(pairs: Sequence[Pair], config: DistillConfig) -> int:
    return len({(p.question.id, p.reference.response_ids) for p in pairs}) if config.objective == "sft" else len(pairs)


class EpochSource:
    """Serves every sample once per epoch; each call returns this rank's share of the batch.

    ``shuffled``: in transformers' length-grouped order, derived from seed and epoch, which keeps padding low; else in the
    given order.
    """

    def __init__(self, samples: Sequence[Sample], batch_size: int, seed: int, *, shuffled: bool = True) -> None:
        self.figures: Mapping[str, float] = {}
        self._samples, self._size, self._seed, self._shuffled = samples, batch_size, seed, shuffled
        self.steps = -(-len(samples) // batch_size)
        """Batches per epoch; the last may be smaller."""

    def next(self, step: int) -> Mapping[str, Sequence[Sample]]:
        epoch, at = divmod(step, self.steps)
        order: Sequence[int] = range(len(self._samples))
        if self._shuffled:
            generator = torch.Generator().manual_seed(derived_seed(self._seed, "epoch", epoch))
            order = get_length_grouped_indices([len(s) for s in self._samples], self._size, generator=generator)
        batch = [self._samples[i] for i in order[at * self._size : (at + 1) * self._size]]
        return {"distill": batch[ranks.rank() :: ranks.count()]}
