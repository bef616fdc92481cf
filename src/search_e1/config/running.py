"""How a run is carried out and watched. Nothing here binds it, and all of it may change while the run goes on."""

from typing import Annotated, Literal

from pydantic import Field

from search_e1.config.base import NonNegative, NonNegativeFloat, Positive, Section

Sharding = Literal["none", "fsdp2", "zero3"]


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


class LaunchConfig(Section):
    """How many processes work on a stage. It changes nothing in a run but rounding, and may change while a run goes on."""

    processes: Positive = 1
    """On each machine, one for each of its GPUs. With 1 the stages run in the process that runs the loop; with more GRPO, pool,
    lead, distillation and evaluation are each started as a group of processes, which end with the stage."""
    fork: bool = True
    """Start them as copies of one process that has imported everything once, where that is safe (Linux, and sampling by
    transformers), instead of starting Python anew for each stage."""
    sharding: Sharding = "none"
    """What several processes divide among them in GRPO and distillation: nothing (DDP), or weights, gradients and optimiser
    states, by FSDP2 or DeepSpeed's ZeRO-3 (an extra)."""
    nodes: Positive | None = None
    """Machines, on each of which the same command is started. Default: as ``srun``, torchrun or ``NNODES`` say, else 1."""
    node: NonNegative | None = None
    """Which of them this is, from 0. Default: as ``srun``, torchrun or ``NODE_RANK`` say."""
    address: str | None = None
    """Where the others reach node 0. Default: ``MASTER_ADDR``, else the first of its addresses that they do."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """That node 0 listens on; 0 is any."""
    wait_seconds: Annotated[float, Field(gt=0)] = 300.0
    """How long nodes wait for each other at the start."""
