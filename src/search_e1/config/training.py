"""How a stage trains: optimizer, learning-rate schedule, passes. The same section in every stage that trains."""

from typing import Annotated, Literal

from pydantic import Field

from search_e1.config.base import NonNegativeFloat, Positive, Section, Share

Momentum = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(Section):
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all weights, or Muon for the matrices inside the layers and AdamW for the rest, at one learning rate."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """AdamW's decay rates of the first and the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices; norms and biases have none."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient of all weights together is clipped to this norm; `inf` never clips."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up: stays, or falls to 0 at the last step."""
    warmup: Share = 0.0
    """Share of the steps over which the learning rate rises linearly from 0."""
    micro_batch_tokens: Positive | None = None
    """Most tokens, padding included, of one forward and backward pass; a longer sequence goes alone. It bounds memory and
    changes nothing but rounding; halved when memory runs out. Default: 2048 on a CPU, where small passes are faster; elsewhere
    what fits, by two passes measured before the first step."""
    gradient_checkpointing: bool | None = None
    """Keep only the layers' inputs and compute the rest again in the backward pass: less memory, a third more time. Default:
    only where a single sequence does not fit without it."""
    master_weights: bool = True
    """Keep the weights that are trained in float32, whatever `policy.dtype`. Without it they are in `policy.dtype`, in which
    small steps round away."""
    logits_mib: Positive | None = None
    """MiB of logits in memory at a time. Default: 64 on a CPU, 1024 elsewhere."""


class DistillTrainingConfig(TrainingConfig):
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What the learning rate does after the warm-up: stays, or falls to 0 at the last step."""


class ColdstartTrainingConfig(TrainingConfig):
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What the learning rate does after the warm-up: stays, or falls to 0 at the last step."""
    warmup: Share = 0.05
    """Share of the steps over which the learning rate rises linearly from 0."""
