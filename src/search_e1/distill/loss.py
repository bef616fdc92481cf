"""The heart of the method: forward KL from teacher to student over the whole vocabulary, without ever holding it whole.

Both roles share one frozen output head, so the loss starts from the last hidden states. Logits exist for ``chunk_size``
positions at a time, and the gradient with respect to the student's hidden states is formed beside them, in the forward
pass: nothing of size [positions, vocabulary] outlives its chunk.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from search_e1.errors import ConfigError, ModelError

Clip = Literal["entry", "token", "none"]


class _Options(NamedTuple):
    tau: float | None
    clip: Clip
    student_temperature: float
    teacher_temperature: float
    chunk_size: int
    with_gradient: bool


def fused_forward_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head_weight: Tensor,
    *,
    weights: Tensor | None = None,
    tau: float | None = None,
    clip: Clip = "entry",
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    chunk_size: int = 256,
    head_bias: Tensor | None = None,
    teacher_head_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) at N positions, clipped, as a weighted mean.

    With p the softmax of logits divided by their temperature, an entry v of the vocabulary V contributes
    ``p_t[v] * (log p_t[v] - log p_s[v])``. ``clip="entry"`` (Search-E1, arXiv:2605.22511) cuts each contribution at ``tau``
    before the sum over v, ``"token"`` cuts the sum, ``"none"`` (or no ``tau``) nothing. What is cut gets no gradient; with
    U the entries that are not cut, ``d loss / d z_s[j] = (p_s[j] * sum_{v in U} p_t[v] - p_t[j] * [j in U]) / temperature``.

    Args:
        student_hidden: [N, H], the student's last hidden states; the only input that receives a gradient.
        teacher_hidden: [N, H], the teacher's, for the same predicted ids.
        head_weight: [V, H] of the output head; frozen.
        weights: [N], of each position in the mean; ones if not given. All zero: loss 0 and gradient 0.
        head_bias: [V], if the head has one.
        teacher_head_weight: [V, H], where the teacher's head is another one.

    Returns:
        The loss (scalar) and each position's clipped divergence ([N], without gradient), in nats; float32 for inputs of
        half precision, which is also what is summed in, else of the inputs' own type.

    Raises:
        ConfigError: the head requires a gradient, which is not computed here, or shapes that do not agree.
    """
    frozen = (head_weight, head_bias, teacher_head_weight)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in frozen):
        raise ConfigError(
            "the output head requires a gradient, but distillation keeps it frozen; train adapters without it"
        )
    if student_hidden.shape != teacher_hidden.shape or student_hidden.dim() != 2:
        shapes = f"{list(student_hidden.shape)} and {list(teacher_hidden.shape)}"
        raise ConfigError(f"hidden states of student and teacher must both be [positions, width], not {shapes}")
    if weights is None:
        weights = torch.ones(len(student_hidden), device=student_hidden.device)
    options = _Options(
        tau=tau if clip != "none" else None,
        clip=clip,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        chunk_size=chunk_size,
        with_gradient=student_hidden.requires_grad and torch.is_grad_enabled(),
    )
    teacher_head = head_weight if teacher_head_weight is None else teacher_head_weight
    return _FusedForwardKL.apply(
        student_hidden, teacher_hidden.detach(), head_weight, teacher_head, head_bias, weights, options
    )


class _FusedForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        student_head: Tensor,
        teacher_head: Tensor,
        bias: Tensor | None,
        weights: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        kind = _sum_dtype(student_hidden)
        positions = len(student_hidden)
        per_token = torch.zeros(positions, dtype=kind, device=student_hidden.device)
        gradient = torch.zeros(student_hidden.shape, dtype=kind, device=student_hidden.device)
        weights = weights.to(kind)
        total = weights.sum()
        shares = weights / torch.where(total > 0, total, 1)
        for at in range(0, positions, options.chunk_size):
            rows = slice(at, at + options.chunk_size)
            student = _log_softmax(student_hidden[rows], student_head, bias, options.student_temperature)
            teacher = _log_softmax(teacher_hidden[rows], teacher_head, bias, options.teacher_temperature)
            per_token[rows], by_logit = _divergence(student, teacher, options)
            if options.with_gradient:
                gradient[rows] = (
                    _back_project(by_logit, student_head) * (shares[rows] / options.student_temperature)[:, None]
                )
        ctx.save_for_backward(gradient)
        ctx.hidden_dtype = student_hidden.dtype
        ctx.mark_non_differentiable(per_token)
        return (shares * per_token).sum(), per_token

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return ((gradient * grad_loss).to(ctx.hidden_dtype), *(None,) * 6)


def _divergence(student: Tensor, teacher: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """Clipped divergence [rows] and its gradient by the scaled student logits [rows, V]. Overwrites its inputs."""
    p_teacher = teacher.exp()
    terms = teacher.sub_(student).mul_(p_teacher)
    p_student = student.exp_()
    if options.tau is None:
        return terms.sum(-1), p_student.sub_(p_teacher)
    if options.clip == "token":
        sums = terms.sum(-1)
        return sums.clamp(max=options.tau), p_student.sub_(p_teacher).mul_((sums <= options.tau)[:, None])
    p_teacher.masked_fill_(terms > options.tau, 0)  # what is left is p_t on U
    unclipped_mass = p_teacher.sum(-1, keepdim=True)
    return terms.clamp_(max=options.tau).sum(-1), p_student.mul_(unclipped_mass).sub_(p_teacher)


def _sum_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float32 if hidden.dtype in (torch.bfloat16, torch.float16) else hidden.dtype


def _log_softmax(hidden: Tensor, head: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[rows, V]. Half precision is multiplied as it is and summed in float32: rounded logits would drown small divergences."""
    logits = _matmul(hidden.to(head.dtype), head.t())
    if bias is not None:
        logits = logits + bias
    return torch.log_softmax(logits / temperature if temperature != 1 else logits, -1)


def _back_project(by_logit: Tensor, head: Tensor) -> Tensor:
    """[rows, V] @ [V, H]."""
    return _matmul(by_logit.to(head.dtype), head).to(by_logit.dtype)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    if left.dtype not in (torch.bfloat16, torch.float16):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()  # no other backend has a product of halves with a float32 result


def split_head(model: Any) -> tuple[nn.Module, nn.Linear]:
    """The decoder of a causal language model (or of one with adapters), which gives hidden states, and its output head.

    Raises:
        ModelError: the model's logits are more than its head applied to its decoder (they are scaled or capped).
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    ids = torch.arange(1, 5, device=model.device)[None] % head.weight.shape[0]
    training = model.training
    model.eval()
    with torch.no_grad():
        whole, parts = model(ids).logits, head(decoder(input_ids=ids).last_hidden_state)
    model.train(training)
    if not torch.allclose(whole, parts, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise ModelError(
            f"a {type(model).__name__} changes its logits after the output head (a scale or a cap), which distillation "
            "does not know; use a model without"
        )
    return decoder, head


def hidden_at(decoder: nn.Module, input_ids: Tensor, attention_mask: Tensor, index: Tensor) -> Tensor:
    """[N, H]: last hidden states of a batch [rows, width] at flat positions ``index`` [N]."""
    hidden = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[index]
