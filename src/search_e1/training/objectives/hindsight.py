"""Hindsight: a teacher that sees the group's reference teaches the plain policy at the siblings' search queries.

After SD-Search (arXiv:2605.18299; from its abstract): the Jensen-Shannon divergence at search-query positions, with the same
model in both roles, beside GRPO's loss in each step. There the teacher sees a summary of the queries and outcomes of the whole
group; here it sees the group's reference, rendered as ``[reference]`` says.
"""

from torch import Tensor

from search_e1.training.batch import Batch
from search_e1.training.divergence import fused_divergence
from search_e1.training.objectives.base import BaseObjective
from search_e1.training.trained import States, Teacher


class Hindsight(BaseObjective):
    """The mean over query tokens of the Jensen-Shannon divergence, with teacher and student at the current weights."""

    teacher: Teacher | None = "current"

    def __init__(self, weight: float, logits_mib: float | None = None) -> None:
        self.weight, self.logits_mib = weight, logits_mib

    def loss(self, states: States, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert states.teacher_hidden is not None
        loss, per_token = fused_divergence(
            states.hidden, states.teacher_hidden, states.head,
            weights=batch.weights, divergence="js", logits_mib=self.logits_mib,
        )  # fmt: skip
        return loss, {"divergence": (per_token * batch.weights).sum()}
