"""Launches the kernels on a chunk's logits: per-row results, and the gradient in a separate buffer or over the logits.

Nothing here synchronizes with the device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from search_e1.training.head import Head

# Maximum columns that a program reads at a time. With eight columns, a thread takes 60 registers (forward KL, ptxas for sm_90),
# so that a multiprocessor holds four programs.
BLOCK = 2048


def divergence(
    logits: Tensor,
    gradient: Tensor | None,
    heads: Sequence[Head],
    temperatures: Sequence[float],
    *,
    kind: str,
    beta: float,
    tau: float | None,
) -> Tensor:
    """The divergences of a chunk's rows, [rows], float32; fills ``gradient``.

    Args:
        logits: [2, rows, V], float32, raw products of student and teacher.
        gradient: [rows, V], any dtype, with respect to the student's logits over temperature; may alias the teacher's logits.
        kind: "forward_kl", "reverse_kl" or "js"; the latter uses ``beta``.
        tau: cap of each entry's term; ``None`` caps nothing.
    """
    from search_e1.training.kernels import programs

    (student, teacher), (student_head, teacher_head) = logits, heads
    divergences = logits.new_empty(len(student))
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        programs.divergence[(len(student),)](
            student,
            teacher,
            gradient,
            _contiguous(student_head.bias),
            _contiguous(teacher_head.bias),
            divergences,
            student.shape[1],
            *_scales(student_head, temperatures[0]),
            *_scales(teacher_head, temperatures[1]),
            0.0 if tau is None else float(tau),
            *((float(beta), math.log(beta), math.log1p(-beta)) if kind == "js" else (0.0, 0.0, 0.0)),
            DIVERGENCE=kind,
            CLIPPED=tau is not None,
            WANTED=gradient is not None,
            ASIDE=gradient is not None and gradient.data_ptr() != teacher.data_ptr(),
            STUDENT_CAPPED=student_head.softcap is not None,
            TEACHER_CAPPED=teacher_head.softcap is not None,
            **_shape(student.shape[1]),
        )
    return divergences


def token(logits: Tensor, gradient: Tensor | None, targets: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``targets`` and entropies of a chunk's rows, each [rows], float32; fills ``gradient``.

    Args:
        logits: [rows, V], float32, raw products.
        gradient: [rows, V], any dtype, of the log-probabilities with respect to logits over temperature; may alias ``logits``.
        targets: [rows], int64.
    """
    from search_e1.training.kernels import programs

    logprobs, entropy = logits.new_empty(len(logits)), logits.new_empty(len(logits))
    with torch.cuda.device_of(logits):
        programs.token[(len(logits),)](
            logits,
            gradient,
            _contiguous(head.bias),
            targets.contiguous(),
            logprobs,
            entropy,
            logits.shape[1],
            *_scales(head, temperature),
            WANTED=gradient is not None,
            CAPPED=head.softcap is not None,
            **_shape(logits.shape[1]),
        )
    return logprobs, entropy


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _scales(head: Head, temperature: float) -> tuple[float, float]:
    """Factors of a logit before and after the soft cap; always floats, because Triton would recompile for an int."""
    if head.softcap is None:
        return float(head.scale / temperature), 1.0
    return float(head.scale / head.softcap), float(head.softcap / temperature)


def _shape(vocabulary: int) -> dict[str, int]:
    """Block size and warps, at eight entries of a block per thread."""
    block = min(BLOCK, 1 << (vocabulary - 1).bit_length())
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}
