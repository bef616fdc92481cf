"""Vanilla GRPO on whole trajectories, through ``trl.GRPOTrainer``. With ``arguments`` and ``colocated`` all that knows TRL.

TRL brings advantages, the clipped loss, the optimiser loop and distribution; the trajectories come from the same
``rollout`` as everywhere else, and TRL gets their ids and masks as they are. One optimiser step trains on
``questions_per_step`` groups that were sampled for it. What is relied on in TRL is held by ``tests/test_trl_contract.py``.
"""

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer import grpo_trainer

from search_e1.config import WHOLE, GrpoConfig, ReferenceConfig, RolloutConfig, Sharding
from search_e1.errors import ConfigError, DataError, TrainingError
from search_e1.grpo import batching, replay
from search_e1.grpo.arguments import trl_arguments
from search_e1.grpo.colocated import Colocated
from search_e1.grpo.guidance import Guidance
from search_e1.grpo.kept import keeping
from search_e1.grpo.record import Recorder, summarize
from search_e1.grpo.rollouts import Rollouts, exact_match, length_penalty
from search_e1.retrieval.base import Retriever
from search_e1.rollout.engines import vllm
from search_e1.rollout.engines.base import Generator
from search_e1.rollout.engines.torch import HFGenerator
from search_e1.runs import ranks
from search_e1.runs.checkpoints import Work
from search_e1.runs.progress import Progress, Track, silent, untracked
from search_e1.training.memory import HalvingTrainer
from search_e1.training.policy import Policy, merge_adapter, with_adapter
from search_e1.training.resuming import STEPS, ResumingTrainer, restored_steps
from search_e1.training.sharding import Twin, divides, multiplied_in
from search_e1.types import Question

BAD_BATCH = "bad_batch.pt"

# Name in steps.jsonl -> TRL's name.
_FIGURES = {
    "reward": "rewards/exact_match/mean",
    "reward_std": "reward_std",
    "searches": "searches",
    "sampled_tokens": "sampled_tokens",
    "answered": "answered",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "entropy": "entropy",
    "clip_ratio": "clip_ratio/region_mean",
    "kl": "kl",
    "sampling_gap": "sampling/sampling_logp_difference/mean",
}


def train(
    policy: Policy,
    questions: Sequence[Question],
    retriever: Retriever,
    config: GrpoConfig,
    limits: RolloutConfig,
    shown: ReferenceConfig = WHOLE,
    *,
    seed: int,
    out: Path,
    sharding: Sharding = "none",
    progress: Progress = silent,
    track: Track = untracked,
    work: Work | None = None,
    engine: vllm.Engine | None = None,
) -> dict[str, float]:
    """Train ``policy`` in place; write it to ``out/policy`` and one line a step to ``out/steps.jsonl``, and with
    ``config.keep_groups`` the newest group of each question to ``out/groups.jsonl``.

    ``shown`` is what examples of reference following show. ``engine`` is to sample in the policy's place. With the same
    arguments and a ``work`` that was begun, training goes on from its newest checkpoint and ends as if it had never been
    interrupted.

    Returns:
        The stage's figures: steps and seconds; mean reward of the first and of the last quarter of the steps; the share
        of groups with mixed rewards (the others teach nothing); searches and sampled tokens of a trajectory in the last
        quarter; how often a micro-batch was halved because memory ran out.

    Raises:
        ConfigError: a ``[grpo.trainer]`` key that cannot be used, or sizes that do not fit together; before any work.
        DataError: two questions with one id; before any work.
        RetrievalError: from the retriever, as it is.
        Stopped: a signal has asked to stop.
        TrainingError: a loss or gradient that is not finite; the batch is in ``out/bad_batch.pt``.
    """
    if len({question.id for question in questions}) < len(questions):
        raise DataError("two training questions have the same id; give each its own")
    work = work or Work()
    with _quiet():
        arguments = trl_arguments(
            config, limits, len(questions), seed=seed, out=out, device=policy.model.device, sharding=sharding
        )
        checkpoint = work.newest()
        earlier = restored_steps(checkpoint, out / STEPS)
        with (out / STEPS if ranks.is_first() else Path(os.devnull)).open("a", encoding="utf-8") as file:
            recorder = Recorder(file, config.steps, progress, track, earlier)
            if config.steps:
                rollouts = Rollouts(policy, questions, retriever, config, limits, shown, seed)
                use_cache = policy.model.config.use_cache
                trainer = _trainer(policy, questions, config, arguments, rollouts, recorder, engine, out)
                with closing(trainer), keeping(config.keep_groups, work, out, len(earlier)) as rollouts.kept:
                    trainer.train_on(work, out / STEPS, checkpoint)
                policy.model = _give_back(trainer)
                policy.model.config.use_cache = use_cache  # a choice for training, no property of the policy
        if arguments.process_index == 0:
            policy.save(out / "policy")
    return summarize(recorder.steps)


def _trainer(
    policy: Policy,
    questions: Sequence[Question],
    config: GrpoConfig,
    arguments: GRPOConfig,
    rollouts: Rollouts,
    recorder: Recorder,
    engine: vllm.Engine | None,
    out: Path,
) -> "Trainer":
    """What trains ``policy``, or adapters to it, on the questions of all steps in their order."""
    set_seed(arguments.seed)  # of the adapters' start, which all ranks make alike
    model = with_adapter(policy.model, config.lora) if config.lora else policy.model
    return Trainer(
        model=model,
        args=arguments,
        reward_funcs=[exact_match, *([length_penalty(config.length_penalty)] if config.length_penalty else [])],
        train_dataset=Dataset.from_dict({"prompt": batching.order(questions, config, arguments.seed)}),
        processing_class=policy.tokenizer,
        rollout_func=rollouts,
        replay_weight=config.replay.weight,
        guidance=Guidance(config.hindsight, config.evidence, model),
        bad_batch=out / BAD_BATCH,
        on_step=recorder,
        engine=engine,
    )


class Trainer(HalvingTrainer, ResumingTrainer, GRPOTrainer):
    """TRL's trainer, with replay and guidance, that stops at the first loss or gradient that is not finite.

    Micro-batches carry two entries more than TRL's: ``replay``, their share of the step's examples, and ``weight``, the share
    of a micro-batch's loss that is theirs.
    """

    args: GRPOConfig
    processing_class: Any
    vllm_generation: Colocated

    def __init__(
        self,
        *,
        replay_weight: float,
        guidance: Guidance,
        bad_batch: Path,
        on_step: Callable[[int, dict[str, float]], None],
        engine: vllm.Engine | None,
        **kwargs: Any,
    ) -> None:
        self.replay: list[replay.Example] = []
        """Of the optimiser step at hand."""
        self.guidance = guidance
        self._replay_weight = replay_weight
        self._replay_cross_entropy = 0.0
        self._bad_batch = bad_batch
        self._on_step = on_step
        self.twin = Twin(kwargs["model"]) if divides(kwargs["args"]) else None
        with _anchored_at(kwargs["model"]):
            super().__init__(**kwargs)
        if guidance.active and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ConfigError(
                "grpo.hindsight and grpo.evidence need the whole weights in each process; set grpo.hindsight.weight and "
                "grpo.evidence.strength to 0, or do not shard"
            )
        if engine:
            self.use_vllm, self._last_loaded_step = True, -1
            self.vllm_generation = Colocated(
                engine, model=self.model, accelerator=self.accelerator, processing_class=self.processing_class
            )
        self.remove_callback(PrinterCallback)  # without a progress bar, transformers prints every log

    def _send_telemetry(self) -> None:
        """Nobody is told."""

    def close(self) -> None:
        """Let go of what samples beside the policy."""
        if self.use_vllm:
            self.vllm_generation.close()

    @contextmanager
    def generator(self, batch_size: int) -> Iterator[Generator]:
        """Samples from the policy as it is now."""
        if self.use_vllm:
            yield self.vllm_generation.generator(self.processing_class)
            return
        if self.twin:  # each rank samples at its own pace, and so with all weights
            whole = self.twin.filled(self.model, multiplied_in(self.args))
        else:
            whole = unwrap_model_for_generation(self.model_wrapped, self.accelerator)
        with whole as model:
            # The adapters are inside the base model's layers. Wrapped in peft, its own generation config would rule.
            lent: Any = model.get_base_model() if isinstance(model, PeftModel) else model
            yield HFGenerator(lent, self.processing_class, batch_size=batch_size)

    def at_boundary(self) -> bool:
        """TRL keeps the trajectories that it has sampled for several steps where ``num_iterations`` says so."""
        assert self.args.steps_per_generation
        return self._step % (self.args.steps_per_generation * self.args.num_iterations) == 0

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """What TRL makes of a step's trajectories, in their order, and what the policy's own teacher makes of it."""
        batch = super()._generate_and_score_completions(inputs)
        if not self.guidance.active:
            return batch
        assert self.model is not None
        training = self.model.training
        self.model.eval()
        batch = self.guidance.prepared(
            batch,
            lambda examples: self._logprobs(self.model, replay.collate(examples, *self._at)),
            self.args.per_device_train_batch_size,
        )
        self.model.train(training)
        return batch

    @property
    def _at(self) -> tuple[int, torch.device]:
        return self.processing_class.pad_token_id, self.accelerator.device

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's next micro-batch, of trajectories of like length. TRL's own are as wide as the longest of the step."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = batching.by_length(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The loss of one micro-batch, scaled so that the micro-batches of a step add up; a scalar."""
        # Dealt out to the step's micro-batches, of all ranks.
        micro_batches = self.args.gradient_accumulation_steps
        first = self._step % micro_batches * ranks.count()
        share = self.replay[first + ranks.rank() :: micro_batches * ranks.count()]
        if self.twin and not share and self.replay[first:]:  # all have to make the same passes
            share = [self.replay[0].silent()]
        inputs = {**inputs, "replay": share, "weight": 1.0}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def part_loss(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        with self.guidance.watching() as hidden:
            loss = GRPOTrainer.compute_loss(self, model, inputs, num_items_in_batch=num_items_in_batch)
        loss = loss * inputs["weight"]
        if (
            hidden
            and (hindsight := self.guidance.loss(inputs, hidden[0], self.processing_class.pad_token_id)) is not None
        ):
            loss = loss + hindsight
        if inputs["replay"]:
            # Over the tokens of all examples: the sum over the micro-batches is the mean over tokens. Gradients are averaged
            # over ranks.
            every = sum(sum(e.loss_mask) for e in self.replay)
            cross_entropy = self._cross_entropy(model, inputs["replay"]) * ranks.count() / every
            self._replay_cross_entropy += cross_entropy.item()
            loss = loss + self._replay_weight * cross_entropy
        if not torch.isfinite(loss):
            raise self._failure(f"the loss is {loss.item()}", inputs)
        return loss

    def halves(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """See ``HalvingTrainer``. What is taken over a micro-batch as a whole in another way cannot be halved."""
        rows = len(inputs["completion_mask"])
        as_a_whole = self._entropy_bonus_enabled or self.aux_loss_enabled or self.top_entropy_quantile < 1
        if rows < 2 or as_a_whole or self.loss_type not in batching.WEIGHED_BY:
            return None
        by, replay = batching.WEIGHED_BY[self.loss_type], inputs["replay"]
        parts = [batching.part(inputs, chosen) for chosen in torch.arange(rows).tensor_split(2)]
        weights = [batching.weight(part, by) / batching.weight(inputs, by) * inputs["weight"] for part in parts]
        shares = (replay[: len(replay) // 2], replay[len(replay) // 2 :])
        first, second = (
            {**part, "weight": weight, "replay": share}
            for part, weight, share in zip(parts, weights, shares, strict=True)
        )
        return first, second

    def mark(self) -> tuple[dict[str, int], float, float]:
        lengths = {name: len(values) for name, values in self._metrics["train"].items()}
        return lengths, self._replay_cross_entropy, self.guidance.divergence

    def rewind(self, mark: tuple[dict[str, int], float, float]) -> None:
        lengths, self._replay_cross_entropy, self.guidance.divergence = mark
        for name, values in self._metrics["train"].items():
            del values[lengths.get(name, 0) :]

    def _cross_entropy(self, model: Any, examples: Sequence[replay.Example]) -> torch.Tensor:
        """Summed over the sampled positions of ``examples``."""
        batch = replay.collate(examples, *self._at)
        return -(self._logprobs(model, batch) * batch.loss_mask).sum()

    def _logprobs(self, model: Any, batch: replay.Batch) -> torch.Tensor:
        """[examples, response width]"""
        logprobs, _, _ = self._get_per_token_logps_and_entropies(
            model, batch.input_ids, batch.attention_mask, batch.loss_mask.shape[1]
        )
        return logprobs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)  # adds TRL's metrics to `logs`
        if "loss" not in logs:
            return  # the last one, about the run as a whole
        figures = {ours: logs[theirs] for ours, theirs in _FIGURES.items() if theirs in logs}
        if len(self.reward_funcs) > 1:
            figures["shaped_reward"] = logs["reward"]
        if "frac_reward_zero_std" in logs:
            figures["mixed"] = 1 - logs["frac_reward_zero_std"]
        if self.replay:
            parts = ranks.gathered(self._replay_cross_entropy)
            figures |= {"replay_cross_entropy": sum(parts) / len(parts), "replay_examples": len(self.replay)}
            self._replay_cross_entropy = 0.0
        if self.guidance.active:
            figures |= self.guidance.figures()
        if self.halved:
            figures["halved"] = self.halved
            self.halved = 0
        self._on_step(self.state.global_step, figures)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """What transformers calls before it takes the optimiser's step."""
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        if not math.isfinite(norm) and self.accelerator.scaler is None:  # a loss scaler skips such steps
            raise self._failure(f"the gradient's norm is {norm}", self._buffered_inputs)
        return norm

    def _failure(self, what: str, inputs: Any) -> TrainingError:
        if isinstance(inputs, dict):  # else all micro-batches of the step
            inputs = {name: value for name, value in inputs.items() if name not in ("replay", "weight")}
        torch.save({"step": self.state.global_step, "inputs": inputs, "replay": self.replay}, self._bad_batch)
        return TrainingError(
            f"GRPO step {self.state.global_step + 1}: {what}; the batch is in {self._bad_batch}; lower grpo.learning_rate, or "
            "use policy.dtype float32"
        )


@contextmanager
def _anchored_at(model: Any) -> Iterator[None]:
    """TRL loads what a KL penalty (``beta``) holds the policy to by the name in its config, which may be that of other
    weights, or empty; here it is the policy as the stage begins. Adapters need none: TRL switches them off."""
    load = grpo_trainer.create_model_from_path
    grpo_trainer.create_model_from_path = lambda *_, **__: copy.deepcopy(model).eval().requires_grad_(False)
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = load


def _give_back(trainer: Trainer) -> Any:
    """The plain model out of the trainer: adapters merged, TRL's and accelerate's patches of ``forward`` removed."""
    if trainer.twin:
        model = trainer.twin.fill(trainer.model)
    else:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if isinstance(model, PeftModel):
        model = merge_adapter(model)
    for patch in ("forward", "_original_forward"):
        model.__dict__.pop(patch, None)
    if trainer.args.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    model.eval()
    trainer.accelerator.free_memory()
    if ranks.is_first():
        with suppress(OSError):  # something is in it, or it was never made
            Path(str(trainer.args.output_dir)).rmdir()
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, and without warnings about what TRL does by itself."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*experimental feature", category=UserWarning)
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* deprecated", category=FutureWarning)
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
