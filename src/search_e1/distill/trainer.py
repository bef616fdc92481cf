"""Offline self-distillation: one set of weights is teacher (as it was, privileged prompt) and student (trained).

Its rival stands beside it, ``objective = "sft"``: the same references, imitated under the plain prompt without a teacher
(rejection sampling fine-tuning, arXiv:2308.01825; RAFT, arXiv:2304.06767; STaR, arXiv:2203.14465).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainingArguments, set_seed

from search_e1.config import DistillConfig, Sharding
from search_e1.distill.arguments import training_arguments
from search_e1.distill.collate import (
    Row,
    collate,
    context_length,
    encode,
    encode_reference,
    fits,
    pack,
    pad_id,
)
from search_e1.distill.passes import SelfDistillation, TeacherStates, packs, teach
from search_e1.distill.record import StepLog, summarize
from search_e1.errors import ConfigError, DataError, TrainingError
from search_e1.runs import derived_seed, ranks
from search_e1.runs.checkpoints import Work
from search_e1.runs.progress import Progress, Track, silent, untracked
from search_e1.training.memory import HalvingTrainer
from search_e1.training.policy import Policy, merge_adapter, with_adapter
from search_e1.training.resuming import STEPS, ResumingTrainer, restored_steps
from search_e1.training.sharding import Twin, divides
from search_e1.types import Pair


def train(
    policy: Policy,
    pairs: Sequence[Pair],
    config: DistillConfig,
    *,
    seed: int,
    out: Path,
    sharding: Sharding = "none",
    progress: Progress = silent,
    track: Track = untracked,
    work: Work | None = None,
) -> dict[str, Any]:
    """Distil ``policy`` on ``pairs``, or fine-tune it on their references, in place; an adapter is merged into its weights.

    Writes ``out/policy`` (what ``policy.load`` reads) and ``out/steps.jsonl`` (a line a step: loss, grad_norm,
    learning_rate, seconds). Pairs that the policy's context cannot hold with the reference in the prompt are left out and
    counted. With the same arguments and a ``work`` that was begun, training goes on from its newest checkpoint and ends as if
    it had never been interrupted.

    Returns:
        pairs (for ``sft`` distinct references, as in what follows), pairs_too_long, pairs_shortened (whose reference lacks
        passages, so that it fits), positions (sampled tokens in the loss, an epoch), steps, halved (how often memory ran out
        for a micro-batch), kl_first and kl_last (mean clipped divergence in nats a token over the first and the last tenth
        of the steps; for ``sft`` cross_entropy_first and cross_entropy_last), seconds of the steps.

    Raises:
        DataError: no pair, or none that fits.
        ConfigError: a key of ``config.trainer`` that is unknown, reserved, or has an impossible value.
        ModelError: a policy whose logits are more than its output head makes of its hidden states.
        Stopped: a signal has asked to stop.
        TrainingError: a loss that is not finite; ``out/bad_batch.pt`` holds the batch.
    """
    work = work or Work()
    if imitates := config.objective == "sft":  # a reference that several students have is one example
        pairs = list({(p.question.id, p.reference.response_ids): p for p in reversed(pairs)}.values())[::-1]
    rows = _rows(policy, pairs, config)
    out.mkdir(parents=True, exist_ok=True)
    arguments = training_arguments(config, seed=seed, out=out, device=policy.model.device, sharding=sharding)
    collator = _Collator(pad_id(policy.tokenizer), config.class_weights.model_dump(), _packed(policy, config))
    with work.scratch(out) as scratch:
        cached = _cached(policy, rows, config, arguments, collator, scratch, progress)
        set_seed(seed)  # of the adapter's start
        model: Any = with_adapter(policy.model, config.lora) if config.weights == "lora" else policy.model
        twin = Twin(model) if divides(arguments) else None
        checkpoint = work.newest()
        earlier = restored_steps(checkpoint, out / STEPS)
        log = StepLog(out / STEPS, progress, track, earlier, "CE" if imitates else "KL")
        trainer = _trainer(SelfDistillation(model, config, cached), rows, arguments, collator, log, imitates)
        trainer.train_on(work, out / STEPS, checkpoint)
        if twin:
            assert trainer.model is not None
            model = twin.fill(trainer.model.model)
        del cached, trainer.model
    policy.model = (merge_adapter(model) if isinstance(model, PeftModel) else model).eval()
    if trainer.is_world_process_zero():
        policy.save(out / "policy")
    return {
        "pairs": len(rows),
        "pairs_too_long": len(pairs) - len(rows),
        "pairs_shortened": 0 if imitates else sum(pair.shortened for pair in pairs),
        "positions": sum(len(row["student_positions"]) for row in rows),
        **summarize(log.steps, "cross_entropy" if imitates else "kl"),
    }


def _trainer(
    model: SelfDistillation,
    rows: Sequence[Row],
    arguments: TrainingArguments,
    collator: "_Collator",
    log: StepLog,
    imitates: bool,
) -> "_DistillTrainer":
    trainer = _DistillTrainer(
        model=model,
        args=arguments,
        train_dataset=[*rows, *_fillers(rows, arguments.per_device_train_batch_size)],
        pairs=len(rows),
        loss="cross-entropy" if imitates else "divergence",
        data_collator=collator,
        callbacks=[log],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _rows(policy: Policy, pairs: Sequence[Pair], config: DistillConfig) -> list[Row]:
    if not pairs:
        raise DataError(
            "no pairs to distil on; sample a larger pool (pool.questions, pool.group_size) or check its health"
        )
    length = context_length(policy.model)
    tokenizer, prompts = policy.tokenizer, policy.prompts
    numbered = enumerate(pairs)
    if config.objective == "sft":
        rows = [encode_reference(tokenizer, prompts, pair, number=n, tokens=config.tokens) for n, pair in numbered]
        rows = [row for row in rows if len(row["input_ids"]) <= length]
    else:
        rows = [
            encode(tokenizer, prompts, pair, number=number, tokens=config.tokens)
            for number, pair in numbered
            if fits(tokenizer, prompts, pair, length)
        ]
    rows = [row for row in rows if row["student_positions"]]  # an action without a tag, if thoughts are left out
    if not rows:
        raise DataError(
            f"none of the {len(pairs)} pairs fits the policy's context of {length} tokens"
            f"{'' if config.objective == 'sft' else ' with the reference in the prompt'}; "
            "use a policy with a longer context, or lower rollout.max_tokens"
        )
    return rows


def _fillers(rows: Sequence[Row], size: int) -> list[Row]:
    """Rows without weight, so that an epoch's last batch has as many for each process: else some would be trained on twice."""
    missing = -len(rows) % (size * ranks.count()) if ranks.count() > 1 else 0
    shortest = min(rows, key=lambda row: len(row["input_ids"]))
    return [{**shortest, "weight": 0.0} for _ in range(missing)]


def _packed(policy: Policy, config: DistillConfig) -> bool:
    """Whether batches are packed: on an accelerator, where padding costs as much as anything, if the policy allows it."""
    on_cpu = policy.model.device.type == "cpu"
    if config.packing == "never" or (config.packing == "auto" and on_cpu):
        return False
    if packs(policy.model):
        return True
    if config.packing == "always":
        raise ConfigError(
            f'distill.packing = "always": a {type(policy.model).__name__} does not keep packed sequences apart; set "auto"'
        )
    return False


def _cached(
    policy: Policy,
    rows: Sequence[Row],
    config: DistillConfig,
    arguments: TrainingArguments,
    collator: "_Collator",
    scratch: Path,
    progress: Progress,
) -> TeacherStates | None:
    """What the teacher makes of all rows, where that is computed beforehand."""
    if config.objective == "sft":
        return None
    again = config.epochs > 1 or config.weights == "all"  # without it each state would be used once, or need a copy
    apart = not ranks.on_one_machine()  # machines do not see one another's mapped files
    if config.teacher == "live" or (config.teacher == "auto" and (apart or not again)):
        return None
    if apart:
        raise ConfigError('distill.teacher = "cached" needs all processes on one machine; set "auto" or "live"')
    batch_size = arguments.per_device_train_batch_size
    return teach(policy.model, rows, scratch / "states", collator, batch_size=batch_size, progress=progress)


class _Collator:
    def __init__(self, pad: int, class_weights: Mapping[str, float], packed: bool) -> None:
        self.pad = pad
        self.class_weights = class_weights
        self.packed = packed

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        weights = [self.class_weights[kind] * row["weight"] for row in rows for kind in row["classes"]]
        return {**(pack(rows) if self.packed else collate(rows, self.pad)), "weights": torch.tensor(weights)}


class _ByEpoch(Sampler[int]):
    """The order of another sampler, which follows from seed and epoch alone: it is the same after a kill.

    What is beyond that sampler's last index, up to ``end``, comes last.
    """

    def __init__(self, sampler: Any, seed: int, end: int) -> None:
        self._sampler, self._seed, self._end, self._epoch = sampler, seed, end, 0
        self._generator = torch.Generator()
        sampler.generator = self._generator  # those of torch and transformers draw from it if they draw at all

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        self._generator.manual_seed(derived_seed(self._seed, "epoch", self._epoch))
        yield from self._sampler
        yield from range(len(self._sampler), self._end)

    def __len__(self) -> int:
        return self._end


class _DistillTrainer(HalvingTrainer, ResumingTrainer):
    loss_is_scaled_for_ga = True  # by `compute_loss`: the mean is over all micro-batches

    def __init__(self, *, pairs: int, loss: str, **kwargs: Any) -> None:
        """``train_dataset``: so many ``pairs``, and what fills up the last batch. ``loss`` is what it is called."""
        self._pairs, self._loss = pairs, loss
        super().__init__(**kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        every = cast("Sequence[Any]", self.train_dataset if train_dataset is None else train_dataset)
        return _ByEpoch(super()._get_train_sampler(cast("Any", every[: self._pairs])), self.args.seed, len(every))

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        weight = torch.stack([batch["weights"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(weight).sum()

    def part_loss(self, model: nn.Module, inputs: dict, num_items_in_batch: Any) -> Tensor:
        loss, per_token = model(**inputs)
        if not torch.isfinite(loss):
            raise self._failure(f"the {self._loss} is {loss.item()}", {**inputs, "per_token": per_token})
        # Gradients are averaged over processes, each of which holds a part of the batch.
        share = inputs["weights"].sum() * self.accelerator.num_processes / num_items_in_batch.clamp(min=1e-6)
        return loss * share

    def halves(self, inputs: dict) -> tuple[dict, dict] | None:
        rows = {row["number"]: row for row in cast("Sequence[Any]", self.train_dataset)}
        numbers = inputs["pairs"].tolist()
        if len(numbers) < 2:
            return None
        half = len(numbers) // 2
        first, second = (
            self._prepare_inputs(self.data_collator([rows[number] for number in part]))
            for part in (numbers[:half], numbers[half:])
        )
        return first, second

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """What transformers calls before it takes the optimiser's step."""
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        if not math.isfinite(norm) and self.accelerator.scaler is None:  # a loss scaler skips such steps
            raise self._failure(f"the gradient's norm is {norm}", {})
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.halved and "loss" in logs:
            logs = {**logs, "halved": self.halved}
            self.halved = 0
        super().log(logs, start_time)

    def _failure(self, what: str, inputs: dict) -> TrainingError:
        path = Path(str(self.args.output_dir)) / "bad_batch.pt"
        saved = f"; its batch is in {path}" if inputs else ""
        if inputs:
            torch.save(inputs, path)
        return TrainingError(
            f"distillation step {self.state.global_step + 1}: {what}{saved}; lower distill.learning_rate, or check the "
            "policy's weights"
        )
