"""The compute dtype of a policy, for sampling and training."""

import os

import torch

_SMALLEST = 10_000_000
"""Fewest parameters for which bfloat16 pays: below, casting costs more than the matrix products save."""


def compute_dtype(name: str, parameters: int, has_bfloat16: bool) -> torch.dtype:
    """The dtype for ``policy.dtype = name`` and a policy with this number of ``parameters``.

    ``auto`` is bfloat16 if the device multiplies it natively (``multiplies_bfloat16``) and the policy is not small.
    """
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if has_bfloat16 and parameters >= _SMALLEST else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has native bfloat16 products; otherwise they are emulated and slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return True


def limit_kernel_caches() -> None:
    """Limit the caches of oneDNN's bfloat16 kernels on a CPU; call it before the first product.

    oneDNN compiles one kernel per shape and caches 1,024 of them, as does torch. Text batches vary in shape, so a process grew
    by 16 MiB per pass. Values that the user has set are kept.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's cache, and torch's in front of it
        os.environ.setdefault(name, "64")
