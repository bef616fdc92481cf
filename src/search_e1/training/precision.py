"""The number type that a policy computes in, while it is sampled from and trained."""

import os

import torch

_SMALLEST = 10_000_000
"""Weights of the smallest policy for which bfloat16 pays: the products of a smaller one take less time than converting."""


def compute_dtype(name: str, parameters: int, has_bfloat16: bool) -> torch.dtype:
    """The type that ``policy.dtype = name`` stands for, for a policy of so many weights.

    ``auto`` is bfloat16 where the device has products of it (``multiplies_bfloat16``), unless the policy is small.
    """
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if has_bfloat16 and parameters >= _SMALLEST else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has instructions for products of bfloat16; without them they are emulated, and slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return True


def limit_kernel_caches() -> None:
    """Keep few of the kernels that oneDNN compiles for products of bfloat16 on a CPU; call it before the first one.

    It compiles one for each shape, and keeps 1,024, twice. Batches of text differ in shape, so that a process grew by 16 MiB a
    pass. What the user has set stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own, and that of torch before it
        os.environ.setdefault(name, "64")
