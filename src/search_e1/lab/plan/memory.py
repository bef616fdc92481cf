"""Memory of a rank in each stage, at the moment when most of it is taken."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedConfig

from search_e1.config import Config, LoraConfig
from search_e1.lab.plan.dry import DryModel
from search_e1.lab.plan.hardware import Cluster
from search_e1.lab.plan.shapes import Shape
from search_e1.types import Record

_TILE = (4096, 32_768)  # positions and vocabulary entries of TRL's projection at once
_TILES_WITHOUT_TRITON = 7  # what its backward pass takes beside the tile, each as large
_SAMPLING = 5  # float32 copies of a step's logits: scores, over temperature, log-probabilities, and what drawing makes
# Of `rollout.hf`, `.continuous` and `.ragged`: the cache's share of free memory, tokens of a pass, steps of capacity.
_CACHE_SHARE, _PREFILL, _ROUND = 0.6, 8192, 64
_VLLM_WORK = 1.5 * 2**30  # bytes of vLLM's own passes and CUDA graphs


class Memory(Record):
    """Bytes on one rank. The parts are those alive at the peak, so that they add up to it."""

    stage: str
    rows: int
    """Sequences of one pass: the micro-batch in training."""
    tokens: int
    """Of each: the longest that the limits allow."""
    asked: int = 0
    """Rows that would be sampled together if memory held them."""
    weights: int = 0
    gradients: int = 0
    optimiser: int = 0
    others: int = 0
    """Further weights: the anchor of a KL penalty, a frozen teacher, layers gathered from other ranks, vLLM's."""
    activations: int = 0
    logits: int = 0
    """What the output head and the loss take beside the hidden states."""
    cache: int = 0
    """Keys and values."""
    most_rows: int | None = None
    """The largest number of rows that fits and divides the work; 0: not even one fits. ``None`` where it is not asked."""
    knob: str = ""
    """The key that sets the rows."""

    @property
    def total(self) -> int:
        parts = (self.weights, self.gradients, self.optimiser, self.others, self.activations, self.logits, self.cache)
        return sum(parts)

    @property
    def fixed(self) -> int:
        """What is there however short and few the sequences are."""
        return self.weights + self.gradients + self.optimiser + self.others


class Job(NamedTuple):
    """How a stage trains, read off its section."""

    lora: LoraConfig | None
    autocast: bool
    checkpointing: bool
    optimiser: str

    @classmethod
    def of(cls, lora: LoraConfig | None, trainer: Mapping[str, Any]) -> "Job":
        return cls(
            lora,
            bool(trainer.get("bf16") or trainer.get("fp16")),
            bool(trainer.get("gradient_checkpointing")),
            str(trainer.get("optim", "adamw_torch")),
        )


class Estimator:
    """Memory of the stages of ``config`` for one policy on one cluster. Passes are traced once and remembered."""

    def __init__(self, model: PreTrainedConfig, shape: Shape, config: Config, cluster: Cluster) -> None:
        self.model, self.shape, self.config, self.cluster = model, shape, config, cluster
        self.dtype: torch.dtype = getattr(torch, config.policy.dtype)
        self.triton = config.policy.device != "cpu"
        wanted = config.distill.packing == "always" or (config.distill.packing == "auto" and self.triton)
        self.packs = wanted and _keeps_packed_apart(model)
        self._dry = cache(lambda dtype, lora, checkpointing: DryModel(model, dtype, lora, checkpointing=checkpointing))
        self._train = cache(lambda dry, *args: dry.train(*args[:2], **dict(args[2:])))
        self._read = cache(lambda dry, rows, width: dry.read(rows, width, masked=True))

    @property
    def width(self) -> int:
        """The longest trajectory."""
        return min(self.config.rollout.max_tokens, self.shape.context_length)

    @property
    def teacher_width(self) -> int:
        """The longest row of the teacher: a student's trajectory, and as long a reference before it."""
        limit = min(self.shape.context_length, self.config.reference.max_tokens or self.shape.context_length)
        return limit if self.config.reference.shows == "whole" and 2 * self.width > limit else 2 * self.width

    # The stages.

    def update(self, rows: int, micro_batches: int) -> Memory:
        """An optimiser step of GRPO, with ``micro_batches`` of ``rows`` trajectories on this rank."""
        grpo = self.config.grpo
        job = Job.of(grpo.lora, grpo.trainer)
        anchor = bool(grpo.trainer.get("beta")) and grpo.lora is None  # adapters are switched off instead
        positions = rows * self.width
        return self._step(
            "grpo update", job, rows, self.width, packed=False, accumulated=micro_batches > 1,
            loss=self._trl_loss(positions, job), others=self._share(self._weights(None), "weights") if anchor else 0,
        )  # fmt: skip

    def distill(self, rows: int, micro_batches: int) -> Memory:
        """An optimiser step of self-distillation, with ``micro_batches`` of ``rows`` pairs on this rank."""
        distill = self.config.distill
        job = Job.of(distill.lora if distill.weights == "lora" else None, distill.trainer)
        cached = distill.teacher == "cached" or (
            distill.teacher == "auto" and (distill.epochs > 1 or distill.weights == "all")
        )
        taught, others = distill.objective == "ofsd", 0
        if job.lora is None and taught:
            others = self._itemsize * self.shape.head if cached else self._weights(None)
        positions = min(rows * self.width, rows * (self.config.rollout.max_searches + 1) * self._action)
        step = self._step(
            "distillation", job, rows, self.width, packed=self.packs, accumulated=micro_batches > 1,
            loss=self._fused_loss(positions, job), others=others,
        )  # fmt: skip
        if not taught:
            return step
        read = (1, rows * self.teacher_width) if self.packs else (rows, self.teacher_width)
        teacher = self._read(self._model(job), *read)
        # The teacher reads before the student's pass; gradients of earlier micro-batches are there then.
        there = step.gradients if micro_batches > 1 else 0
        before = step.fixed - step.gradients + there + teacher
        if before <= step.total:
            return step
        return step.model_copy(
            update={"gradients": there, "activations": teacher, "logits": 0, "tokens": self.teacher_width}
        )

    def sample(
        self, stage: str, *, rows: int, tokens: int, during: Literal["training", "nothing"] = "nothing"
    ) -> Memory:
        """Sampling ``rows`` trajectories of at most ``tokens`` together; ``during`` GRPO, whose states are there too."""
        job, asked = Job.of(self.config.grpo.lora, self.config.grpo.trainer), rows
        training = during == "training"
        lora = job.lora if training else None
        dry = self._dry(self.dtype, lora, job.checkpointing if training else False)
        weights = self._share(dry.weights, "weights") if training else dry.weights
        states = self._share(_states(job.optimiser, dry), "optimiser") if training else 0
        # Each rank samples with all weights: gathered beside its share, in bfloat16 with mixed precision.
        itemsize = 2 if weights < dry.weights and job.autocast else self._itemsize
        others = dry.weights * itemsize // self._itemsize if weights < dry.weights else 0
        if training and self.config.grpo.trainer.get("beta") and not lora:
            others += self._share(dry.weights, "weights")
        if self.cluster.engine == "vllm":
            return self._sample_by_vllm(stage, rows, tokens, weights if training else 0, states)
        slot = -(-tokens // _ROUND) * _ROUND * self.shape.cached * itemsize
        free = max(0, self.cluster.room - weights - states - others)
        rows = max(1, min(rows, int(_CACHE_SHARE * free / (tokens * self.shape.cached * itemsize)) - 1))
        return Memory(
            stage=stage, rows=rows, tokens=tokens, asked=asked, weights=weights, optimiser=states, others=others,
            activations=self._read(dry, max(1, min(rows, _PREFILL // tokens)), tokens),
            logits=_SAMPLING * rows * self.shape.vocabulary * 4,
            cache=(rows + 1) * slot,  # a slot more for what all prompts begin with
            knob="rollout.batch_size",
        )  # fmt: skip

    def _sample_by_vllm(self, stage: str, rows: int, tokens: int, weights: int, states: int) -> Memory:
        """vLLM takes its share whatever it needs: what its weights and passes leave is key-value cache."""
        half = min(2, self._itemsize)
        taken = int(self.cluster.gpu_memory_utilization * self.cluster.gpu.memory_gib * 2**30)
        own = self.shape.parameters * half
        cached = max(0, int(taken - own - _VLLM_WORK))
        return Memory(
            stage=stage, rows=max(0, min(rows, cached // (tokens * self.shape.cached * half))), tokens=tokens,
            weights=weights, optimiser=states, others=own, activations=int(_VLLM_WORK), cache=cached,
            knob="gpu_memory_utilization",
        )  # fmt: skip

    # Parts.

    def _step(
        self,
        stage: str,
        job: Job,
        rows: int,
        width: int,
        *,
        packed: bool,
        accumulated: bool,
        loss: int,
        others: int,
    ) -> Memory:
        cluster, dry = self.cluster, self._model(job)
        whole = cluster.sharding == "none"
        options = {
            "masked": rows > 1,
            "packed": packed and rows > 1,
            "autocast": job.autocast and cluster.sharding != "full",
        }
        options |= {"accumulated": accumulated and whole, "streamed": not whole}
        traced = self._train(dry, rows, width, *options.items())
        stored = self._dry(self.dtype, job.lora, job.checkpointing)
        buckets = 2 if whole and cluster.gpus > 1 else 1  # DDP reduces copies
        gradients = self._share(stored.trained * buckets, "gradients")
        others += self._gathered(job) if cluster.sharding == "full" else 0
        resident = dry.trained if whole else 0  # what the trace has counted of them
        always = gradients - resident  # buckets, or a rank's share
        at_loss, at_end = traced.kept + loss + always, traced.peak + always
        if at_loss > at_end:
            there = always + (resident if accumulated else 0)
            parts = {"gradients": there, "logits": loss, "activations": at_loss - loss - there}
        else:
            parts = {"gradients": gradients, "activations": at_end - gradients}
        return Memory(
            stage=stage, rows=rows, tokens=width, weights=self._share(stored.weights, "weights"),
            optimiser=self._share(_states(job.optimiser, stored), "optimiser"), others=others, **parts,
        )  # fmt: skip

    def _model(self, job: Job) -> DryModel:
        # Where weights are gathered for use, mixed precision gathers them in bfloat16, and autocast has nothing to do.
        gathered = self.cluster.sharding == "full" and job.autocast
        return self._dry(torch.bfloat16 if gathered else self.dtype, job.lora, job.checkpointing)

    @property
    def _itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def _action(self) -> int:
        return self.config.rollout.max_action_tokens

    def _weights(self, lora: LoraConfig | None) -> int:
        return self._dry(self.dtype, lora, False).weights

    def _share(self, size: int, what: Literal["weights", "gradients", "optimiser"]) -> int:
        divided = {
            "none": (),
            "optimiser": (),
            "optimizer": ("gradients", "optimiser"),
            "full": ("weights", "gradients", "optimiser"),
        }
        return -(-size // self.cluster.gpus) if what in divided[self.cluster.sharding] else size

    def _gathered(self, job: Job) -> int:
        """Two layers (the one at work and the next), one layer's gradients, embedding and head, as they are used."""
        itemsize = 2 if job.autocast else self._itemsize
        ends = self.shape.embedding + (0 if self.shape.tied else self.shape.head)
        return itemsize * (2 * self.shape.largest_layer + ends) + (
            0 if job.lora else itemsize * self.shape.largest_layer
        )

    def _trl_loss(self, positions: int, job: Job) -> int:
        """TRL's log-probabilities tile by tile: a tile, and gradients of hidden states and head summed in float32."""
        itemsize = 2 if job.autocast else self._itemsize
        wide = (
            _TILE[1] if self.triton else min(_TILE[1], self.shape.vocabulary)
        )  # what is not touched takes nothing there
        tile = min(positions, _TILE[0]) * wide * itemsize
        tile += 0 if self.triton else _TILES_WITHOUT_TRITON * min(positions, _TILE[0]) * wide * 4
        return tile + self._gradients_of_loss(positions, itemsize, trains_head=job.lora is None)

    def _fused_loss(self, positions: int, job: Job) -> int:
        """Ours: a buffer for the logits of both roles, as large as allowed, and the same gradients."""
        most = (self.config.distill.logits_mib or (1024 if self.triton else 64)) * 2**20
        buffer = min(most, max(positions, 1) * 2 * self.shape.vocabulary * 4 + most // 2)
        itemsize = self._itemsize
        teacher = positions * self.shape.hidden_size * itemsize
        return buffer + teacher + self._gradients_of_loss(positions, itemsize, trains_head=job.lora is None)

    def _gradients_of_loss(self, positions: int, itemsize: int, *, trains_head: bool) -> int:
        hidden = positions * self.shape.hidden_size
        by_hidden = hidden * (4 + 2 * itemsize)  # in float32, as it is handed on, and the selected states themselves
        by_head = self.shape.head * 4 if trains_head else 0
        return by_hidden + by_head + (self.shape.head * self._itemsize if trains_head and self._itemsize < 4 else 0)


def largest(measure: Callable[[int], Memory], candidates: list[int], room: int) -> int:
    """The largest of ``candidates`` (ascending) whose memory fits into ``room``; 0 if none does.

    Guessed from a straight line through the first two, then tried, since masks of packed rows grow with the square.
    """
    first = measure(candidates[0]).total
    if first > room:
        return 0
    if len(candidates) == 1:
        return candidates[0]
    slope = max(1.0, (measure(candidates[1]).total - first) / (candidates[1] - candidates[0]))
    guess = candidates[0] + (room - first) / slope
    for candidate in reversed([n for n in candidates if n <= 1.3 * guess]):
        if measure(candidate).total <= room:
            return candidate
    return candidates[0]


def _states(optimiser: str, dry: DryModel) -> int:
    """Bytes of the optimiser's states. AdamW's two have the type of the weight that they belong to."""
    if "8bit" in optimiser:
        return sum(2 * p.numel() for p in dry.model.parameters() if p.requires_grad)
    if optimiser.startswith("sgd"):
        return 0
    if optimiser.startswith("adafactor"):
        return dry.trained // 100
    return 2 * dry.trained


def _keeps_packed_apart(model: PreTrainedConfig) -> bool:
    """Whether all layers are of attention; ``distill.passes.packs`` finds it out by trying, which needs weights."""
    kinds = getattr(model.get_text_config(), "layer_types", None)
    return kinds is None or set(kinds) <= {"full_attention", "sliding_attention"}
