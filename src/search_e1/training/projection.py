"""The shared core of fused passes over the output head: logits of a few positions at a time, with their gradients.

Logits exist for as many positions as a memory budget allows, in buffers that are overwritten by the gradient with respect to
the logits, so nothing of size [positions, vocabulary] outlives its chunk. For plain torch, a chunk is split into tiles of the
vocabulary, so that elementwise work runs while a tile is in the cache. For the Triton kernels, a chunk is one tile.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from search_e1.training.head import Head

HALVES = (torch.bfloat16, torch.float16)
# Entries of a tile. On a CPU: few enough for the operands to stay in a core's cache. Elsewhere: enough to make launch overhead
# negligible.
_CPU_TILE = 2**17
_DEVICE_TILE = 2**24
# Maximum entries of a role's logits in a kernel chunk: 441 positions at a vocabulary of 151,936. Larger products are not
# faster.
_KERNEL_TILE = 2**26
# A kernel chunk has a multiple of this many positions: the GPU's products work on blocks of rows, and partial ones waste it.
_KERNEL_ROWS = 64


class Chunk(NamedTuple):
    """The logits of some positions, for one or two roles (student, teacher)."""

    rows: slice
    columns: list[slice]
    tiles: list[Tensor]
    """A contiguous [roles, rows, width] for each of ``columns``."""
    gradient: Tensor | None = None
    """[rows, V]: the gradient with respect to the logits, filled by the kernels; may alias the last role's logits."""


def budget(logits_mib: float | None, device: torch.device) -> int:
    """Bytes for logits; by default 64 MiB on a CPU and 1,024 MiB elsewhere."""
    if logits_mib is None:
        logits_mib = 64 if device.type == "cpu" else 1024
    return int(logits_mib * 2**20)


def mean_weights(hidden: Tensor) -> Tensor:
    """Weights [N] that turn a sum over the positions of ``hidden`` [N, H] into a mean, in the accumulation dtype."""
    kind = torch.float32 if hidden.dtype in HALVES else hidden.dtype
    return hidden.new_full((len(hidden),), 1 / max(1, len(hidden)), dtype=kind)


def chunks(
    hidden: Tensor, weight: Tensor, like: Tensor, memory: int, roles: int, gradients: "Gradients", kernel: bool
) -> Iterator[Chunk]:
    """Chunks of the positions of ``hidden``, laid out for the kernels or plain torch, with buffers of the dtype of ``like``."""
    sizes = len(hidden), len(weight), like, memory, roles
    return kernel_chunks(*sizes, gradients.by_logits) if kernel else tiled_chunks(*sizes)


def tiled_chunks(positions: int, vocabulary: int, like: Tensor, memory: int, roles: int) -> Iterator[Chunk]:
    """Equal chunks of the positions; logits for ``roles`` models and a few tiles fit into ``memory`` bytes.

    The buffer is reused: the next chunk overwrites the previous one.
    """
    tile = _CPU_TILE if like.device.type == "cpu" else _DEVICE_TILE
    entries = memory // like.element_size()
    fitting = max(entries - 4 * tile, entries // 2) // (roles * vocabulary)
    fitting = max(1, min(fitting, tile // min(vocabulary, 256)))  # products with narrow tiles are slow
    size = math.ceil(positions / max(1, math.ceil(positions / fitting)))
    width = math.ceil(vocabulary / math.ceil(vocabulary * max(1, size) / tile))
    columns = [slice(at, min(at + width, vocabulary)) for at in range(0, vocabulary, width)]
    buffer = like.new_empty(roles * size * vocabulary)
    for at in range(0, positions, max(1, size)):
        rows = slice(at, min(at + size, positions))
        n = rows.stop - rows.start
        tiles = [buffer[roles * n * c.start : roles * n * c.stop].view(roles, n, c.stop - c.start) for c in columns]
        yield Chunk(rows, columns, tiles)


def kernel_chunks(
    positions: int, vocabulary: int, like: Tensor, memory: int, roles: int, gradient: torch.dtype | None
) -> Iterator[Chunk]:
    """The same with one tile per chunk, and a buffer for the gradient of dtype ``gradient``, if given.

    A half-precision gradient gets a buffer of its own; one of the logits' dtype overwrites the logits of the last role.
    """
    beside = gradient is not None and gradient is not like.dtype
    entry = roles * like.element_size() + (gradient.itemsize if gradient is not None and beside else 0)
    fitting = max(1, min(memory // (entry * vocabulary), _KERNEL_TILE // vocabulary))
    unit = _KERNEL_ROWS if fitting >= _KERNEL_ROWS else 1
    fitting -= fitting % unit
    size = math.ceil(positions / max(1, math.ceil(positions / fitting)))
    size = min(positions, size + -size % unit)
    buffer = like.new_empty(roles * size * vocabulary)
    written = like.new_empty(size * vocabulary, dtype=gradient) if beside else None
    for at in range(0, positions, max(1, size)):
        n = min(size, positions - at)
        logits = buffer[: roles * n * vocabulary].view(roles, n, vocabulary)
        over = None if gradient is None else logits[-1]
        target = over if written is None else written[: n * vocabulary].view(n, vocabulary)
        yield Chunk(slice(at, at + n), [slice(0, vocabulary)], [logits], target)


def project(chunk: Chunk, hidden: Sequence[Tensor], heads: Sequence[Head], temperatures: Sequence[float]) -> Tensor:
    """Fill the chunk with logits over temperature, one role per tensor of ``hidden`` [rows, H].

    Returns:
        Their log partition functions, [roles, rows, 1].
    """
    log_z = chunk.tiles[0].new_zeros(len(hidden), len(chunk.columns), len(hidden[0]))
    for i, (columns, tile) in enumerate(multiply(chunk, hidden, heads)):
        for logits, head, temperature in zip(tile, heads, temperatures, strict=True):
            if head.bias is not None:
                logits.add_(head.bias[columns])
            if head.softcap is not None:
                logits.mul_(head.scale / head.softcap).tanh_().mul_(head.softcap / temperature)
            elif head.scale != temperature:
                logits.mul_(head.scale / temperature)
        torch.logsumexp(tile, -1, out=log_z[:, i])
    return log_z.logsumexp(1)[..., None]


def multiply(chunk: Chunk, hidden: Sequence[Tensor], heads: Sequence[Head]) -> Iterator[tuple[slice, Tensor]]:
    """Fill the chunk's tiles one by one with the products of ``hidden`` and the heads' weights; yields columns and tile."""
    shared = len(hidden) > 1 and all(head is heads[0] for head in heads)
    stacked = torch.cat(list(hidden)) if shared else None
    for columns, tile in zip(chunk.columns, chunk.tiles, strict=True):
        if stacked is not None:  # one large product is faster than two
            _matmul(stacked, heads[0].weight[columns].t(), out=tile.flatten(0, 1))
        else:
            for logits, states, head in zip(tile, hidden, heads, strict=True):
                _matmul(states, head.weight[columns].t(), out=logits)
        yield columns, tile


def slope_of_cap(logits: Tensor, head: Head, temperature: float) -> Tensor | None:
    """Derivative of capped ``logits`` (over temperature) with respect to uncapped ones; ``None`` without a soft cap."""
    return None if head.softcap is None else 1 - (logits * (temperature / head.softcap)) ** 2


class Gradients:
    """Gradients of hidden states, head weight and bias, accumulated chunk by chunk; ``None`` where not needed."""

    def __init__(self, hidden: Tensor, head: Head, needed: Sequence[bool], dtype: torch.dtype) -> None:
        """``needed``: whether hidden states, weight and bias need a gradient."""
        halves = hidden.dtype is head.weight.dtype is torch.bfloat16 and not needed[2]
        self.by_logits = (hidden.dtype if halves else dtype) if any(needed) else None
        """The dtype in which kernels write the gradient with respect to the logits, so that its products need no cast."""
        self.by_hidden, self.by_weight, self.by_bias = (
            torch.zeros_like(tensor, dtype=dtype) if tensor is not None and wanted else None
            for tensor, wanted in zip((hidden, head.weight, head.bias), needed, strict=True)
        )

    def add(self, chunk: Chunk, by_logits: Iterable[Tensor], factors: Tensor, hidden: Tensor, head: Head) -> None:
        """Add a chunk's share: ``by_logits``, one tile [rows, width] per entry of its columns, times ``factors`` [rows]."""
        scaled = (hidden * factors[:, None]).to(hidden.dtype if _narrow(hidden) else factors.dtype)
        rows = None if self.by_hidden is None else self.by_hidden[chunk.rows]
        for columns, by_logit in zip(chunk.columns, by_logits, strict=True):
            if rows is not None:
                _add_matmul(rows, by_logit, head.weight[columns])
            if self.by_weight is not None:
                _add_matmul(self.by_weight[columns], by_logit.t(), scaled)
            if self.by_bias is not None:
                self.by_bias[columns] += factors @ by_logit
        if rows is not None:
            rows.mul_(factors[:, None])


class FusedPass(torch.autograd.Function):
    """An autograd function that computes the gradients of (hidden, weight, bias) in its forward pass."""

    @staticmethod
    def keep(ctx, gradients: Gradients, hidden: Tensor, weight: Tensor) -> None:
        ctx.save_for_backward(gradients.by_hidden)
        ctx.by_head = gradients.by_weight, gradients.by_bias
        ctx.kinds = hidden.dtype, weight.dtype

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (by_hidden,) = ctx.saved_tensors
        by_head, (hidden_kind, head_kind) = ctx.by_head, ctx.kinds
        if by_head is None:
            raise RuntimeError("the gradient of a trainable head can be used in one backward pass only")
        if any(gradient is not None for gradient in by_head):
            ctx.by_head = None  # it is large, so it is scaled in place and handed over
        return (
            # Rounded last: a loss scaler's factor keeps small gradients above float16's smallest value.
            None if by_hidden is None else (by_hidden * grad_loss).to(hidden_kind),
            *(None if gradient is None else gradient.mul_(grad_loss).to(head_kind) for gradient in by_head),
            *(None,) * (len(ctx.needs_input_grad) - 3),
        )


def _matmul(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``out = left @ right``, accumulated and returned in float32 for halves: rounded logits would drown small divergences."""
    if left.is_cuda and left.dtype == right.dtype and left.dtype in HALVES:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)  # other backends have no such product


def _add_matmul(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left @ right``; ``out`` has the accumulation dtype."""
    if _narrow(right):
        torch.addmm(out, left.to(right.dtype), right, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(left.to(out.dtype), right.to(out.dtype))


def _narrow(operand: Tensor) -> bool:
    """Whether gradient products use the dtype of ``operand``: only bfloat16, as float16 would lose small gradients."""
    return operand.is_cuda and operand.dtype is torch.bfloat16
