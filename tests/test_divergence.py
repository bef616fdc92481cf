"""The fused forward KL against a case by hand, naive autograd in float64, and TRL's chunked divergence."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from search_e1.distill.loss import fused_forward_kl, hidden_at, split_head
from search_e1.errors import ConfigError, ModelError


def naive_kl(student, teacher, head, weights, tau, clip, student_temperature, teacher_temperature, bias=None):
    """The definition, with everything in memory and autograd for the gradient."""
    bias = 0 if bias is None else bias
    s = torch.log_softmax((student @ head.T + bias) / student_temperature, -1)
    t = torch.log_softmax((teacher @ head.T + bias) / teacher_temperature, -1)
    terms = t.exp() * (t - s)
    if clip == "entry" and tau is not None:
        terms = terms.clamp(max=tau)
    per_token = terms.sum(-1)
    if clip == "token" and tau is not None:
        per_token = per_token.clamp(max=tau)
    total = weights.sum()
    return ((weights * per_token).sum() / total if total > 0 else 0 * per_token.sum()), per_token.detach()


def tensors(seed, positions, width, vocabulary, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((positions, width), (positions, width), (vocabulary, width))
    return [torch.randn(shape, generator=generator, dtype=dtype) * scale for shape in shapes]


# By hand: an identity head, so hidden states are logits. Teacher (3/4, 1/4), student (1/4, 3/4):
# the terms are 3/4 log 3 = 0.823959 and -1/4 log 3 = -0.274653, together 1/2 log 3 = 0.549306.
HEAD = torch.eye(2, dtype=torch.float64)
TEACHER = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
STUDENT = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("clip", "tau", "value", "gradient"),
    [
        ("none", None, 0.5 * math.log(3), [-0.5, 0.5]),  # p_s - p_t
        ("entry", 10.0, 0.5 * math.log(3), [-0.5, 0.5]),
        # The first term is cut at 0.5 and gets no gradient; U holds only the second entry, whose p_t is 1/4:
        # (1/4 * 1/4, 3/4 * 1/4 - 1/4).
        ("entry", 0.5, 0.5 - 0.25 * math.log(3), [1 / 16, -1 / 16]),
        ("token", 0.6, 0.5 * math.log(3), [-0.5, 0.5]),
        ("token", 0.5, 0.5, [0.0, 0.0]),
    ],
)
def test_by_hand(clip, tau, value, gradient):
    student = STUDENT.clone().requires_grad_()
    loss, per_token = fused_forward_kl(student, TEACHER, HEAD, clip=clip, tau=tau)
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1e-12)
    assert per_token.tolist() == pytest.approx([value], abs=1e-12)
    assert student.grad[0].tolist() == pytest.approx(gradient, abs=1e-12)
    assert not per_token.requires_grad


def test_by_hand_with_weights_and_temperature():
    # A teacher at temperature 1/2 is (9/10, 1/10): 9/10 log(9/10 / 1/4) + 1/10 log(1/10 / 3/4) = 0.951352.
    student = STUDENT.repeat(3, 1).requires_grad_()
    teacher = torch.cat([TEACHER, STUDENT, TEACHER])
    weights = torch.tensor([1.0, 0.0, 3.0])
    loss, per_token = fused_forward_kl(student, teacher, HEAD, weights=weights, clip="none", teacher_temperature=0.5)
    loss.backward()
    sharp = 0.9 * math.log(3.6) + 0.1 * math.log(2 / 15)
    assert loss.item() == pytest.approx(sharp, abs=1e-12)
    assert per_token[[0, 2]].tolist() == pytest.approx([sharp, sharp], abs=1e-12)
    assert student.grad[:, 0].tolist() == pytest.approx([(0.25 - 0.9) / 4, 0.0, (0.25 - 0.9) * 3 / 4], abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    positions=st.integers(1, 9),
    chunk_size=st.integers(1, 10),
    clip=st.sampled_from(["entry", "token", "none"]),
    tau=st.sampled_from([None, 0.02, 0.3, 2.0, 10.0]),
    student_temperature=st.sampled_from([1.0, 0.7]),
    teacher_temperature=st.sampled_from([1.0, 0.4, 1.5]),
    with_bias=st.booleans(),
    with_weights=st.booleans(),
)
def test_naive_autograd(
    seed, positions, chunk_size, clip, tau, student_temperature, teacher_temperature, with_bias, with_weights
):
    student, teacher, head = tensors(seed, positions, 5, 11, scale=1.0)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(11, generator=generator, dtype=torch.float64) if with_bias else None
    weights = torch.randint(0, 3, (positions,), generator=generator).double() if with_weights else None
    temperatures = dict(student_temperature=student_temperature, teacher_temperature=teacher_temperature)

    fused_student = student.clone().requires_grad_()
    loss, per_token = fused_forward_kl(
        fused_student,
        teacher,
        head,
        weights=weights,
        tau=tau,
        clip=clip,
        chunk_size=chunk_size,
        head_bias=bias,
        **temperatures,
    )
    (2.5 * loss).backward()

    naive_student = student.clone().requires_grad_()
    ones = torch.ones(positions, dtype=torch.float64)
    expected, expected_per_token = naive_kl(
        naive_student, teacher, head, ones if weights is None else weights, tau, clip, bias=bias, **temperatures
    )
    (2.5 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(per_token, expected_per_token, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fused_student.grad, naive_student.grad, rtol=1e-9, atol=1e-12)


def test_gradcheck():
    student, teacher, head = tensors(1, 4, 3, 7, scale=0.7)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: fused_forward_kl(s, teacher, head, tau=0.5, chunk_size=3)[0], (student,))


def test_trl():
    """TRL's divergence with beta 0 is the forward KL without a clip, averaged over the mask."""
    student, teacher, head = tensors(2, 12, 6, 50, scale=1.0, dtype=torch.float32)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1])
    ours = student.clone().requires_grad_()
    loss, _ = fused_forward_kl(ours, teacher, head, weights=mask.float(), clip="none", chunk_size=5, **{
        "student_temperature": 0.8, "teacher_temperature": 0.8,
    })  # fmt: skip
    loss.backward()
    theirs = student.clone().requires_grad_()
    expected, _, valid = _chunked_divergence_loss(
        theirs.view(2, 6, 6), teacher.view(2, 6, 6), head, head, mask.view(2, 6), beta=0.0, temperature=0.8
    )
    expected.backward()
    assert valid.item() == 9
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_another_head_for_the_teacher():
    student, teacher, head = tensors(3, 4, 3, 7)
    other = tensors(4, 4, 3, 7)[2]
    loss, _ = fused_forward_kl(student, teacher, head, clip="none", teacher_head_weight=other)
    t, s = torch.log_softmax(teacher @ other.T, -1), torch.log_softmax(student @ head.T, -1)
    assert loss.item() == pytest.approx((t.exp() * (t - s)).sum(-1).mean().item(), rel=1e-12)


@pytest.mark.parametrize("weights", [torch.zeros(4), torch.zeros(0)])
def test_nothing_selected_is_no_loss(weights):
    student, teacher, head = tensors(5, len(weights), 3, 7)
    student.requires_grad_()
    loss, per_token = fused_forward_kl(student, teacher, head, weights=weights, tau=10.0)
    loss.backward()
    assert loss.item() == 0
    assert per_token.shape == weights.shape
    assert student.grad.abs().sum().item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    """Equal to the same halves computed in float64 to float32's precision, not to half's."""
    student, teacher, head = (t.to(dtype) for t in tensors(6, 6, 8, 300, scale=0.5))
    ours = student.clone().requires_grad_()
    loss, per_token = fused_forward_kl(ours, teacher, head, tau=10.0, chunk_size=4)
    loss.backward()
    exact = student.double().requires_grad_()
    expected, expected_per_token = naive_kl(
        exact, teacher.double(), head.double(), torch.ones(6), 10.0, "entry", 1.0, 1.0
    )
    expected.backward()
    assert per_token.dtype is torch.float32
    assert ours.grad.dtype is dtype
    torch.testing.assert_close(per_token.double(), expected_per_token, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=2e-2, atol=1e-4)


def test_nothing_of_vocabulary_size_is_kept():
    """What the graph holds for the backward pass is as large as the hidden states."""
    student, teacher, head = tensors(7, 64, 4, 500, dtype=torch.float32)
    saved: list[int] = []
    student.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        fused_forward_kl(student, teacher, head, tau=10.0, chunk_size=16)
    assert max(saved) == student.numel()


def test_a_trainable_head_is_refused():
    student, teacher, head = tensors(8, 2, 3, 4)
    with pytest.raises(ConfigError, match="output head requires a gradient"):
        fused_forward_kl(student.requires_grad_(), teacher, head.requires_grad_())


def test_shapes_that_do_not_agree_are_refused():
    student, teacher, head = tensors(8, 2, 3, 4)
    with pytest.raises(ConfigError, match=r"\[2, 3\] and \[1, 3\]"):
        fused_forward_kl(student, teacher[:1], head)


def test_hidden_states_times_head_are_the_logits(tiny_policy):
    model = tiny_policy.model.eval()
    decoder, head = split_head(model)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    hidden = hidden_at(decoder, ids, mask, torch.tensor([2, 5]))
    logits = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(head(hidden), torch.stack([logits[0, 2], logits[1, 1]]))


def test_a_model_that_changes_its_logits_is_refused(tiny_policy):
    model = tiny_policy.model
    forward = model.forward

    def capped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 3 * output.logits + 1
        return output

    model.forward = capped
    with pytest.raises(ModelError, match="changes its logits"):
        split_head(model)
