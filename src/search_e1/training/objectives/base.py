"""The interface of an objective: it turns the policy's hidden states at the samples' positions into a loss."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from search_e1.training.batch import Average, Batch
from search_e1.training.trained import States, Teacher, TrainedPolicy
from search_e1.types import Sample


class Objective(Protocol):
    """The extension point; ``BaseObjective`` implements everything except ``loss``."""

    average: Average
    max_tokens: int
    """The divisor for ``average = "constant"``."""
    weight: float
    """Coefficient of the loss in the sum over objectives."""
    teacher: Teacher | None
    needs_start: bool
    """Whether the policy at the start of the stage must be available."""

    def prepare(self, policy: TrainedPolicy, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Add figures of the current policy to the samples; called by all ranks once per step, before its first update."""
        ...

    def teaches(self, sample: Sample) -> bool:
        """Whether a sample has a gradient. One without counts in the average but goes through no pass."""
        ...

    def loss(self, states: States, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's share of the loss: the sum over its positions of ``batch.weights`` times each position's loss.

        Also returns figures for the step's record: sums over the positions with the same weights.
        """
        ...


class BaseObjective:
    """An ``Objective`` without preparation that learns from every sample."""

    average: Average = "tokens"
    max_tokens = 1
    weight = 1.0
    teacher: Teacher | None = None
    needs_start = False
    name: ClassVar[str] = ""

    def prepare(self, policy: TrainedPolicy, samples: Sequence[Sample]) -> Sequence[Sample]:
        return samples

    def teaches(self, sample: Sample) -> bool:
        return True
