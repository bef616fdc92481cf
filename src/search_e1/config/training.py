"""The training section shared by all training stages: optimizer, learning-rate schedule, passes."""

from typing import Annotated, Literal

from pydantic import Field

from search_e1.config.base import NonNegativeFloat, Positive, Section, Share

Momentum = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(Section):
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all weights, or Muon for the matrices inside the layers and AdamW for the rest, at the same learning rate."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """AdamW's decay rates of the first and the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices; norms and biases have none."""
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 1.0
    """Global gradient norm to clip to; `inf` never clips."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to 0 at the last step."""
    warmup: Share = 0.0
    """Share of the steps over which the learning rate rises linearly from 0."""
    micro_batch_tokens: Positive | None = None
    """Maximum tokens, padding included, of one micro-batch; a longer sequence runs alone. Bounds memory and affects results
    only by rounding; halved when memory runs out. Default: 2048 on a CPU, where small passes are faster; elsewhere what fits,
    estimated from two passes before the first step."""
    gradient_checkpointing: bool | None = None
    """Store only the layers' inputs and recompute the rest in the backward pass: less memory, a third more time. Default: only
    if a single sequence does not fit otherwise."""
    master_weights: bool = True
    """Keep trained weights in float32, whatever `policy.dtype`. If false they are in `policy.dtype`, where small updates are
    lost to rounding."""
    logits_mib: Positive | None = None
    """MiB of logits in memory at once. Default: 64 on a CPU, 1024 elsewhere."""


class DistillTrainingConfig(TrainingConfig):
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up: constant, or falling to 0 at the last step."""


class ColdstartTrainingConfig(TrainingConfig):
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up: constant, or falling to 0 at the last step."""
    warmup: Share = 0.05
    """Share of the steps over which the learning rate rises linearly from 0."""
