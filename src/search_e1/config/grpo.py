"""GRPO, and what may be added to its loss."""

from typing import Annotated, Literal

from pydantic import Field

from search_e1.config.base import LoraConfig, NonNegative, NonNegativeFloat, Positive, Section, Share
from search_e1.config.training import TrainingConfig


class ReplayConfig(Section):
    """Examples of following a reference, trained on in every GRPO step so that the teacher's lead survives GRPO.

    They are made of the step's own groups: the privileged prompt that shows a question's reference, and the reference's
    own ids, with cross-entropy on what was sampled. Off by default; the published method has no such thing.
    """

    examples_per_step: NonNegative = 0
    """Most examples in one step, at most one for each question that has a correct trajectory. 0 turns it off."""
    weight: NonNegativeFloat = 1.0
    """Weight of their mean cross-entropy a token, beside the GRPO loss. 0 turns it off."""
    detours: Share = 0.5
    """Share of the examples that begin with a sibling's search that the reference did without (it carries no loss), so
    that the reference is followed from off its track too."""


class HindsightConfig(Section):
    """The policy that sees a group's reference teaches the plain one at the siblings' search queries, beside the GRPO loss.

    After SD-Search (arXiv:2605.18299). The teacher is the current policy, without gradient; `[reference]` says what it sees.
    """

    weight: NonNegativeFloat = 0.0
    """Weight of the mean Jensen-Shannon divergence a token, beside the GRPO loss. 0 turns it off."""


class GatedConfig(Section):
    """The policy that sees a group's reference weighs what its siblings sampled, beside the GRPO loss.

    SDAR (arXiv:2605.15155). The teacher is the current policy, without gradient; `[reference]` says what it sees.
    """

    weight: NonNegativeFloat = 0.0
    """Weight of the gated mean a token, beside the GRPO loss; 0.01 there. 0 turns it off."""
    sharpness: NonNegativeFloat = 5.0
    """Of the gate, sigmoid(sharpness * (teacher's log-probability - policy's)), as published. 0: no gate, each token counts
    half."""


class EvidenceConfig(Section):
    """Each token's advantage weighed by the lead there of the policy that sees a group's reference.

    A token's factor is exp(lead) in a trajectory above its group's mean and exp(-lead) in one below, kept within 1 - `bound`
    and 1 + `bound`. No advantage changes its sign.
    """

    strength: Share = 0.0
    """Share of the correction: 0 turns it off, 1 takes all of it."""
    bound: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Farthest that a factor may be from 1."""


class CorrectionConfig(Section):
    """Each token's advantage plus the lead there of a policy that knows more.

    At searches that is one that sees a group's reference, passages included, at answers one that sees the right answer, after
    the summary of EviSD (arXiv:2608.01359). Every advantage may change its sign, and groups with equal rewards teach too.
    """

    strength: NonNegativeFloat = 0.0
    """What a lead of one nat adds to an advantage; 0.2 there. 0 turns it off."""
    bound: Annotated[float, Field(gt=0)] = 5.0
    """Larger leads, up or down, count as this many nats; 5 there."""


class GuardConfig(Section):
    """Ends the stage where training has collapsed, with the policy that did best as its result (docs/grpo.md)."""

    drop: Share = 0.5
    """Share of the mean reward, or of the share of answered trajectories, that has to be lost since its best window. 0 turns
    the guard off."""
    window: Positive = 8
    """Steps that are averaged. With fewer questions a step, chance explains more, and it takes more steps to tell."""


class GrpoConfig(Section):
    steps: NonNegative = 200
    """Sampling steps a round. 0 leaves GRPO out."""
    questions_per_step: Positive = 64
    """Questions of a step; their trajectories are sampled afresh from the current policy."""
    group_size: Annotated[int, Field(ge=2)] = 5
    """Trajectories sampled for a question."""
    mini_batches: Positive = 1
    """Optimiser updates that the trajectories of a step are divided among. With more than one, the later ones are off-policy:
    ratios are taken to the policy as it was when the step began, and clipped."""
    epochs: Positive = 1
    """Passes over the trajectories of a step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    temperature: Annotated[float, Field(gt=0)] = 1.0
    objective: str = "grpo"
    """Name of a registered objective, or `module:attribute` of one's own. docs/grpo.md tells how to write one."""
    average: Literal["dapo", "grpo", "dr_grpo"] = "grpo"
    """How the tokens of an update are averaged: all tokens alike (`dapo`), each trajectory's mean first (`grpo`), or their sum
    over trajectories times `rollout.max_tokens` (`dr_grpo`)."""
    scale_advantages: bool = True
    """Divide a group's advantages by the standard deviation of its rewards (as published)."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Ratios below 1 minus this gain nothing more."""
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    """Ratios above 1 plus this gain nothing more."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the KL penalty towards the policy at the start of the stage. 0: none (as published)."""
    importance_cap: Annotated[float, Field(ge=1)] = 2.0
    """Cap of the importance weight of a token sampled by an engine with other arithmetic than the trainer's (vLLM)."""
    lora: LoraConfig | None = None
    """Train adapters and merge them at the end of the stage; without it all weights are trained."""
    length_penalty: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Most that a correct trajectory's reward loses by its length, compared to the other correct ones of its question: GRPO
    then asks for fewer sampled tokens. 0: the reward alone (as published)."""
    replay: ReplayConfig = ReplayConfig()
    keep_groups: bool = False
    """Keep the newest group of each question beside the policy, for `pool.source = "grpo"`."""
    hindsight: HindsightConfig = HindsightConfig()
    gated: GatedConfig = GatedConfig()
    evidence: EvidenceConfig = EvidenceConfig()
    correction: CorrectionConfig = CorrectionConfig()
    guard: GuardConfig = GuardConfig()
    training: TrainingConfig = TrainingConfig()

    @property
    def shows_references(self) -> bool:
        """Whether anything in this stage depends on what a reference shows."""
        return bool(self.replay.examples_per_step and self.replay.weight) or self.asks_teachers

    @property
    def asks_teachers(self) -> bool:
        """Whether a step makes passes over trajectories under a teacher's prompt."""
        return bool(self.hindsight.weight or self.gated.weight or self.evidence.strength or self.correction.strength)
