"""What happens when memory runs out: a step is taken in smaller parts, or the stage ends with a message."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from transformers import Trainer

from search_e1.errors import TrainingError


def ran_out(error: BaseException) -> bool:
    """Whether ``error`` is the accelerator's or the machine's memory running out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and should_reduce_batch_size(error)
    )


def give_back() -> None:
    """Make free what a pass that failed has left. Call it when its exception is gone: that holds its tensors."""
    clear_device_cache(garbage_collection=True)


@contextmanager
def told(stage: str) -> Iterator[None]:
    """Turn memory that runs out, where smaller parts did not help, or a worker that was killed, into a message.

    Raises:
        TrainingError: that happened.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        if said.startswith("DataLoader worker"):  # torch's own words for one that was killed
            raise TrainingError(f"{stage}: {said}; run the same command again, it goes on") from error
        if isinstance(error, TrainingError) or not ran_out(error):
            raise
        raise TrainingError(
            f"{stage}: out of memory ({said}); lower rollout.batch_size, or per_device_train_batch_size in [grpo.trainer] or "
            "[distill.trainer], or turn gradient_checkpointing on there; then run the same command again"
        ) from error


class HalvingTrainer(Trainer):
    """A trainer that halves a micro-batch for which memory does not suffice, until it does.

    The step is begun anew then, since a pass that failed may have left a part of its gradients; the sum over the parts is
    the step's own gradient, but for rounding. Only with one process: several must make the same passes.
    """

    halved: int = 0
    """How often, in the step at hand; whoever reports it sets it back."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._parts: list[dict[str, Any]] = []
        self._begun: Any = None
        super().__init__(*args, **kwargs)

    def part_loss(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """A micro-batch's loss, or that of a part of one: those of the parts add up to the whole's."""
        raise NotImplementedError

    def halves(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """A micro-batch, or a part of one, in two; ``None`` if it cannot be smaller."""
        raise NotImplementedError

    def mark(self) -> Any:
        """What ``part_loss`` has noted so far."""

    def rewind(self, mark: Any) -> None:
        """Forget what ``part_loss`` has noted since."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's loss, whose gradients are there already: the caller's backward pass finds nothing to do."""
        if self.accelerator.num_processes > 1 or not model.training:
            return self.part_loss(model, inputs, num_items_in_batch)
        if not self._parts:
            self._begun = self.mark()
        first, at = len(self._parts), len(self._parts)
        self._parts.append(inputs)
        losses: list[Tensor] = []
        while at < len(self._parts):
            loss = self._pass(model, self._parts[at], num_items_in_batch)
            if loss is None:
                self._halve(at)
                first += at < first
                at, losses = 0, []
                self.rewind(self._begun)
                model.zero_grad()
                continue
            losses += [loss] if at >= first else []
            at += 1
        if self.accelerator.sync_gradients:  # the step's last micro-batch
            self._parts = []
        return torch.stack(losses).sum().requires_grad_()

    def _pass(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor | None:
        """Forward and backward; ``None`` if memory ran out."""
        try:
            loss = self.part_loss(model, inputs, num_items_in_batch)
            with torch.autocast(loss.device.type, enabled=False):  # as where transformers calls it
                self.accelerator.backward(loss)
            return loss.detach()
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
        give_back()
        return None

    def _halve(self, at: int) -> None:
        halves = self.halves(self._parts[at])
        if halves is None:
            raise TrainingError(
                f"step {self.state.global_step + 1}: out of memory for a single sequence; lower rollout.max_tokens, turn "
                "gradient_checkpointing on, or use a smaller policy"
            )
        self._parts[at : at + 1] = halves
        self.halved += 1
