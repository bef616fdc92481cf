"""The check before work starts: what cannot fit is refused while nothing is lost yet."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from search_e1.config import Config
from search_e1.errors import ConfigError, ModelError
from search_e1.lab.plan.hardware import GIB, Cluster, Gpu, Sharding
from search_e1.lab.plan.plan import memories
from search_e1.lab.plan.shapes import read_config, shape_of
from search_e1.lab.plan.warnings import unfit

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Device:
    """What is known of the device before anything is loaded."""

    memory: int
    """Bytes."""
    ranks: int
    sharding: Sharding = "none"


def cuda_device(device: torch.device, ranks: int, sharding: str) -> Device | None:
    """One GPU of as many as ``ranks``, under ``launch.sharding``; ``None`` where it is none, whose memory nobody tells."""
    if device.type != "cuda":
        return None
    memory = torch.cuda.get_device_properties(device).total_memory
    return Device(memory, ranks, "full" if sharding != "none" and ranks > 1 else "none")


def check_memory(config: Config, model: str, device: Device, stages: Sequence[str]) -> None:
    """Refuse what cannot fit, whatever the data; say in the log what fits only while trajectories stay short.

    ``stages``: of ``grpo`` and ``distill``, those that will run. ``model`` is what they start from; where its shape is not
    known (a Hub id that was never loaded), nothing is checked.

    Raises:
        ConfigError: weights, gradients and optimiser states alone are more than the GPU's memory; says what to change.
    """
    try:
        shaped = read_config(model, trust_remote_code=config.policy.trust_remote_code)
    except ModelError:
        return
    gpu = Gpu(name="this GPU", memory_gib=device.memory / GIB, tflops=1, tflops_float32=1, gb_per_second=1)
    cluster = Cluster(gpu=gpu, gpus=device.ranks, sharding=device.sharding)
    names = {"grpo update": "grpo", "distillation": "distill"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = memories(shaped, shape_of(shaped), config, cluster, largest_rows=False)
    for memory in found:
        problem = unfit(memory, cluster) if names.get(memory.stage) in stages else None
        if problem and memory.fixed > device.memory:
            raise ConfigError(problem)
        if problem and memory.total > device.memory:
            logger.warning("with the longest trajectories, %s", problem)
