"""Self-distillation, from the pool to the loss."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from search_e1.config.base import LoraConfig, NonNegative, NonNegativeFloat, Positive, Section, Share
from search_e1.config.training import DistillTrainingConfig

Mask = Literal["none", "answers", "turns"]


class PoolConfig(Section):
    """Trajectories that pairs are mined from, sampled from the policy after GRPO."""

    source: Literal["fresh", "grpo"] = "fresh"
    """Sample them, or take those that GRPO sampled last: the newest groups, one a question, at GRPO's own group size and
    temperature. `grpo` needs `grpo.keep_groups`."""
    questions: Positive | None = None
    """For this many training questions (all, if not given)."""
    group_size: Annotated[int, Field(ge=2)] = 8
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Also of the trajectories that the lead is measured with."""


class ReferenceConfig(Section):
    """What the teacher sees of a reference: the same in GRPO's replay, when the lead is measured and in distillation."""

    shows: Literal["whole", "searches", "searches_and_answer", "answer", "none"] = "whole"
    """The whole trajectory (as published), or its searches, its searches and its answer, its answer alone, each in its tags;
    `none` is the null test of the method: the teacher's prompt is the plain one."""
    max_tokens: Positive | None = None
    """Most tokens of the teacher's prompt and the response together. Without it as many as the policy's context holds."""
    shorten: Literal["passages", "evenly", "never"] = "passages"
    """How a whole reference that does not fit is shortened: the last `passages` of its observations are left out, or all are
    cut `evenly`, to as many of their first words. Its actions never are; what still does not fit is left out and counted."""


WHOLE = ReferenceConfig()
"""As published."""


class PairsConfig(Section):
    """Which trajectory is shown to the teacher, and which siblings learn from it; see docs/distillation.md."""

    students: Positive = 1
    """Most students of one reference; each makes a pair."""
    students_by: Literal["wrong_first", "any"] = "wrong_first"
    """Wrong siblings first, then correct but less efficient ones, the most divergent first (as published); or `any` member
    of the group, so that students are what the policy does, not only what it does wrong."""
    max_searches: NonNegative | None = None
    """Only references with at most this many searches, so that easy questions alone are taught. Default: any."""
    references_by: Literal["fewest_searches", "gold"] = "fewest_searches"
    """Which trajectory is shown: the correct one with the fewest searches (ties: fewest sampled tokens), or the question's
    demonstration in `data.demonstrations`."""


class LeadConfig(Section):
    """How much better the policy is when it sees the reference: measured before every distillation, and its gate."""

    pairs: Positive = 64
    """Pairs that are held out from distillation and measured on."""
    max_share: Share = 0.25
    """At most this share of all pairs is held out."""
    samples: Positive = 2
    """Trajectories sampled for each pair, each prompt and each kind of start."""
    minimum: float = 0.02
    """Lead in EM (privileged minus plain, from the question on) below which distillation is refused."""
    gate: Literal["mean", "low"] = "mean"
    """What must reach `minimum`: the measured lead, or the lower end of its 95% interval."""
    saving: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Or the share of the sampled tokens that the reference saves: a teacher that is no better but shorter by it passes
    too, unless the interval of its lead lies below 0. 1: only EM counts."""
    searches: NonNegativeFloat = 0.2
    """Most searches a question that the reference may add: a student that learns to search on lacks what makes up for it. Does
    not concern teachers that are verified one by one (`distill.teachers`)."""
    enforce: bool = True
    """Refuse to distill without a lead. Turned off, the lead is measured and reported only. It does not concern `sft`."""


class ClassWeights(Section):
    """Weights in the loss of the sampled tokens by what they are part of; the loss is the weighted mean."""

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
    """How much of the adapter is merged when distillation ends."""

    strengths: Annotated[tuple[Share, ...], Field(min_length=1)] = (1.0,)
    """Shares of the adapter: 1 merges all of it (as published), 0 is the policy before. Of several the one is merged that
    answers `questions` with the fewest tokens among those as good as the best, by one standard error."""
    questions: Annotated[int, Field(ge=2)] = 64
    """Training questions that each of several strengths answers, greedily: first those that are not distilled on."""

    @model_validator(mode="after")
    def _distinct(self) -> "MergeConfig":
        if len(set(self.strengths)) < len(self.strengths):
            raise ValueError(f"strengths = {list(self.strengths)}: one of them twice")
        return self


class DistillConfig(Section):
    objective: str = "self_distillation"
    """Name of a registered objective, or `module:attribute` of one's own. `self_distillation` (as published), or `sft`:
    supervised fine-tuning on the same references, each once an epoch, under the plain prompt, with cross-entropy on its
    sampled tokens. `sft` has no teacher: no lead is measured, and the keys on teacher and divergence do nothing."""
    epochs: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    batch_size: Positive = 16
    """Pairs an optimizer step."""
    order: Literal["shuffled", "easiest_first"] = "shuffled"
    """Of the pairs in an epoch: by chance, or by their references' searches and then their sampled tokens, few first."""
    weights: Literal["lora", "all"] = "lora"
    """What is trained: adapters, which are merged at the end (as published), or all weights; then a frozen copy teaches."""
    lora: LoraConfig = LoraConfig()
    """With `weights = "lora"`."""
    divergence: Literal["forward_kl", "reverse_kl", "js"] = "forward_kl"
    """KL(teacher || student) (as published), KL(student || teacher), or the generalized Jensen-Shannon divergence."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The teacher's share of the mixture of `js`; towards 0 it acts like `forward_kl`, towards 1 like `reverse_kl`."""
    tau: Annotated[float, Field(gt=0)] = 10.0
    """Where the divergence is clipped, in nats."""
    clip: Literal["entry", "token", "none"] = "entry"
    """Clip each vocabulary entry's term before the sum (as published), each token's sum, or nothing."""
    top_k: Positive | None = None
    """Tell only this many of the teacher's likeliest vocabulary entries apart, and count all others as one. Default: all are
    told apart (as published)."""
    teachers: Literal["all", "verified"] = "all"
    """All (as published), or those that are `verified` to follow their reference: asked once, greedily, with the reference in
    the prompt, they answer right in no more searches than it takes. Costs a trajectory for each question."""
    teacher_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Below 1 sharpens the teacher."""
    class_weights: ClassWeights = ClassWeights()
    students: Literal["stored", "fresh"] = "stored"
    """Whose tokens are taught: the pairs' stored students (as published, offline), or one sampled afresh for each reference
    from the policy as it is at that step (on-policy), at `pool.temperature`."""
    mask: Mask = "none"
    """Leave out what the student could not know: its `answers`, or whole `turns`, where the reference's action after as many
    searches has words that occur neither in the question nor in what the student has read so far."""
    merge: MergeConfig = MergeConfig()
    training: DistillTrainingConfig = DistillTrainingConfig()

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher's lead is measured before this objective."""
        return self.objective != "sft"

    @property
    def verifies(self) -> bool:
        """Whether teachers are asked before they teach."""
        return self.has_teacher and self.teachers == "verified"

    @model_validator(mode="after")
    def _is_used(self) -> "DistillConfig":
        if self.beta != 0.5 and self.divergence != "js":
            raise ValueError(f'beta = {self.beta:g} belongs to divergence = "js", not to "{self.divergence}"; take it out')
        if self.students == "fresh" and not self.has_teacher:
            raise ValueError(
                f'students = "fresh" need a teacher, and objective = "{self.objective}" has none; take one of them out'
            )
        if self.weights != "lora" and self.merge.strengths != (1.0,):
            raise ValueError('merge.strengths need weights = "lora": there is no adapter to merge a share of')
        return self
