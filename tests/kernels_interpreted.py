"""The head's kernels by Triton's interpreter, against the passes of plain torch in float64.

``test_kernels`` runs this file in a process of its own: TRITON_INTERPRET=1 must be set before anything imports Triton.
"""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from search_e1.training.divergence import fused_divergence
from search_e1.training.head import Head
from search_e1.training.kernels import choice, launch
from search_e1.training.logprobs import fused_token_loss, negative_log_likelihood

POSITIONS, WIDTH, VOCABULARY = 3, 16, 200
KINDS = [torch.float32, torch.bfloat16]
TRANSFORMS = ["plain", "capped", "trained"]
CLIPS = [("entry", 0.02), ("entry", 10.0), ("token", 0.3), ("none", None)]
DIVERGENCES = ["forward_kl", "reverse_kl", "js"]


@pytest.fixture(autouse=True)
def _two_blocks(monkeypatch):
    monkeypatch.setattr(launch, "BLOCK", 128)


def drawn(kind, *shapes, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * scale).to(kind) for shape in shapes]


def heads(transform, kind):
    """The student's, and a teacher's that differs from it in everything where there is a soft cap."""
    weight, other = drawn(kind, (VOCABULARY, WIDTH), (VOCABULARY, WIDTH + 3), scale=0.6, seed=1)
    bias, others = drawn(kind, (VOCABULARY,), (VOCABULARY,), seed=2)
    if transform == "plain":
        return Head(weight), None
    if transform == "trained":
        return Head(weight.requires_grad_(), bias.requires_grad_(), scale=1.5), None
    return Head(weight, bias, scale=0.8, softcap=4.0), Head(other, others, scale=1.2, softcap=6.0)


def doubled(tensor):
    return tensor if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)


def close(ours, exact, bound):
    """The largest error is at most ``bound`` of the largest value."""
    error, size = (ours.double() - exact).abs().max(), exact.abs().max()
    assert error <= bound * size, f"{error:.2g} of {size:.2g}"


def compare(function, hidden, head, bound, **options):
    """``function`` by kernels and in float64: values to 1e-5, gradients to ``bound``."""
    rows_at_once = 2 * 2 * VOCABULARY * 4 / 2**20
    loss, *figures = function(hidden.requires_grad_(), head, kernel=True, logits_mib=rows_at_once, **options)
    (2.5 * loss).backward()
    exact_head = head._replace(weight=doubled(head.weight), bias=doubled(head.bias))
    exact = doubled(hidden)
    expected, *exact_figures = function(exact, exact_head, kernel=False, **options)
    (2.5 * expected).backward()
    assert loss.dtype is torch.float32
    for ours, theirs in zip([loss, *figures], [expected, *exact_figures], strict=True):
        close(ours.detach(), theirs.detach(), 1e-5)
    trained = zip((hidden, head.weight, head.bias), (exact, exact_head.weight, exact_head.bias), strict=True)
    for ours, theirs in trained:
        if theirs is not None and theirs.requires_grad:
            assert ours.grad.dtype is ours.dtype
            close(ours.grad, theirs.grad, bound)


def cases():
    """Each divergence with each clip, with two of the six heads in turn, so that each pair of options occurs."""
    rest = list(itertools.product(TRANSFORMS, KINDS))
    for i, (divergence, (clip, tau)) in enumerate(itertools.product(DIVERGENCES, CLIPS)):
        for at in (i, i + 3):
            yield divergence, clip, tau, *rest[(at + i // 4) % 6]


@pytest.mark.parametrize(("divergence", "clip", "tau", "transform", "kind"), cases())
def test_divergence(divergence, clip, tau, transform, kind):
    head, teacher_head = heads(transform, kind)
    student, teacher = drawn(kind, (POSITIONS, WIDTH), (POSITIONS, WIDTH + 3 * (teacher_head is not None)), seed=3)

    def function(hidden, head, kernel, **options):
        others = (teacher, teacher_head) if kernel else (teacher.double(), teacher_head)
        if not kernel and teacher_head is not None:
            others = others[0], teacher_head._replace(weight=doubled(teacher_head.weight), bias=doubled(teacher_head.bias))
        return fused_divergence(hidden, others[0], head, teacher_head=others[1], kernel=kernel, **options)

    options = dict(divergence=divergence, beta=0.3, clip=clip, tau=tau, student_temperature=0.9, teacher_temperature=1.3)
    if tau is not None and tau < 1:  # something is cut
        free, cut = (fused_divergence(student, teacher, head, teacher_head=teacher_head, kernel=False,
                                      **{**options, "tau": at})[1] for at in (None, tau))  # fmt: skip
        assert (free - cut).gt(1e-4).any()
    weights = torch.tensor([0.5, 0.0, 2.0])
    compare(function, student, head, 1e-4 if kind is torch.float32 else 1e-2, weights=weights, **options)


def clipped(logprobs, rows):
    """The loss of GRPO, which depends on where in the batch a position is."""
    gain = torch.tensor([1.0, -0.5, 2.0], dtype=logprobs.dtype)[rows]
    ratio = torch.exp(logprobs + 5.0)
    return -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("token_loss", [negative_log_likelihood, clipped])
def test_token_loss(token_loss, transform, kind):
    head, _ = heads(transform, kind)
    (hidden,) = drawn(kind, (POSITIONS, WIDTH), seed=4)
    targets = torch.tensor([127, 128, 199])

    def function(hidden, head, **options):
        loss, states = fused_token_loss(hidden, targets, head, token_loss, temperature=0.7, **options)
        return loss, *states

    compare(function, hidden, head, 1e-4 if kind is torch.float32 else 1e-2)


@pytest.mark.parametrize("vocabulary", [1, 128, 256])
@pytest.mark.parametrize("positions", [0, 1])
def test_few_positions_and_whole_blocks(positions, vocabulary):
    student, teacher, weight = drawn(torch.float32, (positions, 4), (positions, 4), (vocabulary, 4), seed=5)
    targets = torch.full((positions,), vocabulary - 1)
    results = []
    for kernel in (True, False):
        leaves = [student.clone().requires_grad_(), weight.clone().requires_grad_()]
        first, per_token = fused_divergence(leaves[0], teacher, Head(leaves[1]), tau=10.0, kernel=kernel)
        second, states = fused_token_loss(leaves[0], targets, Head(leaves[1]), kernel=kernel)
        first.backward()
        second.backward()
        results.append([first.detach(), second.detach(), per_token, *states, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_vocabulary_of_real_size(monkeypatch):
    """Sums over 151,936 entries in float32 keep five digits, and blocks are those of a GPU."""
    monkeypatch.setattr(launch, "BLOCK", 2048)
    student, teacher, weight = drawn(torch.bfloat16, (1, 8), (1, 8), (151_936, 8), seed=6)
    exact, _ = fused_divergence(student.double(), teacher.double(), Head(weight.double()), tau=10.0, kernel=False)
    loss, _ = fused_divergence(student, teacher, Head(weight), tau=10.0, kernel=True)
    close(loss, exact, 1e-5)
    targets = torch.tensor([151_935])
    _, exact_states = fused_token_loss(student.double(), targets, Head(weight.double()), kernel=False)
    _, states = fused_token_loss(student, targets, Head(weight), kernel=True)
    close(states.logprobs, exact_states.logprobs, 1e-5)
    close(states.entropy, exact_states.entropy, 1e-5)


def test_without_a_gradient_the_values_are_the_same():
    student, teacher, weight = drawn(torch.bfloat16, (3, 8), (3, 8), (VOCABULARY, 8), seed=7)
    targets = torch.tensor([1, 2, 3])
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got = fused_divergence(student.requires_grad_(), teacher, Head(weight), tau=0.1, kernel=True)
            figures = fused_token_loss(student, targets, Head(weight), kernel=True)[1]
        if not grad:
            before, tokens_before = got, figures
    assert not before[0].requires_grad
    assert torch.equal(got[1], before[1])
    assert all(torch.equal(a, b) for a, b in zip(figures, tokens_before, strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_certain_and_opposed_roles_give_finite_numbers(divergence):
    """Probabilities that are zero in float32, at the places where the other role is certain."""
    student = torch.tensor([[400.0, -400.0, 0.0]], requires_grad=True)
    loss, _ = fused_divergence(student, -student.detach(), Head(torch.eye(3)), divergence=divergence, kernel=True)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) if divergence == "js" else 800.0, rel=1e-5)
    assert student.grad.isfinite().all()
    hidden = student.detach().requires_grad_()
    loss, states = fused_token_loss(hidden, torch.tensor([1]), Head(torch.eye(3)), kernel=True)
    loss.backward()
    assert (loss.item(), states.entropy.item(), hidden.grad.tolist()) == (800.0, 0.0, [[1.0, -1.0, 0.0]])


@pytest.mark.parametrize("role", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(value, kind, role):
    """A clip must not make a number of it."""
    roles = drawn(kind, (2, 4), (2, 4), seed=8)
    roles[role][1, 2] = value
    (weight,) = drawn(kind, (9, 4), seed=9)
    loss, per_token = fused_divergence(roles[0].requires_grad_(), roles[1], Head(weight), tau=0.5, kernel=True)
    loss.backward()
    assert per_token.isfinite().tolist() == [True, False]
    assert not roles[0].grad[1].isfinite().any()
    _, states = fused_token_loss(roles[role], torch.tensor([0, 1]), Head(weight), kernel=True)
    assert states.logprobs.isfinite().tolist() == states.entropy.isfinite().tolist() == [True, False]


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"), name
        return operator(*args, **kwargs or {})


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_host_does_not_wait_for_the_device(transform):
    head, teacher_head = heads(transform, torch.bfloat16)
    student, teacher = drawn(torch.bfloat16, (3, WIDTH), (3, WIDTH + 3 * (teacher_head is not None)), seed=3)
    student.requires_grad_()
    options = dict(teacher_head=teacher_head, tau=0.05, logits_mib=0.003)
    for clip in ("entry", "token"):
        with NoWaiting():
            fused_divergence(student, teacher, head, clip=clip, kernel=True, **options)[0].backward()
    head.weight.grad = student.grad = None
    with NoWaiting():
        fused_token_loss(student, torch.tensor([1, 2, 3]), head, clipped, logits_mib=0.003, kernel=True)[0].backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():  # plain torch looks whether anything is cut
        fused_divergence(student, teacher, head, kernel=False, **options)


def test_kernels_that_work_are_found_to(monkeypatch):
    monkeypatch.setattr(launch, "BLOCK", 2048)  # as on a GPU; the interpreter takes its time by blocks
    monkeypatch.setattr(choice, "multiplies_bfloat16", lambda device: True)
    assert choice._problem(torch.device("cpu")) is None
