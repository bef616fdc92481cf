"""Sections on how a run is executed and tracked. None is part of its fingerprint; all may change during a run."""

from typing import Annotated, Literal

from pydantic import Field

from search_e1.config.base import NonNegativeFloat, Section

Sharding = Literal["none", "fsdp2"]


class TrackingConfig(Section):
    """Live tracking through transformers' integrations. Does not affect results; may change during a run."""

    report_to: tuple[str, ...] = ()
    """Trackers that receive every stage's figures: `tensorboard` (into `tracking/` in the run directory), `wandb`, `trackio`,
    ..."""
    project: str = "search-e1"
    """Project name, for trackers that have projects."""


class CheckpointsConfig(Section):
    """How often a training stage saves a checkpoint. Does not affect results; may change during a run."""

    every_seconds: NonNegativeFloat = 60.0
    """Minimum time between checkpoints, which are saved at the end of a step. The last two are kept until the stage is
    complete."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Maximum share of time spent on checkpoints: large ones are saved less often than `every_seconds`."""


class ParallelConfig(Section):
    """What several processes (torchrun, accelerate launch) shard. Affects results only by rounding."""

    sharding: Sharding = "none"
    """In GRPO, distillation and cold start: `none` (DDP), or weights, gradients and optimizer states (`fsdp2`)."""
