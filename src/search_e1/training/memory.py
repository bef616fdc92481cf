"""Memory that runs out: recognized, released, and translated into a message."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from search_e1.errors import TrainingError

_WORDS = (
    "CUDA out of memory.",
    "XPU out of memory.",
    "MPS backend out of memory",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",
    "DefaultCPUAllocator: can't allocate memory",
)
"""What torch says where it has no class for it."""


def ran_out(error: BaseException) -> bool:
    """Whether ``error`` is the accelerator's or the machine's memory running out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
    )


def release() -> None:
    """Free what a pass that failed has left. Call it when its exception is gone: that holds its tensors."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


@contextmanager
def translate_oom(stage: str) -> Iterator[None]:
    """Turn memory that runs out, where smaller passes did not help, into a message.

    Raises:
        TrainingError: that happened.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, TrainingError) or not ran_out(error):
            raise
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrainingError(
            f"{stage}: out of memory ({words}); lower rollout.batch_size or training.micro_batch_tokens, or set "
            "training.gradient_checkpointing; then run the same command again"
        ) from error
