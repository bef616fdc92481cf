"""Accelerators as their makers describe them, and how many of them work together."""

import difflib
from typing import Literal

import torch
from pydantic import Field

from search_e1.errors import ConfigError
from search_e1.types import Record

GIB = 2**30

Sharding = Literal["none", "optimizer", "full"]
Engine = Literal["transformers", "vllm"]


class Gpu(Record):
    """What decides whether a stage fits, and how long it takes."""

    name: str
    memory_gib: float = Field(gt=0)
    """As ``torch.cuda`` reports it, which is less than the name says."""
    tflops: float = Field(gt=0)
    """Dense products of bfloat16, summed in float32, 10^12 operations a second."""
    tflops_float32: float = Field(gt=0)
    """Products of float32 as torch makes them by default, without TF32."""
    gb_per_second: float = Field(gt=0)
    """Memory bandwidth, 10^9 bytes."""


def _gpu(name: str, memory: float, tflops: float, tflops_float32: float, bandwidth: float) -> Gpu:
    return Gpu(
        name=name, memory_gib=memory, tflops=tflops, tflops_float32=tflops_float32, gb_per_second=bandwidth
    )  # fmt: skip


# Of the makers' data sheets, without sparsity.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("b200-180gb", 178.0, 2250, 75, 7700),
        _gpu("h200-141gb", 139.7, 989, 67, 4800),
        _gpu("h100-80gb", 79.1, 989, 67, 3350),
        _gpu("h100-pcie-80gb", 79.1, 756, 51, 2000),
        _gpu("a100-80gb", 79.1, 312, 19.5, 2039),
        _gpu("a100-40gb", 39.4, 312, 19.5, 1555),
        _gpu("l40s-48gb", 44.4, 362, 91.6, 864),
        _gpu("a10-24gb", 22.0, 125, 31.2, 600),
        _gpu("4090-24gb", 23.5, 165, 82.6, 1008),
        _gpu("3090-24gb", 23.6, 71, 35.6, 936),
    )
}


class Cluster(Record):
    """What a run has, and how its ranks share."""

    gpu: Gpu
    gpus: int = Field(default=1, gt=0)
    """Ranks: one process each."""
    sharding: Sharding = "none"
    """What is divided among the ranks in training: nothing (every rank holds all), gradients and ``optimizer`` states
    (ZeRO-2), or weights as well (``full``: ZeRO-3, FSDP2)."""
    engine: Engine = "transformers"
    """What samples: transformers' ``generate`` on the weights that are trained, or vLLM beside them."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """vLLM's: the share of a GPU's memory that it takes, weights included."""
    reserve: float = Field(default=0.07, ge=0, lt=1)
    """Share of the memory that the CUDA context, libraries' workspaces and gaps between tensors take."""

    @property
    def room(self) -> int:
        """Bytes on each GPU for tensors."""
        return int(self.gpu.memory_gib * (1 - self.reserve) * GIB)


def gpu(
    name: str | None = None,
    *,
    memory_gib: float | None = None,
    tflops: float | None = None,
    gb_per_second: float | None = None,
) -> Gpu:
    """The GPU called ``name``, with what else is given in place of its own figures; or one that is wholly given.

    Raises:
        ConfigError: no such name (suggests the nearest), or a figure that is missing or not positive.
    """
    given = {"memory_gib": memory_gib, "tflops": tflops, "gb_per_second": gb_per_second}
    for key, value in given.items():
        if value is not None and value <= 0:
            raise ConfigError(f"--{_FLAGS[key]} {value:g}: must be greater than 0")
    if name is None:
        if missing := [f"--{_FLAGS[key]}" for key, value in given.items() if value is None]:
            raise ConfigError(f"which GPU? Give --gpu ({', '.join(GPUS)}), or {', '.join(missing)} as well")
        assert tflops is not None
        return Gpu(name="given", **{**given, "tflops_float32": tflops / 8})
    known = GPUS.get(name.lower()) or next((GPUS[full] for full in GPUS if full.startswith(f"{name.lower()}-")), None)
    if known is None:
        close = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"--gpu {name}: unknown; {hint}(known: {', '.join(GPUS)}; others by --memory, --tflops, --bandwidth)"
        )
    return known.model_copy(update={key: value for key, value in given.items() if value is not None})


def here() -> Gpu | None:
    """The first CUDA device of this machine, if its kind is known."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    plain = properties.name.lower()
    for name, known in GPUS.items():
        words = name.split("-")[:-1]
        if all(word in plain for word in words) and abs(properties.total_memory / GIB - known.memory_gib) < 8:
            return known.model_copy(update={"memory_gib": properties.total_memory / GIB})
    return None


_FLAGS = {"memory_gib": "memory", "tflops": "tflops", "gb_per_second": "bandwidth"}
