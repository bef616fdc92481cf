"""Tokens and operations of each stage, and the hours that they take."""

import math
from typing import NamedTuple

from search_e1.config import Config
from search_e1.lab.plan.hardware import Cluster, Engine
from search_e1.lab.plan.lengths import Lengths
from search_e1.lab.plan.memory import Job
from search_e1.lab.plan.shapes import Shape
from search_e1.types import Record


class Rates(Record):
    """What share of a GPU's promise is kept, and what each step of sampling costs beside it. Not measured on a GPU yet."""

    training: float = 0.35
    """Of the operations a second, in forward and backward passes."""
    reading: float = 0.45
    """The same in passes without gradients."""
    bandwidth: float = 0.6
    """Of the memory bandwidth, while sampling."""
    layer_ms: dict[Engine, float] = {"transformers": 0.6, "vllm": 0.03}
    """Of a step of sampling, for each layer: Python and kernel launches, however little there is to compute."""
    most_rows: int = 256
    """vLLM's sequences at once, where memory allows."""


class Work(Record):
    """A stage, over all its rounds."""

    stage: str
    times: int
    trajectories: int = 0
    sampled: float = 0
    """Tokens that are sampled."""
    read: float = 0
    """Tokens of passes without gradients: prompts and contexts, a teacher's rows, a KL anchor's."""
    trained: float = 0
    """Tokens of forward and backward passes."""
    flops: float = 0
    hours: float = 0
    """Of all GPUs together working, wall-clock."""


class Counts(NamedTuple):
    """How many questions there are."""

    train: int
    evaluated: int


class Clock:
    """Work and hours of the stages of ``config``."""

    def __init__(
        self,
        shape: Shape,
        config: Config,
        cluster: Cluster,
        lengths: Lengths,
        counts: Counts,
        rates: Rates,
        side_by_side: int,
    ) -> None:
        """``side_by_side``: trajectories that one GPU samples together."""
        self.shape, self.config, self.cluster = shape, config, cluster
        self.lengths, self.counts, self.rates = lengths, counts, rates
        self.side_by_side = side_by_side
        self.itemsize = {"float32": 4}.get(config.policy.dtype, 2)

    def stages(self) -> list[Work]:
        """In the order of the loop."""
        rounds, config = self.config.distillations, self.config
        policies = 1 + rounds + (config.rounds if config.grpo.steps else 0)
        asked = self.counts.evaluated * (1 + config.evaluation.samples)
        made = [self.evaluation(policies, asked)]
        if config.grpo.steps:
            made.append(self.grpo())
        questions = min(config.pool.questions or self.counts.train, self.counts.train)
        taught, fresh = config.distill.objective == "ofsd", config.pool.source == "fresh"
        # Without a teacher a reference is one example, however many students it has.
        examples = self.lengths.pair_yield if taught else min(1.0, self.lengths.pair_yield)
        pairs = questions * examples * config.pairs.references
        held_out = min(config.lead.pairs, config.lead.max_share * questions * self.lengths.pair_yield)
        made += (
            []
            if not rounds
            else [
                *([self.sampling("pool", rounds, questions * config.pool.group_size)] if fresh else []),
                *self._lead(rounds, int(4 * held_out * config.lead.samples)),
                self.distillation(max(1.0, pairs - held_out)),
            ]
        )
        return made

    def _lead(self, rounds: int, trajectories: int) -> list[Work]:
        """Nothing where there is no teacher."""
        taught = self.config.distill.objective == "ofsd"
        return [self.sampling("lead", rounds, trajectories, self.lengths.reference / 2)] if taught else []

    def grpo(self) -> Work:
        """Sampling and updates; a step waits for both."""
        config, lengths = self.config.grpo, self.lengths
        trajectories = config.steps * config.questions_per_step * config.group_size
        sampled = self.sampling(
            "grpo", self.config.rounds, trajectories, per_call=config.questions_per_step * config.group_size
        )
        job = Job.of(config.lora, config.trainer)
        tokens = self.config.rounds * trajectories * lengths.total
        scored = tokens * lengths.response / lengths.total
        flops = trained(self.shape, tokens, lengths.total, scored, job)
        # A KL anchor reads what is trained on; so does evidence, once without the reference and once with it, and hindsight.
        plain = int(bool(config.trainer.get("beta"))) + int(bool(config.evidence.strength))
        privileged = int(bool(config.evidence.strength)) + int(bool(config.hindsight.weight))
        shown = tokens * (1 + lengths.reference / lengths.total)
        reading = plain * passed(self.shape, tokens, lengths.total)
        reading += privileged * passed(self.shape, shown, lengths.total + lengths.reference)
        reading += (plain + privileged) * 2 * self.shape.head * scored
        halves = job.autocast or self.itemsize == 2
        hours = self._hours(flops, self.rates.training, halves=halves)
        hours += self._hours(reading, self.rates.reading, halves=halves)
        return sampled.model_copy(
            update={
                "read": sampled.read + plain * tokens + privileged * shown,
                "trained": tokens,
                "flops": sampled.flops + flops + reading,
                "hours": sampled.hours + hours,
            }
        )

    def distillation(self, pairs: float) -> Work:
        """``pairs`` a round."""
        config, lengths, rounds = self.config.distill, self.lengths, self.config.distillations
        job = Job.of(config.lora if config.weights == "lora" else None, config.trainer)
        again = config.epochs > 1 or job.lora is None
        cached = config.teacher == "cached" or (config.teacher == "auto" and again)
        readings = 0 if config.objective == "sft" else 1 if cached else config.epochs
        teacher = rounds * pairs * readings * (lengths.total + lengths.reference)
        student = rounds * pairs * config.epochs * lengths.total
        positions = rounds * pairs * config.epochs * lengths.sampled
        reading = passed(self.shape, teacher, lengths.total + lengths.reference)
        reading += 2 * self.shape.head * positions if readings else 0.0
        training = trained(self.shape, student, lengths.total, positions, job)
        halves = job.autocast or self.itemsize == 2
        hours = self._hours(training, self.rates.training, halves=halves)
        return Work(
            stage="distillation", times=rounds, read=teacher, trained=student, flops=reading + training,
            hours=hours + self._hours(reading, self.rates.reading, halves=halves),
        )  # fmt: skip

    def evaluation(self, policies: int, asked: int) -> Work:
        return self.sampling("evaluation", policies, asked)

    def sampling(
        self, stage: str, times: int, trajectories: int, longer: float = 0.0, per_call: int | None = None
    ) -> Work:
        """``trajectories`` each time, their prompts ``longer`` by so many tokens.

        ``per_call``: where not all of them can be sampled side by side, since the policy changes between calls.
        """
        lengths = self.lengths
        # Earlier turns are in the cache: what is read are prompts and observations.
        unread = lengths.total - lengths.sampled + longer
        read, sampled = times * trajectories * unread, times * trajectories * lengths.sampled
        attended = lengths.total + longer
        flops = (
            passed(self.shape, read, attended)
            + passed(self.shape, sampled, 2 * attended)
            + 2 * self.shape.head * sampled
        )
        calls = times * math.ceil(trajectories / per_call) if per_call else times
        hours = self._hours(passed(self.shape, read, attended), self.rates.reading, halves=self._sampled_in_halves)
        hours += calls * self._sampling_seconds(per_call or trajectories, attended) / 3600
        return Work(
            stage=stage,
            times=times,
            trajectories=times * trajectories,
            sampled=sampled,
            read=read,
            flops=flops,
            hours=hours,
        )

    def _sampling_seconds(self, trajectories: int, context: float) -> float:
        """Of one call: steps times what a step takes, on the busiest GPU."""
        mine = math.ceil(trajectories / self.cluster.gpus)
        rows = max(1, min(mine, self.side_by_side))
        engine, lengths = self.cluster.engine, self.lengths
        # Rows come and go; at the end the longest trajectory is waited for.
        steps = max(mine / rows * lengths.sampled, lengths.turns * lengths.longest_action)
        itemsize = 2 if self._sampled_in_halves else 4
        weights = (self.shape.active + self.shape.head) * itemsize
        read = weights + rows * context * self.shape.cached * itemsize
        by_memory = read / (self.cluster.gpu.gb_per_second * 1e9 * self.rates.bandwidth)
        by_products = (
            2
            * rows
            * (self.shape.active + self.shape.head)
            / (self._rate(self._sampled_in_halves) * self.rates.reading)
        )
        return steps * (max(by_memory, by_products) + self.shape.layers * self.rates.layer_ms[engine] / 1000)

    def _hours(self, flops: float, share: float, *, halves: bool) -> float:
        return flops / (self.cluster.gpus * self._rate(halves) * share) / 3600

    def _rate(self, halves: bool) -> float:
        """Operations a second of one GPU."""
        return 1e12 * (self.cluster.gpu.tflops if halves else self.cluster.gpu.tflops_float32)

    @property
    def _sampled_in_halves(self) -> bool:
        return self.itemsize == 2 or self.cluster.engine == "vllm"  # which samples in bfloat16 whatever is trained


def passed(shape: Shape, tokens: float, context: float) -> float:
    """Operations of forward passes without the head: two for each weight, and causal attention over ``context`` tokens, of
    which a token sees half on average (scores and values, two operations each)."""
    return tokens * (2 * shape.active + 2 * shape.attention_width * context)


def trained(shape: Shape, tokens: float, context: float, positions: float, job: Job) -> float:
    """Operations of forward and backward passes, the head at ``positions``.

    Gradients of activations cost as much as the forward pass, and those of weights as well; frozen weights have none.
    Attention's backward is twice its forward. Checkpointing passes forward once more, but for the head.
    """
    again, passes = bool(job.checkpointing), 2 if job.lora else 3
    weights, attention = 2 * shape.active * tokens, 2 * shape.attention_width * context * tokens
    return (passes + again) * weights + (3 + again) * attention + passes * 2 * shape.head * positions
