"""GRPO, and what may be added to its loss."""

from typing import Annotated, Any, Literal

from pydantic import Field

from search_e1.config.base import LoraConfig, NonNegative, NonNegativeFloat, Positive, Section, Share


class ReplayConfig(Section):
    """Examples of following a reference, trained on in every GRPO step so that the teacher's lead outlives GRPO.

    They are made of the step's own groups: the privileged prompt that shows a question's reference, and the reference's
    own ids, with cross-entropy on what was sampled. Off by default; the published method has no such thing.
    """

    examples_per_step: NonNegative = 0
    """Most examples in one optimiser step, at most one for each question that has a correct trajectory. 0 turns it off."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Of their mean cross-entropy a token, beside the GRPO loss. 0 turns it off."""
    detours: Share = 0.5
    """Share of the examples that begin with a search of a sibling that the reference did without (it carries no loss), so
    that the reference is followed from off its track too."""


class HindsightConfig(Section):
    """The policy that sees a group's reference teaches the plain one, at the siblings' search queries, beside the GRPO loss.

    After SD-Search. The teacher is the policy as it is now, without gradient; `[reference]` says what it sees.
    """

    weight: NonNegativeFloat = 0.0
    """Of the mean divergence a token, beside the GRPO loss. 0 turns it off."""
    classes: Annotated[tuple[Literal["thought", "search", "answer", "tag"], ...], Field(min_length=1)] = ("search",)
    """Which sampled tokens are taught, by what they are part of."""
    divergence: Literal["forward_kl", "reverse_kl", "js"] = "js"
    """As in `[distill]`; `js` with equal shares."""
    teacher_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Below 1 sharpens the teacher."""


class EvidenceConfig(Section):
    """Each token's advantage weighed by what the policy that sees a group's reference thinks of it, its lead.

    A token's factor is exp(lead) in a trajectory above its group's mean and exp(-lead) in one below, kept within 1 - `bound`
    and 1 + `bound`. No advantage changes its sign.
    """

    strength: Share = 0.0
    """Share of the correction: 0 turns it off, 1 takes all of it."""
    bound: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Farthest that a factor may be from 1."""


class GrpoConfig(Section):
    steps: NonNegative = 200
    """Optimiser steps a round. 0 leaves GRPO out."""
    questions_per_step: Positive = 64
    """Questions of an optimiser step; their trajectories are sampled afresh from the current policy."""
    group_size: Annotated[int, Field(ge=2)] = 5
    """Trajectories sampled for a question."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    temperature: Annotated[float, Field(gt=0)] = 1.0
    lora: LoraConfig | None = None
    """Train adapters and merge them at the end of the stage; without it all weights are trained."""
    length_penalty: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Most that a correct trajectory's reward loses by its length, compared to the other correct ones of its question: GRPO
    then asks for fewer sampled tokens. 0: reward is exact match alone (as published)."""
    replay: ReplayConfig = ReplayConfig()
    keep_groups: bool = False
    """Keep the newest group of each question beside the policy, for `pool.source = "grpo"`."""
    hindsight: HindsightConfig = HindsightConfig()
    evidence: EvidenceConfig = EvidenceConfig()
    trainer: dict[str, Any] = {}
    """Further arguments of `trl.GRPOConfig` (`beta`, `epsilon`, `per_device_train_batch_size`, ...)."""

    @property
    def shows_references(self) -> bool:
        """Whether anything in this stage depends on what a reference shows."""
        replayed = self.replay.examples_per_step and self.replay.weight
        return bool(replayed or self.hindsight.weight or self.evidence.strength)
