"""The heart of the method: a divergence of teacher and student over the whole vocabulary, without ever holding it whole.

The loss starts from the last hidden states. Logits exist for a few positions at a time, as many as a memory budget
allows, and every gradient is formed beside them, in the forward pass: nothing of size [positions, vocabulary] outlives
its chunk. A chunk takes two buffers, the student's logits and the teacher's, which end as the gradient. They are laid
out in tiles of the vocabulary: what is done entry by entry is done while a tile is in the cache, and needs no third
buffer.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from search_e1.errors import ConfigError
from search_e1.training.head import Head

Divergence = Literal["forward_kl", "reverse_kl", "js"]
Clip = Literal["entry", "token", "none"]

_HALVES = (torch.bfloat16, torch.float16)
# Entries of a tile. On a CPU, so few that the operands of its operations stay in a core's cache; elsewhere, so many that
# launches do not count.
_CPU_TILE = 2**17
_DEVICE_TILE = 2**24


class _Options(NamedTuple):
    divergence: Divergence | Literal["cross_entropy"]
    beta: float
    tau: float
    clip: Clip
    student_temperature: float
    teacher_temperature: float
    memory: int  # bytes
    with_gradient: bool


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
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    teacher_head: Head | None = None,
    logits_mib: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The divergence of teacher and student at N positions, clipped, as a weighted mean.

    With p_t and p_s the softmax of logits over their temperature, an entry v of the vocabulary V contributes

    - ``forward_kl``: ``p_t[v] * (log p_t[v] - log p_s[v])``, so KL(teacher || student);
    - ``reverse_kl``: ``p_s[v] * (log p_s[v] - log p_t[v])``, so KL(student || teacher);
    - ``js``: ``beta * p_t[v] * (log p_t[v] - log m[v]) + (1 - beta) * p_s[v] * (log p_s[v] - log m[v])`` with the mixture
      ``m = beta * p_t + (1 - beta) * p_s``: the generalised Jensen-Shannon divergence (GKD, arXiv:2306.13649, eq. 1) with
      beta as in TRL and Liger, where 0 and 1 stand for the forward and the reverse KL.

    ``clip="entry"`` (Search-E1, arXiv:2605.22511) cuts each contribution at ``tau`` before the sum over v, ``"token"`` cuts
    the sum, ``"none"`` (or no ``tau``) nothing. What is cut gets no gradient.

    Args:
        student_hidden: [N, H], the student's last hidden states, at the positions of the loss and no others.
        teacher_hidden: [N, H_teacher], the teacher's, for the same predicted ids; constant.
        head: the student's. If its weight or bias requires a gradient, that is accumulated chunk by chunk.
        weights: [N], of each position in the mean; ones if not given. All zero: loss 0 and gradient 0.
        teacher_head: of the same vocabulary, where the teacher has another one; constant.
        logits_mib: MiB for logits that are in memory together; at least one position's are. If not given: 64 on a CPU,
            where more is hardly faster, 1,024 elsewhere.

    Returns:
        The loss (scalar) and each position's clipped divergence ([N], without gradient), in nats; float32 for inputs of
        half precision, which is also what is summed in, else of the inputs' own type. The gradients are constants: the
        loss cannot be differentiated twice.

    Raises:
        ConfigError: shapes that do not agree, or a beta outside (0, 1).
    """
    teacher_head = None if teacher_head is head else teacher_head  # a shared head takes one product
    _check(student_hidden, teacher_hidden, head, teacher_head)
    if divergence == "js" and not 0 < beta < 1:
        raise ConfigError(f"beta = {beta:g}: must lie between 0 and 1; these are forward_kl and reverse_kl")
    if weights is None:
        weights = torch.ones(len(student_hidden), device=student_hidden.device)
    trained = (student_hidden, head.weight, head.bias)
    options = _Options(
        divergence=divergence,
        beta=beta,
        tau=math.inf if tau is None else tau,
        clip="none" if tau is None else clip,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        memory=_bytes(logits_mib, student_hidden.device),
        with_gradient=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained),
    )
    with torch.autocast(student_hidden.device.type, enabled=False):  # it would round what is summed
        return _FusedDivergence.apply(*trained, head, teacher_hidden.detach(), teacher_head, weights, options)


def fused_cross_entropy(
    hidden: Tensor, targets: Tensor, head: Head, *, weights: Tensor | None = None, logits_mib: float | None = None
) -> tuple[Tensor, Tensor]:
    """The cross-entropy ``-log p[target]`` at N positions as a weighted mean: KL(target || student) of certain targets.

    Args:
        hidden: [N, H], last hidden states at the positions of the loss and no others.
        targets: [N], int64, the ids that they are to predict.
        head, weights, logits_mib: see ``fused_divergence``, as for what is returned.
    """
    weights = torch.ones(len(hidden), device=hidden.device) if weights is None else weights
    trained = (hidden, head.weight, head.bias)
    options = _Options(
        divergence="cross_entropy",
        beta=0.5,
        tau=math.inf,
        clip="none",
        student_temperature=1.0,
        teacher_temperature=1.0,
        memory=_bytes(logits_mib, hidden.device),
        with_gradient=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained),
    )
    with torch.autocast(hidden.device.type, enabled=False):
        return _FusedDivergence.apply(*trained, head, targets, None, weights, options)


def _check(student: Tensor, teacher: Tensor, head: Head, teacher_head: Head | None) -> None:
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher):
        shapes = f"{list(student.shape)} and {list(teacher.shape)}"
        raise ConfigError(
            f"hidden states of student and teacher must be [positions, width], as many each, not {shapes}"
        )
    for role, hidden, of in (("student", student, head), ("teacher", teacher, teacher_head or head)):
        if of.weight.shape != (len(head.weight), hidden.shape[1]):
            raise ConfigError(
                f"the {role}'s head is {list(of.weight.shape)}, which does not make logits over {len(head.weight)} ids of "
                f"hidden states of width {hidden.shape[1]}"
            )


def _bytes(logits_mib: float | None, device: torch.device) -> int:
    if logits_mib is None:
        logits_mib = 64 if device.type == "cpu" else 1024
    return int(logits_mib * 2**20)


class _FusedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        teacher: Tensor,  # hidden states, or ids that are certain
        teacher_head: Head | None,
        weights: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        head = head._replace(weight=weight.detach(), bias=None if bias is None else bias.detach())
        kind = torch.float32 if student_hidden.dtype in _HALVES else student_hidden.dtype
        weights = weights.to(kind)
        total = weights.sum()
        shares = weights / torch.where(total > 0, total, 1)
        per_token = student_hidden.new_zeros(len(student_hidden), dtype=kind)
        gradients = [
            torch.zeros_like(tensor, dtype=kind) if tensor is not None and needed and options.with_gradient else None
            for tensor, needed in zip((student_hidden, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        for chunk in _chunks(len(student_hidden), len(weight), per_token, options.memory):
            rows = chunk.rows
            log_z = _project(chunk, student_hidden[rows], head, teacher[rows], teacher_head, options)
            per_token[rows], mass = _compare(chunk, log_z, head.softcap, options)
            if options.with_gradient:
                factors = shares[rows] * (head.scale / options.student_temperature)
                if options.clip == "token":
                    factors = factors * (per_token[rows] <= options.tau)
                _back_project(chunk, mass, factors, student_hidden[rows], head, gradients)
        if options.clip == "token":
            per_token.clamp_(max=options.tau)
        by_hidden, *ctx.by_head = gradients
        ctx.save_for_backward(by_hidden)
        ctx.kinds = student_hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(per_token)
        return (shares * per_token).sum(), per_token

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (by_hidden,) = ctx.saved_tensors
        by_head, (hidden_kind, head_kind) = ctx.by_head, ctx.kinds
        if by_head is None:
            raise RuntimeError("the gradient of a trainable head is there for one backward pass only")
        if any(gradient is not None for gradient in by_head):
            ctx.by_head = None  # it is large, so it is scaled where it lies, and given away
        return (
            # Rounded last: a loss scaler's factor is what keeps small gradients above the least half.
            None if by_hidden is None else (by_hidden * grad_loss).to(hidden_kind),
            *(None if gradient is None else gradient.mul_(grad_loss).to(head_kind) for gradient in by_head),
            *(None,) * 5,
        )


class _Chunk(NamedTuple):
    rows: slice
    columns: list[slice]
    tiles: list[Tensor]
    """A contiguous [2, rows, width] for each of ``columns``, student and teacher."""


def _chunks(positions: int, vocabulary: int, like: Tensor, memory: int) -> Iterator[_Chunk]:
    """Equal parts of the positions, whose logits and a few tiles fit into ``memory`` bytes. The buffer is used again."""
    tile = _CPU_TILE if like.device.type == "cpu" else _DEVICE_TILE
    budget = memory // like.element_size()
    fitting = max(budget - 4 * tile, budget // 2) // (2 * vocabulary)
    fitting = max(1, min(fitting, tile // min(vocabulary, 256)))  # a narrow tile makes slow products
    size = math.ceil(positions / max(1, math.ceil(positions / fitting)))
    width = math.ceil(vocabulary / math.ceil(vocabulary * max(1, size) / tile))
    columns = [slice(at, min(at + width, vocabulary)) for at in range(0, vocabulary, width)]
    buffer = like.new_empty(2 * size * vocabulary)
    for at in range(0, positions, max(1, size)):
        rows = slice(at, min(at + size, positions))
        n = rows.stop - rows.start
        tiles = [buffer[2 * n * c.start : 2 * n * c.stop].view(2, n, c.stop - c.start) for c in columns]
        yield _Chunk(rows, columns, tiles)


def _project(
    chunk: _Chunk,
    student_hidden: Tensor,
    head: Head,
    teacher: Tensor,
    teacher_head: Head | None,
    options: _Options,
) -> Tensor:
    """Fill the chunk with logits over temperature. Returns the logs of their partition functions, [2, rows, 1].

    Of a teacher that is ids the chunk gets probabilities, 1 at the id, whose logs of partition functions are 0.
    """
    log_z = chunk.tiles[0].new_zeros(2, len(chunk.columns), len(student_hidden))
    certain = options.divergence == "cross_entropy"
    temperatures = (options.student_temperature, options.teacher_temperature)
    heads = (head,) if certain else (head, teacher_head or head)
    both = torch.cat([student_hidden, teacher]) if teacher_head is None and not certain else None
    for i, (columns, tile) in enumerate(zip(chunk.columns, chunk.tiles, strict=True)):
        if certain:
            _matmul(student_hidden, head.weight[columns].t(), out=tile[0])
            ids = torch.arange(columns.start, columns.stop, device=teacher.device)
            tile[1].copy_(teacher[:, None] == ids)
        elif both is not None:  # one large product is faster than two
            _matmul(both, head.weight[columns].t(), out=tile.flatten(0, 1))
        else:
            for logits, hidden, of in zip(tile, (student_hidden, teacher), heads, strict=True):
                _matmul(hidden, of.weight[columns].t(), out=logits)
        for logits, of, temperature in zip(tile, heads, temperatures, strict=False):
            if of.bias is not None:
                logits.add_(of.bias[columns])
            if of.softcap is not None:
                logits.mul_(of.scale / of.softcap).tanh_().mul_(of.softcap / temperature)
            elif of.scale != temperature:
                logits.mul_(of.scale / temperature)
        torch.logsumexp(tile[: len(heads)], -1, out=log_z[: len(heads), i])
    total = log_z.logsumexp(1)[..., None]
    total[len(heads) :] = 0
    return total


def _compare(chunk: _Chunk, log_z: Tensor, softcap: float | None, options: _Options) -> tuple[Tensor, Tensor]:
    """The divergence of each row, entries clipped, and what its gradient needs.

    An entry's term f[v] depends on the student's logits z through its log p_s[v]. With d[v] that derivative, 0 where the
    term was cut, ``d sum(f) / d z[j] = d[j] - p_s[j] * sum(d)``. The chunk's tiles become p_s and d; sum(d) is returned.
    """
    mass = torch.zeros_like(log_z[0])
    sums = mass[:, 0].clone()
    for tile in chunk.tiles:
        student, teacher = tile
        if capped := softcap is not None and options.with_gradient:
            slope = 1 - (student * (options.student_temperature / softcap)) ** 2
        tile -= log_z
        terms = _terms(student, teacher, options)
        if options.clip == "entry" and terms.amax() > options.tau:  # a mask costs more than to see that it is empty
            teacher.masked_fill_(terms > options.tau, 0)
            terms.clamp_(max=options.tau)
        sums += terms.sum(-1)
        if options.with_gradient:
            mass += teacher.sum(-1, keepdim=True)
        if capped:
            tile *= slope
    return sums, mass


def _terms(student: Tensor, teacher: Tensor, options: _Options) -> Tensor:
    """The terms of a tile of log-probabilities; these become p_s and each term's derivative by log p_s."""
    if options.divergence == "cross_entropy":  # of the teacher it holds probabilities
        terms = teacher.neg_() * student
        student.exp_()
        return terms
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


def _back_project(
    chunk: _Chunk, mass: Tensor, factors: Tensor, hidden: Tensor, head: Head, gradients: list[Tensor | None]
) -> None:
    """Add the chunk's part to the gradients by hidden states, head and bias. ``factors`` [rows] scale the logits' gradient."""
    by_hidden, by_weight, by_bias = gradients
    scaled = (hidden * factors[:, None]).to(hidden.dtype if hidden.is_cuda else factors.dtype)
    rows = None if by_hidden is None else by_hidden[chunk.rows]
    for columns, (p_student, by_logit) in zip(chunk.columns, chunk.tiles, strict=True):
        by_logit.addcmul_(p_student, mass, value=-1)
        if rows is not None:
            _add_matmul(rows, by_logit, head.weight[columns])
        if by_weight is not None:
            _add_matmul(by_weight[columns], by_logit.t(), scaled)
        if by_bias is not None:
            by_bias[columns] += factors @ by_logit
    if rows is not None:
        rows.mul_(factors[:, None])


def _matmul(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``out = left @ right``. Halves are summed and given out in float32: rounded logits would drown small divergences."""
    if left.is_cuda and left.dtype == right.dtype and left.dtype in _HALVES:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)  # no other backend has such a product


def _add_matmul(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left @ right``, where ``out`` and ``left`` are of the type that is summed in."""
    if right.is_cuda and right.dtype in _HALVES:
        out.add_(torch.mm(left.to(right.dtype), right, out_dtype=torch.float32))
    else:
        out.addmm_(left, right.to(out.dtype))
