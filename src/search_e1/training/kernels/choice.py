"""Whether the kernels are used: on CUDA, where Triton is there and its kernels give what torch gives."""

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from search_e1.errors import ConfigError
from search_e1.training.head import Head
from search_e1.training.kernels import launch
from search_e1.training.precision import multiplies_bfloat16

logger = logging.getLogger(__name__)


def use_kernels(wanted: bool | None, inputs: Sequence[tuple[Tensor, Head]], top_k: int | None = None) -> bool:
    """Whether to use the kernels for ``inputs``, hidden states with their head.

    The kernels know no ``top_k`` and no float64, and no head of half precision under hidden states of another type, which the
    products would widen whole.

    Args:
        wanted: what the caller asks for, if it does.

    Raises:
        ConfigError: they are asked for and do not know this.
    """
    unknown = "top_k" if top_k is not None else _unknown_types(inputs)
    if wanted and unknown:
        raise ConfigError(f"the head's kernels do not know {unknown}; leave `kernel` out for plain torch in such a case")
    device = inputs[0][0].device
    return (device.type == "cuda" and unknown is None and works(device)) if wanted is None else wanted


def _unknown_types(inputs: Sequence[tuple[Tensor, Head]]) -> str | None:
    for hidden, head in inputs:
        if torch.float64 in (hidden.dtype, head.weight.dtype) or head.weight.dtype not in (torch.float32, hidden.dtype):
            return f"hidden states in {hidden.dtype} with a head in {head.weight.dtype}"
    return None


@functools.cache
def works(device: torch.device) -> bool:
    """Whether kernels run on ``device``, found out once; if they do not, a line says why."""
    problem = _problem(device)
    if problem is not None:
        logger.warning("%s: the loss over the vocabulary is computed in plain torch, which is slower: %s", device, problem)
    return problem is None


def _problem(device: torch.device) -> str | None:
    """Why kernels cannot be used on ``device``, in one line."""
    try:
        from search_e1.training.kernels import programs  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({_line(error)}); install the version of it that torch {torch.__version__} asks for"
    if not multiplies_bfloat16(device):
        return "the GPU has no bfloat16; the kernels are for compute capability 8.0 or later"
    try:
        return _differs(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler, a driver or a loader may raise
        return f"Triton's kernels do not run ({type(error).__name__}: {_line(error)}); a newer driver may mend it"


def _differs(device: torch.device) -> str | None:
    """Run the kernels on a few logits and compare with torch."""
    logits = torch.linspace(-3, 3, 2 * 3 * 50, dtype=torch.float32, device=device).mul_(37).sin_().mul_(4).view(2, 3, 50)
    targets, head = torch.tensor([0, 17, 49], device=device), Head(logits[0])
    student, teacher = logits.log_softmax(-1)
    terms = teacher.exp() * (teacher - student)
    gradient = torch.empty(3, 50, dtype=torch.bfloat16, device=device)
    divergences = launch.divergence(logits, gradient, (head, head), (1.0, 1.0), kind="forward_kl", beta=0.0, tau=10.0)
    pairs = [(divergences, terms.sum(-1)), (gradient, student.exp() - teacher.exp())]
    figures = launch.token(logits[0], (onehot_less_p := torch.empty_like(gradient)), targets, head, 1.0)
    expected = student.gather(1, targets[:, None])[:, 0], -(student.exp() * student).sum(-1)
    pairs += zip(figures, expected, strict=True)
    pairs.append((onehot_less_p, torch.nn.functional.one_hot(targets, 50) - student.exp()))
    errors = [((got.float() - wanted).abs().max() / wanted.abs().max()).item() for got, wanted in pairs]
    # NaN is worse than any bound.
    return None if all(error < 1e-2 for error in errors) else f"they differ from torch, relatively by {max(errors):.1g}"


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
