"""Log-probabilities of given ids, and a loss that is a function of them, in one fused pass over the output head.

Cross-entropy (``-log p``) and the clipped policy-gradient loss are such losses. The gradient of an id's log-probability with
respect to the logits is ``onehot - p``, so the whole gradient is computed while the logits of a chunk exist.
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
"""Maps the log-probabilities [n] of a slice of positions to their losses [n]; differentiable."""


class TokenStates(NamedTuple):
    """Per-position figures, [N], without gradient."""

    logprobs: Tensor
    entropy: Tensor
    """Entropy of the whole distribution, in nats."""
    loss: Tensor


class _Options(NamedTuple):
    temperature: float
    memory: int  # bytes
    needs_gradient: bool
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
    """The weighted sum over N positions of a loss of the target's log-probability.

    Args:
        hidden: [N, H], last hidden states at the loss positions only.
        targets: [N], int64, the target ids.
        head: if its weight or bias requires a gradient, it is accumulated chunk by chunk.
        token_loss: see ``TokenLoss``; cross-entropy by default.
        weights: [N], the weight of each position; 1/N by default, which gives the mean.
        temperature: divides the logits.
        logits_mib: MiB of logits in memory at a time. Default: 64 on a CPU, 1,024 elsewhere.
        kernel: whether to use the Triton kernels, which do not support float64. Default: on CUDA, if they work.

    Returns:
        The loss (scalar) and the figures of each position; float32 for half-precision inputs, else in the inputs' dtype. The
        gradients are constants: the loss cannot be differentiated twice.

    Raises:
        ConfigError: the kernels do not support the inputs.
    """
    if weights is None:
        weights = mean_weights(hidden)
    trained = (hidden, head.weight, head.bias)
    options = _Options(
        temperature=temperature,
        memory=budget(logits_mib, hidden.device),
        needs_gradient=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained),
        kernel=use_kernels(kernel, ((hidden, head),)),
    )
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would round the sums
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
        gradients = Gradients(hidden, head, [need and options.needs_gradient for need in ctx.needs_input_grad[:3]], kind)
        differentiate = _by_kernel if options.kernel else _by_torch
        for chunk in chunks(hidden, weight, logprobs, options.memory, 1, gradients, options.kernel):
            rows = chunk.rows
            logprobs[rows], entropy[rows], by_logits = differentiate(chunk, hidden[rows], targets[rows], head, options)
            losses[rows], factors = _derivative(token_loss, logprobs[rows], rows, options.needs_gradient)
            if options.needs_gradient:
                factors = factors * weights[rows] * (head.scale / options.temperature)
                gradients.add(chunk, by_logits, factors, hidden[rows], head)
        FusedPass.keep(ctx, gradients, hidden, weight)
        ctx.mark_non_differentiable(logprobs, entropy, losses)
        return (weights * losses).sum(), logprobs, entropy, losses


def _by_kernel(
    chunk: Chunk, hidden: Tensor, targets: Tensor, head: Head, options: _Options
) -> tuple[Tensor, Tensor, Iterable[Tensor]]:
    """Log-probabilities, entropies, and the gradient of the log-probabilities with respect to the logits, per tile."""
    ((_, (logits,)),) = multiply(chunk, [hidden], [head])
    logprobs, entropy = launch.token(logits, chunk.gradient, targets, head, options.temperature)
    return logprobs, entropy, [] if chunk.gradient is None else [chunk.gradient]


def _by_torch(
    chunk: Chunk, hidden: Tensor, targets: Tensor, head: Head, options: _Options
) -> tuple[Tensor, Tensor, Iterable[Tensor]]:
    """The same in plain torch; the gradient is computed lazily."""
    log_z = project(chunk, [hidden], [head], [options.temperature])[0]
    logprobs = _logits_at(chunk, targets) - log_z[:, 0]
    entropy = torch.zeros_like(logprobs)
    slopes = _normalize(chunk, log_z, head, options.temperature, entropy, options.needs_gradient)
    return logprobs, entropy, _by_logits(chunk, targets, slopes)


def _logits_at(chunk: Chunk, targets: Tensor) -> Tensor:
    """The logits of the ``targets`` [rows]."""
    at = chunk.tiles[0].new_zeros(len(targets))
    for columns, (tile,) in zip(chunk.columns, chunk.tiles, strict=True):
        inside, here = _inside(columns, targets)
        at += torch.where(inside, tile.gather(1, here)[:, 0], 0)
    return at


def _inside(columns: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each of ``targets`` [rows] is in the tile of ``columns``, [rows], and its column there, [rows, 1]; 0 if not."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return inside, torch.where(inside, targets - columns.start, 0)[:, None]


def _normalize(
    chunk: Chunk, log_z: Tensor, head: Head, temperature: float, entropy: Tensor, needs_gradient: bool
) -> list[Tensor | None]:
    """Turn the chunk's logits into probabilities and accumulate ``entropy``; returns the soft cap's slopes per tile."""
    slopes: list[Tensor | None] = []
    for (tile,) in chunk.tiles:
        slopes.append(slope_of_cap(tile, head, temperature) if needs_gradient else None)
        tile -= log_z
        probabilities = tile.exp()
        entropy -= torch.linalg.vecdot(tile, probabilities)
        tile.copy_(probabilities)
    return slopes


def _derivative(token_loss: TokenLoss, logprobs: Tensor, rows: slice, needs_gradient: bool) -> tuple[Tensor, Tensor]:
    """Losses of some positions and their derivatives with respect to the log-probabilities, both [rows]."""
    if not needs_gradient:
        losses = token_loss(logprobs, rows)
        return losses, losses
    with torch.enable_grad():
        logprobs = logprobs.detach().requires_grad_()
        losses = token_loss(logprobs, rows)
        (slope,) = torch.autograd.grad(losses.sum(), logprobs)
    return losses.detach(), slope


def _by_logits(chunk: Chunk, targets: Tensor, slopes: list[Tensor | None]) -> Iterator[Tensor]:
    """Gradients of the log-probabilities with respect to the logits, ``onehot - p``, one tile [rows, width] at a time."""
    for columns, (tile,), slope in zip(chunk.columns, chunk.tiles, slopes, strict=True):
        tile.neg_()
        inside, here = _inside(columns, targets)
        tile.scatter_add_(1, here, inside.to(tile.dtype)[:, None])
        yield tile if slope is None else tile.mul_(slope)
