"""Sections of GRPO and of the optional additions to its loss."""

from typing import Annotated, Literal

from pydantic import Field

from search_e1.config.base import LoraConfig, NonNegative, NonNegativeFloat, Positive, Section, Share
from search_e1.config.training import TrainingConfig


class ReplayConfig(Section):
    """Examples of following a reference, added to every GRPO step so that the teacher's lead survives GRPO.

    An example is built from the step's own groups: the privileged prompt with a question's reference, then the reference's ids,
    with cross-entropy on its sampled tokens. Off by default; not part of the published method.
    """

    examples_per_step: NonNegative = 0
    """Maximum examples per step, at most one per question with a correct trajectory. 0 turns replay off."""
    weight: NonNegativeFloat = 1.0
    """Weight of the mean cross-entropy per token, added to the GRPO loss. 0 turns replay off."""
    detours: Share = 0.5
    """Share of examples that begin with a sibling's search that the reference does not make (without loss), so that the policy
    learns to follow the reference from off track too."""


class HindsightConfig(Section):
    """Self-distillation on the siblings' search queries, added to the GRPO loss: the teacher sees the group's reference.

    After SD-Search (arXiv:2605.18299). The teacher is the current policy, without gradient; `[reference]` sets its prompt.
    """

    weight: NonNegativeFloat = 0.0
    """Weight of the mean Jensen-Shannon divergence per token, added to the GRPO loss. 0 turns it off."""


class GatedConfig(Section):
    """Gated self-distillation on all sampled tokens of the siblings, added to the GRPO loss: the teacher sees the reference.

    SDAR (arXiv:2605.15155). The teacher is the current policy, without gradient; `[reference]` sets its prompt.
    """

    weight: NonNegativeFloat = 0.0
    """Weight of the gated mean per token, added to the GRPO loss (SDAR: 0.01). 0 turns it off."""
    sharpness: NonNegativeFloat = 5.0
    """Sharpness of the gate, sigmoid(sharpness * (teacher's log-probability - policy's)), as in SDAR. 0: every token has gate
    0.5."""


class EvidenceConfig(Section):
    """Multiplies each token's advantage by a factor from the teacher's lead on that token; the teacher sees the reference.

    The factor is exp(lead) in a trajectory above its group's mean and exp(-lead) in one below, clipped to 1 - `bound` and
    1 + `bound`. No advantage changes its sign.
    """

    strength: Share = 0.0
    """Share of the correction: 0 turns it off, 1 applies it fully."""
    bound: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Maximum distance of a factor from 1."""


class CorrectionConfig(Section):
    """Adds the lead of a better-informed teacher on each token to the token's advantage.

    On searches the teacher sees the group's reference, passages included; on answers it sees the correct answer. After the
    summary of EviSD (arXiv:2608.01359). An advantage may change its sign, and groups with equal rewards contribute too.
    """

    strength: NonNegativeFloat = 0.0
    """Advantage added per nat of lead (EviSD: 0.2). 0 turns it off."""
    bound: Annotated[float, Field(gt=0)] = 5.0
    """Leads are clipped to plus and minus this many nats (EviSD: 5)."""


class GuardConfig(Section):
    """Ends the stage if training has collapsed, with the best policy as its result (docs/grpo.md)."""

    drop: Share = 0.5
    """Relative fall, since the best window, of the mean reward or of the share of answered trajectories that counts as a
    collapse. 0 turns the guard off."""
    window: Positive = 8
    """Steps averaged. With fewer questions per step noise is larger, and detection needs more steps."""


class GrpoConfig(Section):
    steps: NonNegative = 200
    """Sampling steps per round. 0 leaves GRPO out."""
    questions_per_step: Positive = 64
    """Questions per step; their trajectories are sampled from the current policy."""
    group_size: Annotated[int, Field(ge=2)] = 5
    """Trajectories sampled per question."""
    mini_batches: Positive = 1
    """Optimizer updates that a step's trajectories are divided into. With more than one, later updates are off-policy: ratios
    are taken to the policy at the beginning of the step, and clipped."""
    epochs: Positive = 1
    """Passes over the trajectories of a step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    temperature: Annotated[float, Field(gt=0)] = 1.0
    objective: str = "grpo"
    """Name of a registered objective, or `module:attribute` of your own; docs/grpo.md describes how to write one."""
    average: Literal["dapo", "grpo", "dr_grpo"] = "grpo"
    """Averaging of an update's token losses: over all tokens (`dapo`), within each trajectory and then over trajectories
    (`grpo`), or their sum divided by the number of trajectories times `rollout.max_tokens` (`dr_grpo`)."""
    scale_advantages: bool = True
    """Divide a group's advantages by the standard deviation of its rewards (as published)."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Ratios are clipped at 1 minus this."""
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    """Ratios are clipped at 1 plus this."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the KL penalty to the policy at the start of the stage. 0: none (as published)."""
    importance_cap: Annotated[float, Field(ge=1)] = 2.0
    """Cap on the importance weight of tokens sampled by an engine whose numerics differ from the trainer's (vLLM)."""
    lora: LoraConfig | None = None
    """Train adapters and merge them at the end of the stage. Default: all weights are trained."""
    length_penalty: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Maximum share of its reward that a correct trajectory loses for its length relative to the question's other correct ones,
    which favors fewer sampled tokens. 0: the plain reward (as published)."""
    replay: ReplayConfig = ReplayConfig()
    keep_groups: bool = False
    """Keep the latest group of each question beside the policy, for `pool.source = "grpo"`."""
    hindsight: HindsightConfig = HindsightConfig()
    gated: GatedConfig = GatedConfig()
    evidence: EvidenceConfig = EvidenceConfig()
    correction: CorrectionConfig = CorrectionConfig()
    guard: GuardConfig = GuardConfig()
    training: TrainingConfig = TrainingConfig()

    @property
    def shows_references(self) -> bool:
        """Whether the stage depends on `[reference]`."""
        return bool(self.replay.examples_per_step and self.replay.weight) or self.asks_teachers

    @property
    def asks_teachers(self) -> bool:
        """Whether a step runs forward passes under a teacher's prompt."""
        return bool(self.hindsight.weight or self.gated.weight or self.evidence.strength or self.correction.strength)
