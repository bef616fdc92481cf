"""The kernels on tensors: what a chunk's logits come to, and their gradient written beside or over them.

Nothing here waits for the device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from search_e1.training.head import Head

# Columns that a program reads at a time, at most. With eight to a thread, a thread takes 60 registers (forward KL, ptxas for
# sm_90), so that a multiprocessor holds four programs.
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
    """The divergences of a chunk's rows, [rows], in float32; fills ``gradient``.

    Args:
        logits: [2, rows, V] in float32, the student's and the teacher's, as the products leave them.
        gradient: [rows, V], of any type, by the student's logits over temperature; may be the teacher's logits.
        kind: "forward_kl", "reverse_kl" or "js", the latter with ``beta``.
        tau: where each entry's term is cut; ``None`` cuts nothing.
    """
    from search_e1.training.kernels import programs

    (student, teacher), (student_head, teacher_head) = logits, heads
    divergences = logits.new_empty(len(student))
    with torch.cuda.device_of(logits):  # Triton launches on the current one
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
    """Log-probabilities of ``targets`` and entropies of a chunk's rows, each [rows], in float32; fills ``gradient``.

    Args:
        logits: [rows, V] in float32, as the products leave them.
        gradient: [rows, V], of any type, of the log-probabilities by the logits over temperature; may be ``logits``.
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
    """What a logit is multiplied by before the soft cap and after it; always floats, for Triton compiles anew for an int."""
    if head.softcap is None:
        return float(head.scale / temperature), 1.0
    return float(head.scale / head.softcap), float(head.softcap / temperature)


def _shape(vocabulary: int) -> dict[str, int]:
    """Block and warps: eight entries of a block for a thread."""
    block = min(BLOCK, 1 << (vocabulary - 1).bit_length())
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}
