"""Out-of-memory errors: recognize them, free memory, translate them into a message."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from search_e1.errors import TrainingError

_MESSAGES = (
    "CUDA out of memory.",
    "XPU out of memory.",
    "MPS backend out of memory",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",
    "DefaultCPUAllocator: can't allocate memory",
)
"""Messages of out-of-memory errors that torch raises as a plain RuntimeError."""


def ran_out(error: BaseException) -> bool:
    """Whether ``error`` is an out-of-memory error of the accelerator or the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _MESSAGES)
    )


def release() -> None:
    """Free the memory of a failed pass. Call it after leaving the ``except`` block: the exception holds the pass's tensors."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


@contextmanager
def translate_oom(stage: str) -> Iterator[None]:
    """Translate an out-of-memory error, which smaller passes did not prevent, into a message.

    Raises:
        TrainingError: memory ran out.
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
