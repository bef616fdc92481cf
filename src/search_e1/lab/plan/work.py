"""Tokens and hours of each stage, by formula."""

import math
from collections.abc import Set

import torch

from search_e1.config import Config, LoraConfig
from search_e1.lab.plan.constants import Constants, Gpu
from search_e1.lab.plan.memory import Job, training_jobs
from search_e1.lab.plan.shapes import Shape
from search_e1.training.precision import compute_dtype
from search_e1.types import Record


class Work(Record):
    """The work of a stage, over all rounds."""

    stage: str
    trajectories: int = 0
    sampled: float = 0  # tokens
    trained: float = 0  # tokens of forward and backward passes
    hours: float = 0


class WorkModel:
    """Work of the stages of ``config``.

    ``side_by_side``: trajectories that one GPU samples at once. ``recomputed``: stages with gradient checkpointing.
    """

    def __init__(
        self, shape: Shape, config: Config, gpu: Gpu, gpus: int, constants: Constants, side_by_side: int, recomputed: Set[str]
    ) -> None:
        self.shape, self.config, self.gpu, self.gpus, self.side_by_side = shape, config, gpu, gpus, side_by_side
        self.recomputed = recomputed
        self.constants, lengths, limits = constants.hours, constants.lengths, config.rollout
        self.turns = 1 + min(lengths["searches"], limits.max_searches)
        action = min(lengths["action"], limits.max_action_tokens)
        observation = min(lengths["passage"] * limits.topk, limits.max_observation_tokens)
        self.sampled = self.turns * action
        self.total = min(lengths["prompt"] + self.sampled + (self.turns - 1) * observation, limits.max_tokens)
        self.privileged = 2 * self.total - lengths["prompt"] + lengths["privileged"]  # a trajectory after a reference
        self.longest_action = min(lengths["longest_action"] * action, limits.max_action_tokens)
        self.pair_yield = lengths["pair_yield"]
        self.halves = compute_dtype(config.policy.dtype, shape.parameters, has_bfloat16=True) != torch.float32

    def stages(self, train_questions: int, eval_questions: int) -> list[Work]:
        """The work of each stage, in loop order."""
        config, rounds, jobs = self.config, self.config.distillations, training_jobs(self.config)
        policies = config.evaluated_policies
        work = [self.sample("evaluation", policies * eval_questions * (1 + config.evaluation.samples), calls=policies)]
        if config.coldstart:
            work.append(
                self.train(Work(stage="coldstart"), jobs["coldstart"], config.coldstart.steps * config.coldstart.batch_size)
            )
        if "grpo" in jobs:
            per_step, steps = config.grpo.questions_per_step * config.grpo.group_size, config.rounds * config.grpo.steps
            sampled = self.sample("grpo", steps * per_step, calls=steps)
            passes = config.grpo.epochs * per_step * steps
            work.append(self.train(sampled, jobs["grpo"], passes, anchored=bool(config.grpo.kl_coefficient)))
        if not rounds:
            return work
        questions = min(config.pool.questions or train_questions, train_questions)
        if config.pool.source == "fresh":
            work.append(self.sample("pool", rounds * questions * config.pool.group_size, calls=rounds))
        pairs, job = questions * self.pair_yield, jobs["distill"]
        held_out = min(config.lead.pairs, config.lead.max_share * pairs)
        if job.has_teacher:  # plain and privileged prompt, from the question and from prefixes
            asked = rounds * int(4 * held_out * config.lead.samples)
            work.append(self.sample("lead", asked, calls=rounds, width=(self.total + self.privileged) / 2))
        merge = config.distill.merge
        if job.has_teacher and config.distill.teachers == "verified":
            work.append(self.sample("teachers", int(rounds * pairs), calls=rounds, width=self.privileged))
        if len(merge.strengths) > 1:
            calls = rounds * len(merge.strengths)
            work.append(self.sample("merge", calls * min(merge.questions, train_questions), calls=calls))
        pairs *= config.pairs.students if job.has_teacher else 1  # without a teacher, each reference is one sample
        passes = config.distill.epochs * rounds * max(1, int(pairs - held_out))
        return [*work, self.train(Work(stage="distill"), job, passes)]

    def sample(self, stage: str, trajectories: int, *, calls: int, width: float | None = None) -> Work:
        """``calls``: number of engine calls that share the trajectories; ``width``: final tokens of a trajectory."""
        width, sampled = width or self.total, trajectories * self.sampled
        halves = self.halves or self.config.rollout.engine == "vllm"
        prefill = forward_flops(self.shape, trajectories * width - sampled, width)  # earlier turns are cached
        hours = self._hours(prefill, "forward", halves) + calls * self._decoding_hours(trajectories / calls, width, halves)
        return Work(stage=stage, trajectories=trajectories, sampled=sampled, hours=hours)

    def train(self, work: Work, job: Job, passes: int, *, anchored: bool = False) -> Work:
        """``work`` plus updates on ``passes`` trajectories. ``anchored``: add the reference policy's pass for a KL penalty."""
        halves, scored = self.halves, passes * self.sampled
        flops = training_flops(self.shape, passes * self.total, self.total, scored, job.lora, work.stage in self.recomputed)
        hours = self._hours(flops, "training", halves)
        for width in (self.total,) * anchored + (self.privileged,) * job.has_teacher:
            flops = forward_flops(self.shape, passes * width, width) + 2 * self.shape.head * scored
            hours += self._hours(flops, "forward", halves)
        return work.model_copy(update={"trained": passes * self.total, "hours": work.hours + hours})

    def _decoding_hours(self, trajectories: float, width: float, halves: bool) -> float:
        """Hours of decoding in one call on the busiest GPU: number of steps times the time of a step."""
        own = math.ceil(trajectories / self.gpus)
        rows = max(1, min(own, self.side_by_side))
        steps = max(own / rows * self.sampled, self.turns * self.longest_action)  # the end waits for the longest
        weights, cached = self.shape.active + self.shape.head, rows * width * self.shape.cached
        size = (weights + cached) * (2 if halves else 4)
        by_memory = size / (self.gpu.gb_per_second * 1e9 * self.constants["bandwidth"])
        by_products = 3600 * self.gpus * self._hours(2 * rows * weights, "forward", halves)
        engine = "vllm" if self.config.rollout.engine == "vllm" else "torch"
        launches = self.shape.layers * self.constants[f"layer_ms_{engine}"] / 1000
        return steps * (max(by_memory, by_products) + launches) / 3600

    def _hours(self, flops: float, share: str, halves: bool) -> float:
        rate = 1e12 * (self.gpu.tflops if halves else self.gpu.tflops_float32) * self.constants[share]
        return flops / (self.gpus * rate) / 3600


def forward_flops(shape: Shape, tokens: float, width: float) -> float:
    """Operations of a forward pass without the head: two per weight, and causal attention over half of ``width``."""
    return tokens * (2 * shape.active + 2 * shape.attention_width * width)


def training_flops(
    shape: Shape, tokens: float, width: float, positions: float, lora: LoraConfig | None, recompute: bool
) -> float:
    """Operations of forward and backward passes, with the head at ``positions``.

    Gradients of activations cost as much as a forward pass, and those of weights as much again (frozen weights have none);
    attention's backward pass costs two. ``recompute`` (gradient checkpointing) adds a forward pass.
    """
    passes = 2 if lora else 3
    weights, attention = 2 * shape.active * tokens, 2 * shape.attention_width * width * tokens
    return (passes + recompute) * weights + (3 + recompute) * attention + passes * 2 * shape.head * positions
