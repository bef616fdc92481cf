"""Log-probabilities of given ids, and a loss that is a function of them, in one fused pass over the output head.

Cross-entropy (``-log p``) and the clipped policy-gradient loss are such losses. The gradient by the logits of an id's
log-probability is ``onehot - p``, so that the whole gradient is formed while the logits of a chunk exist.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from search_e1.training.head import Head
from search_e1.training.kernels import launch
from search_e1.training.kernels.choice import use_kernels
from search_e1.training.projection import (
    HALVES,
    Chunk,
    FusedPass,
    Gradients,
    budget,
    chunks,
    mean_weights,
    multiply,
    project,
    slope_of_cap,
)

TokenLoss = Callable[[Tensor, slice], Tensor]
"""From the log-probabilities [n] of the positions of a slice to their losses [n]; differentiable."""


class TokenStates(NamedTuple):
    """Figures of each position, [N], without gradient."""

    logprobs: Tensor
    entropy: Tensor
    """Of the whole distribution, in nats."""
    loss: Tensor


class _Options(NamedTuple):
    temperature: float
    memory: int  # bytes
    wanted: bool
    """Whether a gradient is."""
    kernel: bool


def negative_log_likelihood(logprobs: Tensor, rows: slice) -> Tensor:
    """The ``TokenLoss`` of cross-entropy."""
    return -logprobs


def fused_token_loss(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    token_loss: TokenLoss = negative_log_likelihood,
    *,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    logits_mib: float | None = None,
    kernel: bool | None = None,
) -> tuple[Tensor, TokenStates]:
    """The weighted sum over N positions of a loss of the log-probability that each gives to its id.

    Args:
        hidden: [N, H], last hidden states at the positions of the loss and no others.
        targets: [N], int64, the ids that they are to predict.
        head: where its weight or bias requires a gradient, that is accumulated chunk by chunk.
        token_loss: see ``TokenLoss``; cross-entropy if not given.
        weights: [N], of each position in the sum; 1/N if not given, so that it is the mean.
        temperature: logits are divided by it.
        logits_mib: MiB for logits in memory at a time. Default: 64 on a CPU, 1,024 elsewhere.
        kernel: whether Triton's kernels are used, which know no float64. Default: where they run, on CUDA.

    Returns:
        The loss (scalar) and the figures of each position; float32 for inputs of half precision, else of the inputs' type.
        The gradients are constants: the loss cannot be differentiated twice.

    Raises:
        ConfigError: a kernel is asked for what it does not know.
    """
    if weights is None:
        weights = mean_weights(hidden)
    trained = (hidden, head.weight, head.bias)
    options = _Options(
        temperature=temperature,
        memory=budget(logits_mib, hidden.device),
        wanted=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained),
        kernel=use_kernels(kernel, ((hidden, head),)),
    )
    with torch.autocast(hidden.device.type, enabled=False):  # it would round what is summed
        loss, *states = _TokenLoss.apply(*trained, head, targets, token_loss, weights, options)
    return loss, TokenStates(*states)


class _TokenLoss(FusedPass):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        targets: Tensor,
        token_loss: TokenLoss,
        weights: Tensor,
        options: _Options,
    ) -> tuple[Tensor, ...]:
        head = head._replace(weight=weight.detach(), bias=None if bias is None else bias.detach())
        kind = torch.float32 if hidden.dtype in HALVES else hidden.dtype
        weights = weights.to(kind)
        logprobs, entropy, losses = (hidden.new_zeros(len(hidden), dtype=kind) for _ in range(3))
        gradients = Gradients(hidden, head, [need and options.wanted for need in ctx.needs_input_grad[:3]], kind)
        differentiate = _by_kernel if options.kernel else _by_torch
        for chunk in chunks(hidden, weight, logprobs, options.memory, 1, gradients, options.kernel):
            rows = chunk.rows
            logprobs[rows], entropy[rows], by_logits = differentiate(chunk, hidden[rows], targets[rows], head, options)
            losses[rows], factors = _derivative(token_loss, logprobs[rows], rows, options.wanted)
            if options.wanted:
                factors = factors * weights[rows] * (head.scale / options.temperature)
                gradients.add(chunk, by_logits, factors, hidden[rows], head)
        FusedPass.keep(ctx, gradients, hidden, weight)
        ctx.mark_non_differentiable(logprobs, entropy, losses)
        return (weights * losses).sum(), logprobs, entropy, losses


def _by_kernel(
    chunk: Chunk, hidden: Tensor, targets: Tensor, head: Head, options: _Options
) -> tuple[Tensor, Tensor, Iterable[Tensor]]:
    """Log-probabilities, entropies and the gradient of the former by the logits, tile by tile."""
    ((_, (logits,)),) = multiply(chunk, [hidden], [head])
    logprobs, entropy = launch.token(logits, chunk.gradient, targets, head, options.temperature)
    return logprobs, entropy, [] if chunk.gradient is None else [chunk.gradient]


def _by_torch(
    chunk: Chunk, hidden: Tensor, targets: Tensor, head: Head, options: _Options
) -> tuple[Tensor, Tensor, Iterable[Tensor]]:
    """The same; the gradient is formed as it is asked for."""
    log_z = project(chunk, [hidden], [head], [options.temperature])[0]
    logprobs = _logits_at(chunk, targets) - log_z[:, 0]
    entropy = torch.zeros_like(logprobs)
    slopes = _normalize(chunk, log_z, head, options.temperature, entropy, options.wanted)
    return logprobs, entropy, _by_logits(chunk, targets, slopes)


def _logits_at(chunk: Chunk, targets: Tensor) -> Tensor:
    """The logits of the ``targets`` [rows]."""
    at = chunk.tiles[0].new_zeros(len(targets))
    for columns, (tile,) in zip(chunk.columns, chunk.tiles, strict=True):
        inside, here = _inside(columns, targets)
        at += torch.where(inside, tile.gather(1, here)[:, 0], 0)
    return at


def _inside(columns: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each of ``targets`` [rows] is in the tile of ``columns``, [rows], and where (anywhere, if not), [rows, 1]."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return inside, torch.where(inside, targets - columns.start, 0)[:, None]


def _normalize(
    chunk: Chunk, log_z: Tensor, head: Head, temperature: float, entropy: Tensor, wanted: bool
) -> list[Tensor | None]:
    """Turn the chunk's logits into probabilities and add up ``entropy``; returns the slopes of a soft cap, tile by tile."""
    slopes: list[Tensor | None] = []
    for (tile,) in chunk.tiles:
        slopes.append(slope_of_cap(tile, head, temperature) if wanted else None)
        tile -= log_z
        probabilities = tile.exp()
        entropy -= torch.linalg.vecdot(tile, probabilities)
        tile.copy_(probabilities)
    return slopes


def _derivative(token_loss: TokenLoss, logprobs: Tensor, rows: slice, wanted: bool) -> tuple[Tensor, Tensor]:
    """Losses of some positions and their derivatives by the log-probabilities, both [rows]."""
    if not wanted:
        losses = token_loss(logprobs, rows)
        return losses, losses
    with torch.enable_grad():
        logprobs = logprobs.detach().requires_grad_()
        losses = token_loss(logprobs, rows)
        (slope,) = torch.autograd.grad(losses.sum(), logprobs)
    return losses.detach(), slope


def _by_logits(chunk: Chunk, targets: Tensor, slopes: list[Tensor | None]) -> Iterator[Tensor]:
    """Gradients of the log-probabilities by the logits, ``onehot - p``, a tile [rows, width] at a time."""
    for columns, (tile,), slope in zip(chunk.columns, chunk.tiles, slopes, strict=True):
        tile.neg_()
        inside, here = _inside(columns, targets)
        tile.scatter_add_(1, here, inside.to(tile.dtype)[:, None])
        yield tile if slope is None else tile.mul_(slope)
