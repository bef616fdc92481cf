"""Sections of self-distillation, from the pool to the loss."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from search_e1.config.base import LoraConfig, NonNegative, NonNegativeFloat, Positive, Section, Share
from search_e1.config.training import DistillTrainingConfig

Mask = Literal["none", "answers", "turns"]


class PoolConfig(Section):
    """Trajectories that pairs are mined from, of the policy after GRPO."""

    source: Literal["fresh", "grpo"] = "fresh"
    """`fresh`: sample new trajectories. `grpo`: take the latest group of each question from GRPO, at its group size and
    temperature; needs `grpo.keep_groups`."""
    questions: Positive | None = None
    """Number of training questions. Default: all."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Trajectories per question."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature, also for lead measurement and fresh students."""


class ReferenceConfig(Section):
    """How a reference is rendered in the teacher's prompt, in GRPO, lead measurement and distillation alike."""

    shows: Literal["whole", "searches", "searches_and_answer", "answer", "none"] = "whole"
    """The whole trajectory (as published), or only its searches, its searches and answer, or its answer, each in its tags.
    `none` is a null test of the method: the teacher gets the plain prompt."""
    max_tokens: Positive | None = None
    """Maximum tokens of the teacher's prompt and the response together. Default: the policy's context."""
    shorten: Literal["passages", "evenly", "never"] = "passages"
    """How to shorten a whole reference that does not fit. `passages`: drop the last passages of its observations. `evenly`:
    cut all passages to the same number of words. Actions are never cut; a reference that still does not fit is left out and
    counted."""


WHOLE = ReferenceConfig()
"""The published setting."""


class PairsConfig(Section):
    """Which trajectory becomes the reference, and which siblings learn from it; see docs/distillation.md."""

    students: Positive = 1
    """Maximum students per reference; each makes a pair."""
    students_by: Literal["wrong_first", "any"] = "wrong_first"
    """`wrong_first`: wrong siblings, then correct but less efficient ones, most divergent first (as published). `any`: random
    members of the group, so that students follow the policy's own distribution and are not only its mistakes."""
    max_searches: NonNegative | None = None
    """Use only references with at most this many searches, i.e. easy questions. Default: no limit."""
    references_by: Literal["fewest_searches", "gold"] = "fewest_searches"
    """The reference: the correct trajectory with the fewest searches (ties: fewest sampled tokens), or with `gold` the
    question's demonstration in `data.demonstrations`."""


class LeadConfig(Section):
    """The teacher's lead, measured before every distillation, and its gate."""

    pairs: Positive = 64
    """Questions whose pairs are held out from distillation and measured, one pair each."""
    max_share: Share = 0.25
    """Maximum share of questions held out."""
    samples: Positive = 2
    """Trajectories sampled per pair, prompt and kind of start."""
    minimum: float = 0.02
    """Lead in EM (privileged minus plain, from the question) below which distillation is refused."""
    gate: Literal["mean", "low"] = "mean"
    """What must reach `minimum`: the measured lead, or the lower end of its 95% interval."""
    saving: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Alternative to `minimum`: a teacher whose reference saves this share of sampled tokens passes too, unless the interval of
    its lead lies below 0. 1: only EM counts."""
    searches: NonNegativeFloat = 0.2
    """Maximum searches per question that the reference may add: a student that learns to search more lacks the reference that
    makes up for it. Does not apply to teachers verified one by one (`distill.teachers`)."""
    enforce: bool = True
    """Refuse to distill without a lead. If off, the lead is only measured and reported. Does not apply to `sft`."""


class ClassWeights(Section):
    """Loss weights of sampled tokens by token class; the loss is the weighted mean."""

    thought: NonNegativeFloat = 1.0
    search: NonNegativeFloat = 1.0
    answer: NonNegativeFloat = 1.0
    tag: NonNegativeFloat = 1.0
    """Protocol tags and end tokens."""

    @model_validator(mode="after")
    def _some(self) -> "ClassWeights":
        if not any((self.thought, self.search, self.answer, self.tag)):
            raise ValueError("all weights are 0, so nothing would be distilled")
        return self


class MergeConfig(Section):
    """The strength at which the adapter is merged when distillation ends."""

    strengths: Annotated[tuple[Share, ...], Field(min_length=1)] = (1.0,)
    """Scales of the adapter: 1 merges it fully (as published), 0 keeps the initial policy. If several are given, the policy
    answers `questions` at each; of those whose EM is within one standard error of the best, the one with the fewest tokens is
    merged."""
    questions: Annotated[int, Field(ge=2)] = 64
    """Training questions answered greedily at each of several strengths; questions not distilled on come first."""

    @model_validator(mode="after")
    def _distinct(self) -> "MergeConfig":
        if len(set(self.strengths)) < len(self.strengths):
            raise ValueError(f"strengths = {list(self.strengths)}: a value is repeated; give each once")
        return self


class DistillConfig(Section):
    objective: str = "self_distillation"
    """Name of a registered objective, or `module:attribute` of your own. `self_distillation` (as published), or `sft`:
    supervised fine-tuning on the same references, each once per epoch, under the plain prompt, with cross-entropy on its
    sampled tokens. `sft` has no teacher: no lead is measured, and the keys for teacher and divergence have no effect."""
    epochs: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    batch_size: Positive = 16
    """Pairs per optimizer step."""
    order: Literal["shuffled", "easiest_first"] = "shuffled"
    """Order of the pairs in an epoch. `easiest_first`: by ascending number of their references' searches, then sampled
    tokens."""
    weights: Literal["lora", "all"] = "lora"
    """Train adapters, which are merged at the end (as published), or all weights, with a frozen copy as the teacher."""
    lora: LoraConfig = LoraConfig()
    """With `weights = "lora"`."""
    divergence: Literal["forward_kl", "reverse_kl", "js"] = "forward_kl"
    """KL(teacher || student) (as published), KL(student || teacher), or the generalized Jensen-Shannon divergence."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The teacher's weight in the mixture of `js`; towards 0 it acts like `forward_kl`, towards 1 like `reverse_kl`."""
    tau: Annotated[float, Field(gt=0)] = 10.0
    """Upper limit of the clipped divergence, in nats."""
    clip: Literal["entry", "token", "none"] = "entry"
    """Clip each vocabulary entry's term before the sum (as published), each token's sum, or nothing."""
    top_k: Positive | None = None
    """Compute the divergence over the teacher's k likeliest vocabulary entries, with all others summed into one. Default: over
    the full vocabulary (as published)."""
    teachers: Literal["all", "verified"] = "all"
    """`all` (as published), or only those `verified` to follow their reference: sampled once, greedily, with the reference in
    the prompt, they answer correctly with no more searches than it has. Costs one trajectory per question."""
    teacher_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the teacher's distribution; below 1 sharpens it."""
    class_weights: ClassWeights = ClassWeights()
    students: Literal["stored", "fresh"] = "stored"
    """`stored`: the pairs' students (as published, offline). `fresh`: one student per reference sampled from the current
    policy at each step (on-policy), at `pool.temperature`."""
    mask: Mask = "none"
    """Exclude tokens where the student could not know the teacher's next step: its `answers`, or whole `turns`. A step is
    unknowable if the reference's action after the same number of searches has words that occur neither in the question nor in
    what the student has read, and the student has not read every passage that the reference had."""
    merge: MergeConfig = MergeConfig()
    training: DistillTrainingConfig = DistillTrainingConfig()

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher's lead is measured before this objective."""
        return self.objective != "sft"

    @property
    def verifies(self) -> bool:
        """Whether teachers are verified before distillation."""
        return self.has_teacher and self.teachers == "verified"

    @model_validator(mode="after")
    def _is_used(self) -> "DistillConfig":
        if self.beta != 0.5 and self.divergence != "js":
            raise ValueError(f'beta = {self.beta:g} belongs to divergence = "js", not to "{self.divergence}"; remove it')
        if self.students == "fresh" and not self.has_teacher:
            raise ValueError(
                f'students = "fresh" needs a teacher, and objective = "{self.objective}" has none; change one of them'
            )
        if self.weights != "lora" and self.merge.strengths != (1.0,):
            raise ValueError('merge.strengths needs weights = "lora": other weights have no adapter to scale and merge')
        return self
