"""The fused divergence against cases by hand, naive autograd in float64, and TRL's and Liger's own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from torch import Tensor
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from search_e1.errors import ConfigError
from search_e1.training import projection
from search_e1.training.divergence import fused_divergence
from search_e1.training.head import Head


def naive(
    student: Tensor,
    teacher: Tensor,
    head: Head,
    *,
    divergence="forward_kl",
    beta=0.5,
    weights=None,
    tau=None,
    clip="entry",
    top_k=None,
    student_temperature=1.0,
    teacher_temperature=1.0,
    teacher_head=None,
):
    """The definition, with everything in memory and autograd for the gradient."""

    def log_probabilities(hidden, head, temperature):
        logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
        logits = logits * head.scale
        logits = head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits
        return torch.log_softmax(logits / temperature, -1)

    s = log_probabilities(student, head, student_temperature)
    t = log_probabilities(teacher, teacher_head or head, teacher_temperature).detach()
    if top_k is not None:
        ids = t.topk(min(top_k, t.shape[-1])).indices
        kept = [x.gather(-1, ids) for x in (s, t)]
        others = [x.scatter(-1, ids, -math.inf).exp().sum(-1, keepdim=True).clamp_min(1e-300).log() for x in (s, t)]
        s, t = (torch.cat(pair, -1) for pair in zip(kept, others, strict=True))
    if divergence == "forward_kl":
        terms = t.exp() * (t - s)
    elif divergence == "reverse_kl":
        terms = s.exp() * (s - t)
    else:
        m = beta * t.exp() + (1 - beta) * s.exp()
        terms = beta * t.exp() * (t - m.log()) + (1 - beta) * s.exp() * (s - m.log())
    if clip == "entry" and tau is not None:
        terms = terms.clamp(max=tau)
    per_token = terms.sum(-1)
    if clip == "token" and tau is not None:
        per_token = per_token.clamp(max=tau)
    weights = torch.full((len(student),), 1 / max(1, len(student)), dtype=s.dtype) if weights is None else weights
    return (weights * per_token).sum(), per_token.detach()


def tensors(seed, positions, width, vocabulary, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((positions, width), (positions, width), (vocabulary, width))
    return [torch.randn(shape, generator=generator, dtype=dtype) * scale for shape in shapes]


# By hand: an identity head, so hidden states are logits. Teacher (3/4, 1/4), student (1/4, 3/4):
# the terms of the forward KL are 3/4 log 3 = 0.823959 and -1/4 log 3 = -0.274653, together 1/2 log 3 = 0.549306.
HEAD = Head(torch.eye(2, dtype=torch.float64))
TEACHER = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
STUDENT = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)
LOG3 = math.log(3.0)


@pytest.mark.parametrize(
    ("options", "value", "gradient"),
    [
        (dict(clip="none"), 0.5 * LOG3, [-0.5, 0.5]),  # p_s - p_t
        (dict(tau=10.0), 0.5 * LOG3, [-0.5, 0.5]),
        # The first term is cut at 0.5 and gets no gradient; U holds only the second entry, whose p_t is 1/4:
        # (1/4 * 1/4, 3/4 * 1/4 - 1/4).
        (dict(tau=0.5), 0.5 - 0.25 * LOG3, [1 / 16, -1 / 16]),
        (dict(clip="token", tau=0.6), 0.5 * LOG3, [-0.5, 0.5]),
        (dict(clip="token", tau=0.5), 0.5, [0.0, 0.0]),
        # p_s (log p_s - log p_t - KL): 1/4 (-log 3 - 1/2 log 3), 3/4 (log 3 - 1/2 log 3).
        (dict(divergence="reverse_kl"), 0.5 * LOG3, [-0.375 * LOG3, 0.375 * LOG3]),
        # The mixture at 1/2 is (1/2, 1/2), either KL to it 3/4 log 3/2 + 1/4 log 1/2. The gradient is half of
        # p_s (log p_s - log m - KL): 3/4 (log 3/2 - KL) = 3/16 log 3 for the second entry.
        (dict(divergence="js"), 0.75 * math.log(1.5) - 0.25 * math.log(2), [-3 / 32 * LOG3, 3 / 32 * LOG3]),
    ],
)
def test_by_hand(options, value, gradient):
    student = STUDENT.clone().requires_grad_()
    loss, per_token = fused_divergence(student, TEACHER, HEAD, **options)
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1e-12)
    assert per_token.tolist() == pytest.approx([value], abs=1e-12)
    assert student.grad[0].tolist() == pytest.approx(gradient, abs=1e-12)
    assert not per_token.requires_grad


def test_all_but_the_likeliest_count_as_one_by_hand():
    # Teacher (1/2, 1/4, 1/4), student (1/4, 1/2, 1/4): of the best one and the rest, 1/2 log 2 + 1/2 log 2/3.
    # The gradient is p_s - p_t at the best, and p_s (1 - (1/2) / (3/4)) at the others.
    student = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    loss, _ = fused_divergence(student, teacher, Head(torch.eye(3, dtype=torch.float64)), top_k=1)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-12)
    assert student.grad[0].tolist() == pytest.approx([-1 / 4, 1 / 6, 1 / 12], abs=1e-12)


def test_by_hand_with_weights_and_temperature():
    # A teacher at temperature 1/2 is (9/10, 1/10): 9/10 log(9/10 / 1/4) + 1/10 log(1/10 / 3/4) = 0.951352.
    student = STUDENT.repeat(3, 1).requires_grad_()
    teacher = torch.cat([TEACHER, STUDENT, TEACHER])
    weights = torch.tensor([1.0, 0.0, 3.0])
    loss, per_token = fused_divergence(student, teacher, HEAD, weights=weights, clip="none", teacher_temperature=0.5)
    loss.backward()
    sharp = 0.9 * math.log(3.6) + 0.1 * math.log(2 / 15)
    assert loss.item() == pytest.approx(4 * sharp, abs=1e-12)
    assert per_token[[0, 2]].tolist() == pytest.approx([sharp, sharp], abs=1e-12)
    assert student.grad[:, 0].tolist() == pytest.approx([0.25 - 0.9, 0.0, (0.25 - 0.9) * 3], abs=1e-12)


@st.composite
def cases(draw):
    """Tensors in float64, options, and how the work is cut into tiles."""
    seed, positions, vocabulary = draw(st.integers(0, 999)), draw(st.integers(0, 9)), draw(st.integers(2, 23))
    generator = torch.Generator().manual_seed(seed)
    student, teacher, weight = tensors(seed, positions, 5, vocabulary, scale=draw(st.sampled_from([0.3, 1.0, 2.0])))
    transform = dict(scale=draw(st.sampled_from([1.0, 0.25, 2.0])), softcap=draw(st.sampled_from([None, None, 3.0])))

    def bias():
        return torch.randn(vocabulary, generator=generator, dtype=torch.float64) if draw(st.booleans()) else None

    options = dict(
        divergence=draw(st.sampled_from(["forward_kl", "reverse_kl", "js"])),
        beta=draw(st.sampled_from([0.1, 0.5, 0.8])),
        clip=draw(st.sampled_from(["entry", "token", "none"])),
        tau=draw(st.sampled_from([None, 0.02, 0.3, 2.0, 10.0])),
        top_k=draw(st.sampled_from([None, None, 1, 3, 20])),
        student_temperature=draw(st.sampled_from([1.0, 0.7])),
        teacher_temperature=draw(st.sampled_from([1.0, 0.4, 1.5])),
    )
    if draw(st.booleans()):
        options["weights"] = torch.randint(0, 3, (positions,), generator=generator).double() / 2
    if draw(st.integers(0, 3)) == 0:
        teacher = torch.randn(positions, 4, generator=generator, dtype=torch.float64)
        other = torch.randn(vocabulary, 4, generator=generator, dtype=torch.float64)
        options["teacher_head"] = Head(other, bias(), **transform)
    tile, budget = draw(st.sampled_from([1, 4, 30, 10_000])), draw(st.integers(1, 9)) * 16 * vocabulary / 2**20
    return student, teacher, Head(weight, bias(), **transform), options, (tile, budget)


def run(function, student, teacher, head, options, upstream=2.5):
    """Loss, per-token values and the gradients by hidden states, weight and bias."""
    leaves = [t if t is None else t.clone().requires_grad_() for t in (student, head.weight, head.bias)]
    loss, per_token = function(leaves[0], teacher, Head(leaves[1], leaves[2], *head[2:]), **options)
    (upstream * loss).backward()
    return [loss.detach(), per_token, *(leaf.grad for leaf in leaves if leaf is not None)]


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_naive_autograd(case):
    student, teacher, head, options, (tile, budget) = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "_CPU_TILE", tile)
        fused = run(fused_divergence, student, teacher, head, {**options, "logits_mib": budget})
        frozen = student.clone().requires_grad_()
        (2.5 * fused_divergence(frozen, teacher, head, **options, logits_mib=budget)[0]).backward()
    expected = run(naive, student, teacher, head, options)
    for got, wanted in zip(fused, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-11)
    assert torch.equal(frozen.grad, fused[2])


@settings(max_examples=40, deadline=None)
@given(
    case=cases(),
    hidden=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    weight=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_inputs_of_half_precision_are_summed_in_float32(case, hidden, weight):
    """Equal to the same numbers computed in float64 to float32's precision, not to half's; gradients as their type rounds."""
    student, teacher, head, options, _ = case
    options["tau"] = 10.0 if options["clip"] == "token" else options["tau"] and 10.0  # at a cut, rounding decides
    options["top_k"] = None  # as among equals
    student, teacher = student.to(hidden), teacher.to(hidden)

    def cast(head, kind):
        return head._replace(weight=head.weight.to(kind), bias=None if head.bias is None else head.bias.to(kind))

    head = cast(head, weight)
    exact_options = dict(options)
    if "teacher_head" in options:
        options["teacher_head"] = cast(options["teacher_head"], weight)
        exact_options["teacher_head"] = cast(options["teacher_head"], torch.float64)
    loss, per_token, *gradients = run(fused_divergence, student, teacher, head, options)
    expected_loss, expected_per_token, *expected = run(
        naive, student.double(), teacher.double(), cast(head, torch.float64), exact_options
    )
    assert (loss.dtype, per_token.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(per_token.double(), expected_per_token, rtol=1e-4, atol=1e-5)
    for gradient, wanted, kind in zip(gradients, expected, (hidden, weight, weight), strict=False):
        assert gradient.dtype is kind
        scale = wanted.abs().max().item() if wanted.numel() else 0.0
        # Probabilities sum to 1 only as far as float32 resolves log-sum-exp, and a large divergence multiplies what is left.
        largest = expected_per_token.abs().max().item() if expected_per_token.numel() else 0.0
        torch.testing.assert_close(gradient.double(), wanted, rtol=2e-2, atol=1e-3 * scale + 3e-5 + 1e-4 * largest)


def test_gradcheck():
    student, teacher, weight = tensors(1, 4, 3, 7, scale=0.7)
    student.requires_grad_()
    head = Head(weight, softcap=2.0)
    for divergence in ("forward_kl", "reverse_kl", "js"):
        options = dict(divergence=divergence, tau=0.5, logits_mib=3e-4)
        assert torch.autograd.gradcheck(lambda s, o=options: fused_divergence(s, teacher, head, **o)[0], (student,))


# What the libraries call beta: 0 is the forward KL, 1 the reverse KL, the mixture is (1 - beta) p_s + beta p_t in between.
THEIRS = [(0.0, dict()), (1.0, dict(divergence="reverse_kl")), (0.3, dict(divergence="js", beta=0.3))]


@pytest.mark.parametrize(("beta", "options"), THEIRS)
def test_trl(beta, options):
    student, teacher, weight = tensors(2, 12, 6, 50, scale=1.0, dtype=torch.float32)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1])
    ours, our_weight = student.clone().requires_grad_(), weight.clone().requires_grad_()
    options = dict(weights=mask / mask.sum(), clip="none", student_temperature=0.8, teacher_temperature=0.8, **options)
    loss, _ = fused_divergence(ours, teacher, Head(our_weight, scale=0.5, softcap=4.0), **options)
    loss.backward()
    theirs, their_weight = student.clone().requires_grad_(), weight.clone().requires_grad_()
    transform = {f"{role}_logit_scale": 0.5 for role in ("student", "teacher")}
    transform |= {f"{role}_final_logit_softcapping": 4.0 for role in ("student", "teacher")}
    expected, _, valid = _chunked_divergence_loss(
        theirs.view(2, 6, 6),
        teacher.view(2, 6, 6),
        their_weight,
        weight,
        mask.view(2, 6),
        beta=beta,
        temperature=0.8,
        **transform,
    )
    expected.backward()
    assert valid.item() == 9
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(our_weight.grad, their_weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("beta", "options"), THEIRS)
def test_liger(beta, options):
    student, teacher, weight = tensors(2, 12, 6, 50, scale=1.0, dtype=torch.float32)
    labels = torch.tensor([1, 1, -100, 1, 1, 1, -100, -100, 1, 1, 1, 1])
    ours, our_weight = student.clone().requires_grad_(), weight.clone().requires_grad_()
    options = dict(weights=(labels > 0) / 9, student_temperature=0.8, teacher_temperature=0.8, **options)
    loss, _ = fused_divergence(ours, teacher, Head(our_weight), **options)
    loss.backward()
    theirs, their_weight = student.clone().requires_grad_(), weight.clone().requires_grad_()
    function = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=0.8, compiled=False, chunk_size=5
    )
    expected = function(theirs, their_weight, teacher, weight, labels)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(our_weight.grad, their_weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("weights", [torch.zeros(4), torch.zeros(0)])
def test_nothing_selected_is_no_loss(weights, divergence):
    student, teacher, weight = tensors(5, len(weights), 3, 7)
    student.requires_grad_()
    loss, per_token = fused_divergence(student, teacher, Head(weight), weights=weights, tau=10.0, divergence=divergence)
    loss.backward()
    assert loss.item() == 0
    assert per_token.shape == weights.shape
    assert student.grad.abs().sum().item() == 0


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
def test_certain_and_opposed_roles_give_finite_numbers(divergence):
    """Probabilities that are zero in float32, at the places where the other role is certain."""
    student = torch.tensor([[400.0, -400.0, 0.0]], requires_grad=True)
    loss, _ = fused_divergence(student, -student.detach(), Head(torch.eye(3)), divergence=divergence)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) if divergence == "js" else 800.0, rel=1e-5)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("trained", [False, True])
def test_nothing_of_positions_times_vocabulary_is_kept(trained):
    """What the graph holds for the backward pass is as large as the hidden states and the trainable weight."""
    student, teacher, weight = tensors(7, 640, 4, 500, dtype=torch.float32)
    saved: list[int] = []
    student.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss, _ = fused_divergence(student, teacher, Head(weight.requires_grad_(trained)), tau=10.0)
    saved += [gradient.numel() for gradient in loss.grad_fn.by_head if gradient is not None]
    assert saved == [student.numel(), *([weight.numel()] if trained else [])]


@pytest.mark.parametrize("mib", [1, 3])
def test_the_memory_budget_holds(mib, monkeypatch):
    """Of every allocation: the buffer of both roles' logits is within the budget and a good part of it."""
    sizes: list[int] = []
    new_empty = Tensor.new_empty

    def recording(self, *args, **kwargs):
        made = new_empty(self, *args, **kwargs)
        sizes.append(made.numel() * made.element_size())
        return made

    monkeypatch.setattr(Tensor, "new_empty", recording)
    monkeypatch.setattr(projection, "_CPU_TILE", 2**13)
    student, teacher, weight = tensors(7, 300, 4, 20_000, dtype=torch.float32)
    fused_divergence(student, teacher, Head(weight), logits_mib=mib)
    assert 0.6 * mib * 2**20 < max(sizes) <= mib * 2**20


def test_one_backward_pass_with_a_trainable_head():
    student, teacher, weight = tensors(8, 2, 3, 4)
    loss, _ = fused_divergence(student, teacher, Head(weight.requires_grad_()))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        loss.backward()
    frozen = student.requires_grad_()
    loss, _ = fused_divergence(frozen, teacher, Head(weight.detach()))
    loss.backward(retain_graph=True)
    once = frozen.grad.clone()
    loss.backward()
    assert torch.equal(frozen.grad, 2 * once)


def test_autocast_does_not_reach_the_loss():
    student, teacher, weight = tensors(9, 5, 3, 40, dtype=torch.float32)
    expected, _ = fused_divergence(student, teacher, Head(weight))
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = fused_divergence(student, teacher, Head(weight))
    assert torch.equal(got, expected)


def test_without_a_gradient_the_value_is_the_same():
    student, teacher, weight = tensors(9, 5, 3, 40)
    with torch.no_grad():
        value, _ = fused_divergence(student.requires_grad_(), teacher, Head(weight, softcap=5.0), tau=0.1)
    assert not value.requires_grad
    assert torch.equal(value, fused_divergence(student, teacher, Head(weight, softcap=5.0), tau=0.1)[0].detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(teacher_hidden=torch.zeros(1, 3)), r"with equal positions, not \[2, 3\] and \[1, 3\]"),
        (dict(teacher_hidden=torch.zeros(2, 5)), r"the teacher's head is \[4, 3\].* of hidden states of width 5"),
        (dict(teacher_head=Head(torch.zeros(6, 3))), r"the teacher's head is \[6, 3\].* logits over 4 ids"),
        (dict(divergence="js", beta=1.0), r"beta = 1: must lie between 0 and 1"),
    ],
)
def test_what_does_not_agree_is_refused(change, message):
    student, teacher, weight = tensors(8, 2, 3, 4, dtype=torch.float32)
    with pytest.raises(ConfigError, match=message):
        fused_divergence(**{"student_hidden": student, "teacher_hidden": teacher, "head": Head(weight), **change})
