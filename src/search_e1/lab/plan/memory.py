"""Peak memory of one GPU in each stage."""

from bisect import bisect_left
from functools import cache
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from search_e1.config import Config, LoraConfig, TrainingConfig
from search_e1.lab.plan.constants import GIB, Constants, Gpu
from search_e1.lab.plan.shapes import Shape
from search_e1.lab.plan.trace import TracedModel
from search_e1.training.precision import compute_dtype
from search_e1.types import Record


class Memory(Record):
    """Bytes at the peak, by kind; and the rows of the pass at the peak, of at most ``tokens`` tokens each."""

    stage: str
    rows: int
    tokens: int
    recompute: bool = False  # gradient checkpointing, as configured or as training would choose
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    other: int = 0  # other weights: a frozen copy, gathered layers; everything of vLLM except its cache
    activations: int = 0
    logits: int = 0
    cache: int = 0

    @property
    def fixed(self) -> int:  # independent of the rows
        return self.weights + self.gradients + self.optimizer + self.other

    @property
    def total(self) -> int:
        return self.fixed + self.activations + self.logits + self.cache


class Job(NamedTuple):
    """How a stage trains."""

    lora: LoraConfig | None
    training: TrainingConfig
    has_teacher: bool  # before each pass, the teacher's pass without gradients over privileged prompts
    has_copy: bool  # keeps a frozen copy: the reference policy of a KL penalty, or a teacher if all weights are trained


def training_jobs(config: Config) -> dict[str, Job]:
    """Stage (``coldstart``, ``grpo``, ``distill``) -> its job, for the stages that ``config`` has."""
    coldstart, grpo, distill, jobs = config.coldstart, config.grpo, config.distill, {}
    if coldstart:
        jobs["coldstart"] = Job(coldstart.lora, coldstart.training, has_teacher=False, has_copy=False)
    if grpo.steps:
        jobs["grpo"] = Job(grpo.lora, grpo.training, grpo.asks_teachers, grpo.kl_coefficient > 0 and not grpo.lora)
    if config.distillations:
        lora = distill.lora if distill.weights == "lora" else None
        jobs["distill"] = Job(lora, distill.training, distill.has_teacher, distill.has_teacher and not lora)
    return jobs


class MemoryModel:
    """Memory of the stages of ``config``. Each policy is traced once."""

    def __init__(
        self, model: PreTrainedConfig, shape: Shape, config: Config, gpu: Gpu, gpus: int, constants: Constants
    ) -> None:
        self.shape, self.config, self.gpus, self.constants = shape, config, gpus, constants.memory
        self.size = int(gpu.memory_gib * GIB)
        self.usable = int(self.size * self.constants["usable"])
        self.sharded = config.parallel.sharding != "none" and gpus > 1
        self.dtype = compute_dtype(config.policy.dtype, shape.parameters, has_bfloat16=True)
        self.longest = min(config.rollout.max_tokens, shape.context_length)
        limit = min(shape.context_length, config.reference.max_tokens or shape.context_length)
        self.longest_privileged = min(2 * self.longest, limit)  # a trajectory after a reference of the same length
        self._traced = cache(lambda dtype, lora, recompute: TracedModel(model, dtype, lora, recompute))

    def update(self, stage: str, job: Job, tokens: int | None = None) -> Memory:
        """An update in micro-batches of ``tokens`` tokens; by default as configured, else as training would choose."""
        training = job.training
        tokens = tokens or training.micro_batch_tokens
        longest = self.longest_privileged if job.has_teacher else self.longest
        sizes = [tokens] if tokens else [1 << n for n in range(16, 9, -1) if 1 << n >= longest] or [longest]
        recomputes = (False, True) if training.gradient_checkpointing is None else (training.gradient_checkpointing,)
        for recompute in recomputes:
            needed = cache(lambda size, recompute=recompute: self._update(stage, job, size, recompute))
            if needed(sizes[0]).total <= self.usable:
                return needed(sizes[0])
            if needed(sizes[-1]).total <= self.usable:  # binary search for the largest that fits, since a trace takes a second
                return needed(sizes[bisect_left(sizes, True, key=lambda size: needed(size).total <= self.usable)])
        return needed(sizes[-1])

    def _update(self, stage: str, job: Job, tokens: int, recompute: bool) -> Memory:
        sharded = self.sharded
        longest = self.longest_privileged if job.has_teacher else self.longest
        rows = max(1, tokens // longest)
        kept = self._kept(job)
        stored = self._traced(kept, job.lora, recompute)
        # FSDP2 gathers layers in their compute dtype, so autocast has nothing to convert.
        used = self.dtype if sharded else kept
        traced = self._traced(used, job.lora, recompute)
        autocast = self.dtype != torch.float32 and not sharded
        student = traced.train(rows, self.longest, autocast=autocast, streamed=sharded)
        teacher = traced.forward(rows, longest) if job.has_teacher else 0
        gradients = self._share(stored.trained)
        counted = 0 if sharded else gradients  # gradients that the trace includes
        # The peak is in the teacher's pass, in the loss, or in the decoder's backward pass.
        head = self._head(rows, job, self.dtype.itemsize)
        peaks = [(teacher, 0), (student.kept - counted, head), (student.peak - counted, 0)]
        activations, logits = max(peaks, key=sum)
        copy = self._share(self.shape.parameters * kept.itemsize) if job.has_copy else 0
        if stage == "grpo" and not sharded and not job.lora and kept != self.dtype and self.config.rollout.engine == "torch":
            copy += self.shape.parameters * self.dtype.itemsize  # what is sampled from; CUDA graphs point to it
        # Gathered: two layers (the current and the next), the gradients of one, and the embeddings.
        layers = ((2 if job.lora else 3) * self.shape.largest_layer + self.shape.embeddings) if sharded else 0
        return Memory(
            stage=f"{stage}: update", rows=rows, tokens=self.longest, recompute=recompute, weights=self._share(stored.weights),
            gradients=gradients * (2 if self.gpus > 1 and not sharded else 1),  # DDP's buckets
            optimizer=self._share(2 * stored.trained), other=copy + used.itemsize * layers, activations=activations,
            logits=logits,
        )  # fmt: skip

    def sample(self, stage: str, rows: int, tokens: int, during: Job | None = None) -> Memory:
        """Sampling of ``rows`` trajectories of at most ``tokens`` tokens; ``during`` GRPO, with its optimizer states."""
        traced, vllm = self._traced(self.dtype, during and during.lora, False), self.config.vllm
        item, weights, optimizer, other = self.dtype.itemsize, traced.weights, 0, 0
        if during:
            kept = self._kept(during)
            stored = self._traced(kept, during.lora, False)
            weights, optimizer = self._share(stored.weights), self._share(2 * stored.trained)
            other = self._share(self.shape.parameters * kept.itemsize) if during.has_copy else 0
        memory = Memory(stage=stage, rows=rows, tokens=tokens, weights=weights, optimizer=optimizer, other=other)
        if self.config.rollout.engine == "vllm":
            share = vllm.shared_gpu_memory_utilization if during else vllm.gpu_memory_utilization
            size = int(share * self.size)
            free = max(0, size - int(self.constants["vllm_gib"] * GIB) - 2 * self.shape.parameters)
            rows = min(rows, free // (2 * tokens * self.shape.cached))
            update = dict(rows=rows, weights=weights if during else 0, other=other + size - free, cache=free)
            return memory.model_copy(update=update)
        if during and (self.sharded or (kept != self.dtype and not during.lora)):
            other += self.shape.parameters * item  # unsharded weights in the compute dtype, besides the trained ones
        row = tokens * self.shape.cached * item
        free = max(0, self.usable - weights - optimizer - other)
        rows = max(1, min(rows, int(self.constants["cache_share"] * free / row) - 1))
        prefill = traced.forward(max(1, min(rows, int(self.constants["prefill_tokens"]) // tokens)), tokens)
        logits = int(self.constants["logit_copies"]) * rows * self.shape.vocabulary * 4
        # One more row for the common prefix of all prompts.
        update = dict(rows=rows, other=other, activations=prefill, logits=logits, cache=(rows + 1) * row)
        return memory.model_copy(update=update)

    def _kept(self, job: Job) -> torch.dtype:
        """The dtype of the weights in memory while a stage trains; see ``Inputs.load_to_train``."""
        frozen = job.lora and not self.sharded
        return torch.float32 if job.training.master_weights and not frozen else self.dtype

    def _share(self, size: int) -> int:
        return -(-size // self.gpus) if self.sharded else size

    def _head(self, rows: int, job: Job, item: int) -> int:
        """The loss: logits, hidden states and their gradients, the head's gradient in float32."""
        limits, roles = self.config.rollout, 1 + job.has_teacher
        positions = rows * min(self.longest, (limits.max_searches + 1) * limits.max_action_tokens)
        mib = job.training.logits_mib or (64 if self.config.policy.device == "cpu" else self.constants["logits_mib"])
        logits = min(int(mib * 2**20), 6 * roles * positions * self.shape.vocabulary)
        hidden = positions * self.shape.hidden_size * (4 + (1 + roles) * item)
        return logits + hidden + (0 if job.lora else 4 * self.shape.head)
