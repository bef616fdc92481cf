"""Gated distillation beside GRPO: a teacher that sees the group's reference weights the siblings' sampled tokens.

After SDAR (arXiv:2605.15155). There the teacher sees a skill; here it sees the group's reference, rendered as ``[reference]``
says.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from search_e1.config import GatedConfig
from search_e1.training.batch import Batch
from search_e1.training.logprobs import fused_token_loss
from search_e1.training.objectives.base import BaseObjective
from search_e1.training.trained import States, TrainedPolicy
from search_e1.types import Sample


class Gated(BaseObjective):
    """``g * (log p_teacher - log p)`` at each sampled token, gated by ``g = sigmoid(sharpness * (log p_teacher - log p))``.

    The gate and the teacher, which is the policy at the start of the step, get no gradient. Tokens that the teacher prefers
    become more likely; the gate suppresses the others.
    """

    def __init__(self, config: GatedConfig, temperature: float, logits_mib: float | None = None) -> None:
        self.weight, self.sharpness = config.weight, config.sharpness
        self.temperature, self.logits_mib = temperature, logits_mib

    def prepare(self, policy: TrainedPolicy, samples: Sequence[Sample]) -> Sequence[Sample]:
        rows = policy.logprobs(samples, self.temperature, teacher="current")
        return [
            sample.model_copy(update={"ref_logprobs": row, "teacher_prompt_ids": None})
            for sample, row in zip(samples, rows, strict=True)
        ]

    def loss(self, states: States, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.ref_logprobs is not None
        teacher = batch.ref_logprobs

        def token_loss(logprobs: Tensor, rows: slice) -> Tensor:
            gap = teacher[rows] - logprobs
            return torch.sigmoid(self.sharpness * gap.detach()) * gap

        loss, tokens = fused_token_loss(
            states.hidden, batch.targets, states.head, token_loss,
            weights=batch.weights, temperature=self.temperature, logits_mib=self.logits_mib,
        )  # fmt: skip
        gap = teacher - tokens.logprobs
        gate = torch.sigmoid(self.sharpness * gap)
        return loss, {"gate": (gate * batch.weights).sum(), "gap": (gap * batch.weights).sum()}
