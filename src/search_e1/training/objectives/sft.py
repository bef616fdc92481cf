"""Supervised fine-tuning: cross-entropy on the sampled tokens of demonstrations or of the policy's own references.

On references, this is rejection-sampling fine-tuning (arXiv:2308.01825), also known as RAFT (arXiv:2304.06767) and STaR
(arXiv:2203.14465).
"""

from torch import Tensor

from search_e1.training.batch import Batch
from search_e1.training.logprobs import fused_token_loss
from search_e1.training.objectives.base import BaseObjective
from search_e1.training.trained import States


class Sft(BaseObjective):
    """The mean of ``-log p(token)`` over all tokens, weighted by the samples' weights."""

    def __init__(self, weight: float = 1.0, logits_mib: float | None = None) -> None:
        self.weight, self.logits_mib = weight, logits_mib

    def loss(self, states: States, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, tokens = fused_token_loss(
            states.hidden, batch.targets, states.head, weights=batch.weights, logits_mib=self.logits_mib
        )
        return loss, {"cross_entropy": (tokens.loss * batch.weights).sum()}
