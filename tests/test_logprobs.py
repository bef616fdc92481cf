"""The fused pass over log-probabilities: values, entropies and gradients against plain torch in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from search_e1.training import projection
from search_e1.training.head import Head
from search_e1.training.logprobs import fused_token_loss, negative_log_likelihood

LOG3 = math.log(3.0)
HEAD = Head(torch.eye(2, dtype=torch.float64))  # hidden states are logits
HIDDEN = torch.tensor([[LOG3, 0.0]], dtype=torch.float64)  # probabilities 3/4 and 1/4


def test_by_hand():
    hidden = HIDDEN.clone().requires_grad_()
    loss, states = fused_token_loss(hidden, torch.tensor([1]), HEAD)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4), abs=1e-12)
    assert states.logprobs.item() == pytest.approx(-math.log(4), abs=1e-12)
    assert states.loss.item() == pytest.approx(math.log(4), abs=1e-12)
    # 3/4 log 4/3 + 1/4 log 4 = log 4 - 3/4 log 3
    assert states.entropy.item() == pytest.approx(math.log(4) - 0.75 * LOG3, abs=1e-12)
    assert hidden.grad[0].tolist() == pytest.approx([0.75, -0.75], abs=1e-12)  # p - onehot
    assert not any(state.requires_grad for state in states)


def test_by_hand_with_weights_temperature_and_a_loss_of_ones_own():
    """At temperature 1/2 the probabilities are 9/10 and 1/10; the loss p^2 has the derivative 2 p^2 by log p."""
    hidden = HIDDEN.repeat(3, 1).requires_grad_()
    weights = torch.tensor([1.0, 0.0, 3.0])
    loss, states = fused_token_loss(
        hidden,
        torch.tensor([0, 0, 1]),
        HEAD,
        lambda logprobs, _: (2 * logprobs).exp(),
        weights=weights,
        temperature=0.5,
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.81 + 3 * 0.01, abs=1e-12)
    assert states.entropy.tolist() == pytest.approx([-(0.9 * math.log(0.9) + 0.1 * math.log(0.1))] * 3, abs=1e-12)
    # weight x 2 p^2 x (onehot - p) / temperature
    by_first = [2 * 0.81 * 0.1 / 0.5, 0.0, -3 * 2 * 0.01 * 0.9 / 0.5]
    assert hidden.grad[:, 0].tolist() == pytest.approx(by_first, abs=1e-12)
    assert hidden.grad[:, 1].tolist() == pytest.approx([-one for one in by_first], abs=1e-12)


def clipped(old: Tensor, gain: Tensor):
    """The clipped loss of GRPO, which depends on where in the batch a position is."""

    def loss(logprobs: Tensor, rows: slice) -> Tensor:
        ratio = torch.exp(logprobs - old[rows])
        return -torch.minimum(ratio * gain[rows], ratio.clamp(0.8, 1.2) * gain[rows])

    return loss


def naive(hidden, targets, head, token_loss=negative_log_likelihood, *, weights=None, temperature=1.0, logits_mib=None):
    """The definition, with everything in memory and autograd for the gradient."""
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    logits = logits * head.scale
    logits = head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits
    logp = torch.log_softmax(logits / temperature, -1)
    chosen = logp.gather(1, targets[:, None])[:, 0]
    loss = token_loss(chosen, slice(None))
    weights = torch.full((len(hidden),), 1 / max(1, len(hidden)), dtype=logp.dtype) if weights is None else weights
    return (weights * loss).sum(), (chosen.detach(), -(logp.exp() * logp).sum(-1).detach(), loss.detach())


@st.composite
def cases(draw):
    """Tensors in float64, options, and how the work is cut into tiles."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    positions, vocabulary = draw(st.integers(0, 9)), draw(st.integers(2, 23))

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = draw(st.sampled_from([0.3, 1.0, 2.0]))
    hidden, weight = scale * drawn(positions, 5), scale * drawn(vocabulary, 5)
    bias = drawn(vocabulary) if draw(st.booleans()) else None
    head = Head(weight, bias, draw(st.sampled_from([1.0, 0.25, 2.0])), draw(st.sampled_from([None, None, 3.0])))
    targets = torch.randint(0, vocabulary, (positions,), generator=generator)
    options = dict(temperature=draw(st.sampled_from([1.0, 0.7, 1.5])))
    if draw(st.booleans()):
        options["weights"] = torch.randint(0, 3, (positions,), generator=generator).double() / 2
    if draw(st.booleans()):
        options["token_loss"] = clipped(-2 * drawn(positions).abs(), drawn(positions))
    tile, budget = draw(st.sampled_from([1, 4, 30, 10_000])), draw(st.integers(1, 9)) * 8 * vocabulary / 2**20
    return hidden, targets, head, options, (tile, budget)


def run(function, hidden, targets, head, options, upstream=2.5):
    """Loss, figures of each position and the gradients by hidden states, weight and bias."""
    leaves = [t if t is None else t.clone().requires_grad_() for t in (hidden, head.weight, head.bias)]
    loss, states = function(leaves[0], targets, Head(leaves[1], leaves[2], *head[2:]), **options)
    (upstream * loss).backward()
    return [loss.detach(), *states, *(leaf.grad for leaf in leaves if leaf is not None)]


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_plain_autograd(case):
    hidden, targets, head, options, (tile, budget) = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "_CPU_TILE", tile)
        fused = run(fused_token_loss, hidden, targets, head, {**options, "logits_mib": budget})
        frozen = hidden.clone().requires_grad_()
        (2.5 * fused_token_loss(frozen, targets, head, **options, logits_mib=budget)[0]).backward()
    for got, wanted in zip(fused, run(naive, hidden, targets, head, options), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-11)
    assert torch.equal(frozen.grad, fused[4])


@settings(max_examples=40, deadline=None)
@given(
    case=cases(),
    kind=st.sampled_from([torch.bfloat16, torch.float16]),
    weight=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_half_precision_is_summed_in_float32(case, kind, weight):
    """Equal to the same numbers computed in float64 to float32's precision, not to half's; gradients as their type rounds."""
    hidden, targets, head, options, _ = case
    options.pop("token_loss", None)  # at a clip, rounding decides
    hidden = hidden.to(kind)
    head = head._replace(weight=head.weight.to(weight), bias=None if head.bias is None else head.bias.to(weight))
    exact = head._replace(weight=head.weight.double(), bias=None if head.bias is None else head.bias.double())
    got = run(fused_token_loss, hidden, targets, head, options)
    wanted = run(naive, hidden.double(), targets, exact, options)
    assert [t.dtype for t in got[:5]] == [torch.float32] * 4 + [kind]
    for ours, theirs in zip(got[:4], wanted[:4], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(got[4:], wanted[4:], strict=True):
        scale = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-2, atol=1e-3 * scale + 3e-5)


def test_gradcheck():
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 3), (7, 3), (7,)))
    targets, head = torch.tensor([0, 6, 3, 3]), Head(weight, bias, 0.5, 2.0)

    def loss(hidden):
        return fused_token_loss(hidden, targets, head, temperature=0.8, logits_mib=3e-4)[0]

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(),))


@pytest.mark.parametrize("how", [{}, {"scale": 0.3}])
def test_cross_entropy_is_torchs(how):
    torch.manual_seed(1)
    hidden, weight = torch.randn(9, 6, requires_grad=True), torch.randn(50, 6, requires_grad=True)
    targets = torch.arange(9) * 5
    head = Head(weight, **how)
    loss, states = fused_token_loss(hidden, targets, head)
    expected = functional.cross_entropy(head.logits(hidden), targets, reduction="none")
    torch.testing.assert_close(states.loss, expected.detach())
    for ours, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected.mean(), (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_nothing_selected_is_no_loss():
    hidden, weight = torch.zeros(0, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    loss, states = fused_token_loss(hidden, torch.zeros(0, dtype=torch.long), Head(weight))
    loss.backward()
    assert (loss.item(), [len(s) for s in states], weight.grad.abs().sum().item()) == (0, [0, 0, 0], 0)


def test_certainty_gives_finite_numbers():
    hidden = torch.tensor([[400.0, -400.0, 0.0]], requires_grad=True)
    loss, states = fused_token_loss(hidden, torch.tensor([1]), Head(torch.eye(3)))
    loss.backward()
    assert loss.item() == pytest.approx(800.0)
    assert states.entropy.item() == 0
    assert hidden.grad.tolist() == [[1.0, -1.0, 0.0]]


@pytest.mark.parametrize("trained", [False, True])
def test_nothing_of_positions_times_vocabulary_is_kept(trained):
    """What the graph holds for the backward pass is as large as the hidden states and the trainable weight."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(640, 4, requires_grad=True), torch.randn(500, 4, requires_grad=trained)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss, _ = fused_token_loss(hidden, torch.zeros(640, dtype=torch.long), Head(weight))
    saved += [gradient.numel() for gradient in loss.grad_fn.by_head if gradient is not None]
    assert saved == [hidden.numel(), *([weight.numel()] if trained else [])]


def test_without_a_gradient_the_values_are_the_same_and_autocast_does_not_reach_them():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 3, requires_grad=True), torch.randn(40, 3)
    targets = torch.arange(5)
    expected, states = fused_token_loss(hidden, targets, Head(weight, softcap=5.0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        value, again = fused_token_loss(hidden, targets, Head(weight, softcap=5.0))
    assert not value.requires_grad
    assert torch.equal(value, expected.detach())
    assert all(torch.equal(a, b) for a, b in zip(states, again, strict=True))
