"""Self-distillation: the divergence between the policy under the privileged prompt and under the plain one.

Offline (Search-E1, arXiv:2605.22511): the teacher is the policy at the start of the stage, and the students' trajectories were
sampled before the stage.
"""

from torch import Tensor

from search_e1.config import DistillConfig
from search_e1.training.batch import Batch
from search_e1.training.divergence import fused_divergence
from search_e1.training.objectives.base import BaseObjective
from search_e1.training.trained import States, Teacher


class SelfDistillation(BaseObjective):
    """The weighted mean over tokens of the clipped divergence over the whole vocabulary; see ``fused_divergence``."""

    teacher: Teacher | None = "start"
    needs_start = True

    def __init__(self, config: DistillConfig) -> None:
        self.config = config

    def loss(self, states: States, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        assert states.teacher_hidden is not None
        loss, per_token = fused_divergence(
            states.hidden, states.teacher_hidden, states.head,
            teacher_head=states.teacher_head,
            weights=batch.weights, divergence=config.divergence, beta=config.beta, tau=config.tau, clip=config.clip,
            top_k=config.top_k,
            teacher_temperature=config.teacher_temperature, logits_mib=config.training.logits_mib,
        )  # fmt: skip
        return loss, {"divergence": (per_token * batch.weights).sum()}
