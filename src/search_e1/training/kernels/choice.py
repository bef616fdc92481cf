"""Whether the kernels are used: on CUDA, if Triton is installed and its kernels match torch."""

import functools
import itertools
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from search_e1.errors import ConfigError
from search_e1.training.head import Head
from search_e1.training.precision import multiplies_bfloat16

logger = logging.getLogger(__name__)

_TRIAL_VOCABULARY = 5003  # more than two blocks, and a prime


def use_kernels(wanted: bool | None, inputs: Sequence[tuple[Tensor, Head]], top_k: int | None = None) -> bool:
    """Whether to use the kernels for ``inputs``, pairs of hidden states and their head.

    The kernels support neither ``top_k`` nor float64, nor a half-precision head with hidden states of another dtype: the
    products would upcast the whole head.

    Args:
        wanted: the caller's choice; ``None`` decides automatically.

    Raises:
        ConfigError: ``wanted`` is true, and the kernels do not support the inputs.
    """
    unknown = "top_k" if top_k is not None else _unknown_types(inputs)
    if wanted and unknown:
        raise ConfigError(f"the head's kernels do not support {unknown}; leave `kernel` out to use plain torch")
    device = inputs[0][0].device
    return (device.type == "cuda" and unknown is None and works(device)) if wanted is None else wanted


def _unknown_types(inputs: Sequence[tuple[Tensor, Head]]) -> str | None:
    for hidden, head in inputs:
        if torch.float64 in (hidden.dtype, head.weight.dtype) or head.weight.dtype not in (torch.float32, hidden.dtype):
            return f"hidden states in {hidden.dtype} with a head in {head.weight.dtype}"
    return None


@functools.cache
def works(device: torch.device) -> bool:
    """Whether the kernels work on ``device``, tested once; logs the reason if they do not."""
    problem = _problem(device)
    if problem is not None:
        logger.warning("%s: the loss over the vocabulary is computed in plain torch, which is slower: %s", device, problem)
    return problem is None


def _problem(device: torch.device) -> str | None:
    """Why the kernels cannot be used on ``device``, in one line; ``None`` if they can."""
    try:
        from search_e1.training.kernels import programs  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({_line(error)}); install the version that torch {torch.__version__} requires"
    if not multiplies_bfloat16(device):
        return "the GPU has no bfloat16; the kernels are for compute capability 8.0 or later"
    try:
        return _differs(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers, drivers and loaders raise anything
        return f"Triton's kernels do not run ({type(error).__name__}: {_line(error)}); a newer driver may fix it"


def _differs(device: torch.device) -> str | None:
    """Run all variants of the kernels on a few positions, and compare losses and gradients with plain torch."""
    with torch.inference_mode(False), torch.enable_grad():  # the first caller may have gradients disabled
        errors = [
            float((got - wanted).abs().max() / wanted.abs().max())
            for results in zip(_trial(device, kernel=True), _trial(device, kernel=False), strict=True)
            for got, wanted in zip(*results, strict=True)
        ]
    worst = float(torch.tensor(errors).max())  # NaN, if there is one
    return None if worst < 1e-2 else f"their results differ from torch's by {worst:.1g} (relative)"


def _trial(device: torch.device, kernel: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Per-position figures and gradients of hidden states, one variant after the other; spans several blocks, clips entries."""
    from search_e1.training.divergence import fused_divergence  # circular import
    from search_e1.training.logprobs import fused_token_loss

    generator = torch.Generator().manual_seed(0)
    student, teacher, weight = (torch.randn(rows, 16, generator=generator) for rows in (4, 4, _TRIAL_VOCABULARY))
    bias, targets = torch.randn(_TRIAL_VOCABULARY, generator=generator).to(device), torch.tensor([0, 17, 2048, 5000]).to(device)
    for dtype, capped in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        states, others = student.to(device, dtype), teacher.to(device, dtype)
        head = Head(weight.to(device, dtype), bias.to(dtype) if capped else None, softcap=5.0 if capped else None)
        for kind in ("forward_kl", "reverse_kl", "js"):
            hidden = states.clone().requires_grad_()
            loss, divergences = fused_divergence(hidden, others, head, divergence=kind, tau=1e-3, kernel=kernel)
            (gradient,) = torch.autograd.grad(loss, hidden)
            yield divergences, gradient.float()
        hidden = states.clone().requires_grad_()
        loss, figures = fused_token_loss(hidden, targets, head, kernel=kernel)
        (gradient,) = torch.autograd.grad(loss, hidden)
        yield torch.stack((figures.logprobs, figures.entropy)), gradient.float()


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
