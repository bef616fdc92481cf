"""How a run is carried out and watched. Nothing here binds it, and all of it may change while the run goes on."""

from typing import Annotated, Literal

from pydantic import Field

from search_e1.config.base import NonNegativeFloat, Section

Sharding = Literal["none", "fsdp2"]


class TrackingConfig(Section):
    """Live tracking through transformers' integrations. It changes nothing in a run, and may change while a run goes on."""

    report_to: tuple[str, ...] = ()
    """Trackers to tell every stage's figures: `tensorboard` (into `tracking/` of the run), `wandb`, `trackio`, ..."""
    project: str = "search-e1"
    """Project of the tracker, where it has such a thing."""


class CheckpointsConfig(Section):
    """How often a stage that trains saves how far it is. It changes nothing in a run, and may change while a run goes on."""

    every_seconds: NonNegativeFloat = 60.0
    """From one checkpoint to the next, at the end of a step. The last two are kept until the stage is complete."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Of the time, at most, that checkpoints take: large ones are saved less often than `every_seconds`."""


class ParallelConfig(Section):
    """What several processes (torchrun, accelerate launch) divide among them. It changes nothing in a run but rounding."""

    sharding: Sharding = "none"
    """In GRPO, distillation and cold start: nothing (DDP), or weights, gradients and optimizer states (`fsdp2`)."""
