"""The teacher-student divergence over the whole vocabulary, without materializing all logits.

The loss starts from the last hidden states and needs two buffers per chunk, the student's and the teacher's logits, which are
overwritten by the gradient; see ``projection``.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from search_e1.errors import ConfigError
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

Divergence = Literal["forward_kl", "reverse_kl", "js"]
Clip = Literal["entry", "token", "none"]


class _Options(NamedTuple):
    divergence: Divergence
    beta: float
    tau: float
    clip: Clip
    temperatures: tuple[float, float]
    """Student, teacher."""
    memory: int  # bytes
    needs_gradient: bool
    top_k: int | None
    kernel: bool


def fused_divergence(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head: Head,
    *,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    weights: Tensor | None = None,
    tau: float | None = None,
    clip: Clip = "entry",
    top_k: int | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    teacher_head: Head | None = None,
    logits_mib: float | None = None,
    kernel: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum over N positions of the clipped divergence of teacher and student.

    With p_t and p_s the softmax of logits over their temperature, an entry v of the vocabulary V contributes

    - ``forward_kl``: ``p_t[v] * (log p_t[v] - log p_s[v])``, so KL(teacher || student);
    - ``reverse_kl``: ``p_s[v] * (log p_s[v] - log p_t[v])``, so KL(student || teacher);
    - ``js``: ``beta * p_t[v] * (log p_t[v] - log m[v]) + (1 - beta) * p_s[v] * (log p_s[v] - log m[v])`` with the mixture
      ``m = beta * p_t + (1 - beta) * p_s``: the generalized Jensen-Shannon divergence (GKD, arXiv:2306.13649, eq. 1) with
      beta as in TRL and Liger, where 0 and 1 stand for the forward and the reverse KL.

    ``clip="entry"`` (Search-E1, arXiv:2605.22511) caps each contribution at ``tau`` before the sum over v, ``"token"`` caps
    the sum, ``"none"`` (or no ``tau``) caps nothing. Capped values get no gradient.

    ``top_k``: only the teacher's k most likely entries are kept apart; all others are merged into one with their total
    probability. Unless entries are capped, this is a lower bound of the divergence over all entries.

    Args:
        student_hidden: [N, H], the student's last hidden states, at the loss positions only.
        teacher_hidden: [N, H_teacher], the teacher's, for the same predicted ids; no gradient.
        head: the student's head. If its weight or bias requires a gradient, it is accumulated chunk by chunk.
        weights: [N], the weight of each position; 1/N by default, which gives the mean.
        teacher_head: the teacher's head over the same vocabulary, if it differs from the student's; no gradient.
        logits_mib: MiB of logits in memory at a time, at least one position. Default: 64 on a CPU, 1,024 elsewhere.
        kernel: whether to use the Triton kernels, which support neither ``top_k`` nor float64. Default: on CUDA, if they work.

    Returns:
        The loss (scalar) and the clipped divergence of each position ([N], no gradient), in nats. Computed and returned in
        float32 for half-precision inputs, else in the inputs' dtype. The gradients are constants: the loss cannot be
        differentiated twice.

    Raises:
        ConfigError: shapes do not match, beta is outside (0, 1), or the kernels do not support the inputs.
    """
    teacher_head = head if teacher_head is None else teacher_head
    _check(student_hidden, teacher_hidden, head, teacher_head)
    if divergence == "js" and not 0 < beta < 1:
        raise ConfigError(f"beta = {beta:g}: must lie between 0 and 1; for 0 and 1, use forward_kl and reverse_kl")
    if weights is None:
        weights = mean_weights(student_hidden)
    trained = (student_hidden, head.weight, head.bias)
    options = _Options(
        divergence=divergence,
        beta=beta,
        tau=math.inf if tau is None else tau,
        clip="none" if tau is None else clip,
        temperatures=(student_temperature, teacher_temperature),
        memory=budget(logits_mib, student_hidden.device),
        needs_gradient=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained),
        top_k=top_k,
        kernel=use_kernels(kernel, ((student_hidden, head), (teacher_hidden, teacher_head)), top_k),
    )
    with torch.autocast(student_hidden.device.type, enabled=False):  # autocast would round the sums
        return _FusedDivergence.apply(*trained, head, teacher_hidden.detach(), teacher_head, weights, options)


def _check(student: Tensor, teacher: Tensor, head: Head, teacher_head: Head) -> None:
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
        shapes = f"{list(student.shape)} and {list(teacher.shape)}"
        raise ConfigError(f"hidden states of student and teacher must be [positions, width] with equal positions, not {shapes}")
    for role, hidden, of in (("student", student, head), ("teacher", teacher, teacher_head)):
        if of.weight.shape != (len(head.weight), hidden.shape[1]):
            raise ConfigError(
                f"the {role}'s head is {list(of.weight.shape)}, which does not make logits over {len(head.weight)} ids of "
                f"hidden states of width {hidden.shape[1]}"
            )


class _FusedDivergence(FusedPass):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        teacher_hidden: Tensor,
        teacher_head: Head,
        weights: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        student_head = head._replace(weight=weight.detach(), bias=None if bias is None else bias.detach())
        heads = (student_head, student_head if teacher_head is head else teacher_head)
        kind = torch.float32 if student_hidden.dtype in HALVES else student_hidden.dtype
        weights = weights.to(kind)
        per_token = student_hidden.new_zeros(len(student_hidden), dtype=kind)
        needed = [need and options.needs_gradient for need in ctx.needs_input_grad[:3]]
        gradients = Gradients(student_hidden, student_head, needed, kind)
        differentiate = _by_kernel if options.kernel else _by_torch
        for chunk in chunks(student_hidden, weight, per_token, options.memory, 2, gradients, options.kernel):
            rows = chunk.rows
            hidden = student_hidden[rows], teacher_hidden[rows]
            per_token[rows], by_logits = differentiate(chunk, hidden, heads, options)
            if options.needs_gradient:
                factors = weights[rows] * (head.scale / options.temperatures[0])
                if options.clip == "token":
                    factors = factors * (per_token[rows] <= options.tau)
                gradients.add(chunk, by_logits, factors, student_hidden[rows], student_head)
        if options.clip == "token":
            per_token.clamp_(max=options.tau)
        FusedPass.keep(ctx, gradients, student_hidden, weight)
        ctx.mark_non_differentiable(per_token)
        return (weights * per_token).sum(), per_token


def _by_kernel(
    chunk: Chunk, hidden: Sequence[Tensor], heads: Sequence[Head], options: _Options
) -> tuple[Tensor, Iterable[Tensor]]:
    """The divergence of each row, entries clipped, and its gradient with respect to the student's logits, per tile."""
    ((_, logits),) = multiply(chunk, hidden, heads)
    tau = options.tau if options.clip == "entry" else None
    sums = launch.divergence(
        logits, chunk.gradient, heads, options.temperatures, kind=options.divergence, beta=options.beta, tau=tau
    )
    return sums, [] if chunk.gradient is None else [chunk.gradient]


def _by_torch(
    chunk: Chunk, hidden: Sequence[Tensor], heads: Sequence[Head], options: _Options
) -> tuple[Tensor, Iterable[Tensor]]:
    """The same in plain torch; the gradient is computed lazily."""
    log_z = project(chunk, hidden, heads, options.temperatures)
    compare = _compare if options.top_k is None else _compare_top
    sums, mass = compare(chunk, log_z, heads[0], options)
    # d sum(f) / d z[j] = d[j] - p_s[j] * sum(d), see `_compare`
    return sums, (by_logit.addcmul_(p_student, mass, value=-1) for p_student, by_logit in chunk.tiles)


def _compare(chunk: Chunk, log_z: Tensor, head: Head, options: _Options) -> tuple[Tensor, Tensor]:
    """The divergence of each row, entries clipped, and sum(d) below; overwrites the chunk's tiles with p_s and d.

    The term f[v] of an entry depends on the student's logits z through log p_s[v]. With d[v] the derivative of f[v] with
    respect to log p_s[v], 0 where the term was clipped, ``d sum(f) / d z[j] = d[j] - p_s[j] * sum(d)``.
    """
    mass = torch.zeros_like(log_z[0])
    sums = mass[:, 0].clone()
    for tile in chunk.tiles:
        student, teacher = tile
        slope = slope_of_cap(student, head, options.temperatures[0]) if options.needs_gradient else None
        tile -= log_z
        terms = _terms(student, teacher, options)
        if options.clip == "entry" and terms.amax() > options.tau:  # masking costs more than checking that nothing is clipped
            teacher.masked_fill_(terms > options.tau, 0)
            terms.clamp_(max=options.tau)
        sums += terms.sum(-1)
        if options.needs_gradient:
            mass += teacher.sum(-1, keepdim=True)
        if slope is not None:
            tile *= slope
    return sums, mass


def _compare_top(chunk: Chunk, log_z: Tensor, head: Head, options: _Options) -> tuple[Tensor, Tensor]:
    """The same over the teacher's top-k entries, with all others merged into one.

    With P_s the total probability of the others, each entry v among them has ``d[v] = d[others] * p_s[v] / P_s``.
    """
    slopes, values, places = [], [], []
    for columns, tile in zip(chunk.columns, chunk.tiles, strict=True):
        slopes.append(slope_of_cap(tile[0], head, options.temperatures[0]) if options.needs_gradient else None)
        tile -= log_z
        found = tile[1].topk(min(options.top_k or 0, tile.shape[-1]))
        values.append(found.values)
        places.append(found.indices + columns.start)
    best = torch.cat(values, -1).topk(min(options.top_k or 0, sum(v.shape[-1] for v in values)))
    ids = torch.cat(places, -1).gather(-1, best.indices)
    entries = torch.stack((torch.empty_like(best.values), best.values))
    others = log_z.new_empty(2, len(chunk.tiles), len(ids))
    within = [((ids >= c.start) & (ids < c.stop)).nonzero(as_tuple=True) for c in chunk.columns]
    for i, (columns, tile, (rows, at)) in enumerate(zip(chunk.columns, chunk.tiles, within, strict=True)):
        own = ids[rows, at] - columns.start
        entries[0, rows, at] = tile[0, rows, own]
        tile[:, rows, own] = -math.inf  # sum the others directly: 1 - sum(top k) loses all precision when it is near 0
        torch.logsumexp(tile, -1, out=others[:, i])
    least = math.log(torch.finfo(entries.dtype).tiny)  # if there are no others
    student, teacher = torch.cat((entries, others.logsumexp(1)[..., None].clamp_min(least)), -1)
    terms = _terms(student, teacher, options)
    if options.clip == "entry":
        teacher.masked_fill_(terms > options.tau, 0)
        terms.clamp_(max=options.tau)
    for columns, tile, slope, (rows, at) in zip(chunk.columns, chunk.tiles, slopes, within, strict=True):
        own = ids[rows, at] - columns.start
        tile[0].exp_()
        torch.mul(tile[0], teacher[:, -1:] / student[:, -1:], out=tile[1])
        tile[0, rows, own], tile[1, rows, own] = student[rows, at], teacher[rows, at]
        if slope is not None:
            tile *= slope
    return terms.sum(-1), teacher.sum(-1, keepdim=True)


def _terms(student: Tensor, teacher: Tensor, options: _Options) -> Tensor:
    """The terms of a tile of log-probabilities, which are overwritten with p_s and the derivative of each term by log p_s."""
    if options.divergence == "forward_kl":
        terms = teacher - student
        terms.mul_(teacher.exp_())
        teacher.neg_()
        student.exp_()
        return terms
    if options.divergence == "reverse_kl":
        terms = student - teacher
        terms.mul_(student.exp_())
        torch.add(terms, student, out=teacher)
        return terms
    beta = options.beta
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    by_teacher = teacher - mixture
    by_teacher.mul_(teacher.exp_()).mul_(beta)
    torch.sub(student, mixture, out=teacher)
    teacher.mul_(student.exp_()).mul_(1 - beta)
    return by_teacher.add_(teacher)
