"""What an objective is: it makes a loss of the policy's states at the positions of samples. The loop knows no more of it."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from search_e1.training.batch import Average, Batch
from search_e1.training.trained import States, Teacher, TrainedPolicy
from search_e1.types import Sample


class Objective(Protocol):
    """The extension point; ``BaseObjective`` has all of it but ``loss``."""

    average: Average
    max_tokens: int
    """For ``average = "constant"``."""
    weight: float
    """Of the loss, beside those of other objectives."""
    teacher: Teacher | None
    needs_start: bool
    """Whether the policy as the stage began must be at hand."""

    def prepare(self, policy: TrainedPolicy, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Once a step, before its first update: add what must be known of the policy as it is now. All ranks call it."""
        ...

    def teaches(self, sample: Sample) -> bool:
        """Whether a sample has a gradient at all. One that has none counts in the average and makes no pass."""
        ...

    def loss(self, states: States, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's share of the loss: the sum over its positions of ``batch.weights`` times the loss of each.

        Also returns figures for the step's record: sums over the positions, weighted alike.
        """
        ...


class BaseObjective:
    """An ``Objective`` that needs nothing prepared and learns from every sample."""

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
