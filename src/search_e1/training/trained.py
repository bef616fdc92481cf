"""The trained policy and its teacher in one module, so that DDP, FSDP2 and autocast wrap both."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from search_e1.config import Sharding, TrainingConfig
from search_e1.runs import ranks
from search_e1.training.attention import attend, attending, implementations
from search_e1.training.batch import Batch, make_batch, micro_batches, pack, plain_model
from search_e1.training.head import Head, split_head
from search_e1.training.logprobs import fused_token_loss
from search_e1.training.policy import merge_adapter
from search_e1.training.sharding import UnshardedReplica
from search_e1.types import Sample

Teacher = Literal["start", "current"]
"""The teacher's weights: the policy's at the start of the stage, or its current ones."""


class States(NamedTuple):
    """The model's outputs for a batch at the N positions of the loss."""

    hidden: Tensor
    """[N, H], the student's last hidden states."""
    head: Head
    teacher_hidden: Tensor | None = None
    """[N, H], without gradient."""
    teacher_head: Head | None = None
    """``None`` if it is the student's."""


Loss = Callable[[States, Batch], tuple[Tensor, dict[str, Tensor]]]
"""A batch's share of an update's loss, and figures that add up over batches, with the loss weights."""


class _Roles(nn.Module):
    """Student and teacher in one module."""

    def __init__(self, model: Any, decoder: nn.Module, frozen: nn.Module | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.decoder, self.frozen, self.dtype = model, decoder, frozen, dtype
        self.frozen_head: Head | None = None
        self.transform: tuple[float, float | None] = (1.0, None)

    @property
    def head(self) -> Head:
        """The student's head, with its current weights."""
        layer = self.model.get_output_embeddings()
        weight = layer.weight
        if weight.dtype != self.dtype and weight.device.type != "cpu":  # on a CPU the head computes in float32
            weight = weight.to(self.dtype)
        return Head(weight, layer.bias, *self.transform)

    def forward(self, batch: Batch, loss: Loss, teacher: Teacher | None) -> tuple[Tensor, dict[str, Tensor]]:
        # No autocast cache: a weight first cast in the teacher's no-grad pass would get no gradient.
        half = self.dtype != torch.float32
        with torch.autocast(self.model.device.type, self.dtype if half else None, enabled=half, cache_enabled=False):
            taught = self._teach(batch, teacher) if teacher and batch.teacher else ()
            return loss(States(batch.student.hidden(self.decoder), self.head, *taught), batch)

    @torch.no_grad()
    def _teach(self, batch: Batch, teacher: Teacher) -> tuple[Tensor, Head | None]:
        assert batch.teacher
        if teacher == "start" and self.frozen is not None:
            return batch.teacher.hidden(self.frozen), self.frozen_head
        training = self.model.training
        self.model.eval()
        try:
            with self.model.disable_adapter() if teacher == "start" else nullcontext():
                return batch.teacher.hidden(self.decoder), None
        finally:
            self.model.train(training)


class TrainedPolicy:
    """A causal language model, with or without adapters, prepared for training."""

    def __init__(
        self,
        model: Any,
        config: TrainingConfig,
        *,
        frozen_start: bool,
        sharding: Sharding = "none",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            frozen_start: keep a copy of the initial weights for the teacher ``start``, if no adapter can be disabled instead.
            dtype: the compute dtype; the weights may be float32 regardless.

        Raises:
            ModelError: from ``split_head``.
        """
        self.model, self.config, self.dtype = model, config, dtype
        decoder, head = split_head(model)
        on_cpu = model.device.type == "cpu"
        self.micro_batch_tokens = config.micro_batch_tokens or (2048 if on_cpu else 16_384)
        self._attention = implementations(plain_model(model).config)  # for sampling; training passes may use another
        self.packed = not on_cpu and pack(model, dtype)
        frozen = frozen_start and not isinstance(model, PeftModel)
        copied = copy.deepcopy(decoder).requires_grad_(False).eval() if frozen else None
        self._roles = _Roles(model, decoder, copied, dtype)
        self._roles.transform = head.scale, head.softcap
        if frozen:
            bias = None if head.bias is None else head.bias.detach().clone()
            self._roles.frozen_head = head._replace(weight=head.weight.detach().clone(), bias=bias)
        self._half = dtype != torch.float32
        cast_adapter_inputs(model, not self._half)
        self.fitted = self.checkpointing = False
        if config.gradient_checkpointing:
            self.enable_checkpointing()
        self.sharded = sharding != "none" and ranks.count() > 1
        """Whether each rank holds a part of the weights."""
        converts = dtype != model.dtype and not isinstance(model, PeftModel)
        self._replica = UnshardedReplica(model) if self.sharded or converts else None
        self._wrapped = self._wrap(sharding)

    def _wrap(self, sharding: Sharding) -> Callable[..., Any]:
        if ranks.count() == 1:
            return self._roles
        if sharding == "none":
            # Buffers never change, and all ranks run the same number of passes.
            return DistributedDataParallel(self._roles, broadcast_buffers=False)
        mixed = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        policy = MixedPrecisionPolicy(cast_forward_inputs=False) if self.dtype == torch.float32 else mixed
        for layers in [module for module in self._roles.modules() if isinstance(module, nn.ModuleList)]:
            for layer in layers:
                fully_shard(layer, mp_policy=policy)
        # Embeddings, head and norms: unsharded from the forward to the backward pass.
        fully_shard(self._roles, mp_policy=policy)
        return self._roles

    def enable_checkpointing(self) -> None:
        """Turn on gradient checkpointing: layers keep only their inputs and recompute the rest in the backward pass."""
        self.checkpointing = True
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable weights by name."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def run(self, batch: Batch, loss: Loss, teacher: Teacher | None) -> tuple[Tensor, dict[str, Tensor]]:
        """One forward pass through the wrapped model; all ranks must call it."""
        result: tuple[Tensor, dict[str, Tensor]] = self._wrapped(batch.to(self.device), loss, teacher)
        return result

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Context of a pass; synchronizes gradients over ranks only if it is the ``last`` of an update."""
        if isinstance(self._wrapped, DistributedDataParallel) and not last:
            with self._wrapped.no_sync():
                yield
        else:
            yield

    @torch.no_grad()
    def logprobs(
        self, samples: Sequence[Sample], temperature: float = 1.0, teacher: Teacher | None = None
    ) -> list[tuple[float, ...]]:
        """Log-probability of each response id of ``samples``, 0 at ids that do not count; under the teacher, if one is given.

        All ranks must call this, each with any number of samples.
        """
        training = self.model.training
        self.model.eval()
        found: list[tuple[float, ...]] = [()] * len(samples)
        groups = list(micro_batches(samples, self.micro_batch_tokens, packed=self.packed))
        most = max(ranks.all_gather_object(len(groups)))
        for group in groups + [groups[-1] if groups else []] * (most - len(groups)):
            chosen = [samples[i] for i in group] or [_filler(samples)]
            batch = make_batch(chosen, [[1.0] * len(s.positions) for s in chosen], packed=self.packed)
            _, figures = self.run(batch, _score(temperature, self.config.logits_mib), teacher)
            values = figures["logprobs"].tolist()
            for i, sample in zip(group, chosen, strict=False):
                own, values = values[: len(sample.positions)], values[len(sample.positions) :]
                placed = dict(zip(sample.positions, own, strict=True))
                found[i] = tuple(placed.get(at, 0.0) for at in range(len(sample.response_ids)))
        self.model.train(training)
        return [row or (0.0,) * len(sample.response_ids) for row, sample in zip(found, samples, strict=True)]

    @contextmanager
    def sampled(self, *, keep: bool = False) -> Iterator[Any]:
        """The plain model with the current weights, in the compute dtype, for sampling within the context.

        ``keep``: if only the dtype differs from the trained weights', keep the copy in memory between calls, so that CUDA
        graphs of it stay valid. A copy of sharded weights is never kept: it could be larger than a rank's share of the rest.
        """
        # Ranks sample at their own pace, so each needs all weights.
        keep = keep and not self.sharded
        lent = self._replica.filled(self.model, self.dtype, keep=keep) if self._replica else nullcontext(self.model)
        with lent as model, attending(plain_model(model), self._attention):
            cast_adapter_inputs(model, True)
            try:
                yield plain_model(model)
            finally:
                cast_adapter_inputs(model, not self._half)

    def scale_adapter(self, strength: float) -> None:
        """Scale the adapters' contribution by ``strength``, relative to training."""
        for model in (self.model, self._replica.model) if self._replica else (self.model,):
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    for name in module.active_adapters:
                        module.set_scale(name, strength)

    def finish(self) -> Any:
        """The trained model: unsharded on each rank, adapters merged, in evaluation mode.

        In float32 if the master weights are, so that neither saving nor merging rounds updates away.
        """
        model = self._replica.fill(self.model) if self._replica and self.sharded else self.model
        attend(plain_model(model), self._attention)
        cast_adapter_inputs(model, True)
        if self.checkpointing:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()  # enabling checkpointing set it on the embeddings
        if self.config.master_weights:
            model = model.float()
        return (merge_adapter(model) if isinstance(model, PeftModel) else model).eval()


def cast_adapter_inputs(model: nn.Module, enabled: bool) -> None:
    """Set whether the adapters in ``model`` cast their inputs to the dtype of their weights, as PEFT does by default.

    Under autocast, that costs two extra copies per matrix, kept for the backward pass, for bit-identical results.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = enabled


def _filler(samples: Sequence[Sample]) -> Sample:
    """A sample for the passes of a rank that has none left; the result is discarded."""
    empty = Sample(question_id="", prompt_ids=(0,), response_ids=(0,), action_mask=(1,), teacher_prompt_ids=(0,))
    sample = samples[0] if samples else empty
    return sample.model_copy(update={"action_mask": (1,) * len(sample.response_ids), "weights": None})


def _score(temperature: float, logits_mib: float | None) -> Loss:
    def score(states: States, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = states.hidden if states.teacher_hidden is None else states.teacher_hidden
        head = states.teacher_head or states.head
        loss, tokens = fused_token_loss(
            hidden, batch.targets, head, weights=batch.weights, temperature=temperature, logits_mib=logits_mib
        )
        return loss, {"logprobs": tokens.logprobs}

    return score
