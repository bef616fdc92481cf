"""The size of a pass by what passes take: a meter counts tokens instead of an accelerator's bytes."""

import copy
from collections.abc import Callable

import pytest
import torch

from conftest import make_tiny_policy
from ranked import in_ranks
from search_e1.config import TrainingConfig
from search_e1.runs import ranks
from search_e1.training import fit
from search_e1.training.fit import fit_passes
from search_e1.training.objectives.sft import Sft
from search_e1.training.trained import TrainedPolicy
from test_loop import FULL
from trained import equal, run, sample, weights

A_TOKEN, FIXED = 1000, 50_000


class Meter:
    """A pass takes ``A_TOKEN`` bytes a token (an eighth with checkpointing) beside ``FIXED``, and ``mask`` bytes a pair of
    tokens; ``size`` bytes are free."""

    def __init__(self, policy: TrainedPolicy, size: float, monkeypatch: pytest.MonkeyPatch, mask: float = 0.0) -> None:
        self.policy, self.size, self.mask, self.passes, self.tokens = policy, size, mask, 0, 0
        honest = fit._pass

        def counted(policy: TrainedPolicy, tokens: int, longest: int, taught: bool) -> None:
            self.passes, self.tokens = self.passes + 1, tokens
            if self.taken > self.size:
                raise torch.OutOfMemoryError(FULL)
            honest(policy, 8, min(longest, 5), taught)

        monkeypatch.setattr(fit, "_pass", counted)

    @property
    def a_token(self) -> float:
        return A_TOKEN / (8 if self.policy.checkpointing else 1)

    @property
    def taken(self) -> float:
        return FIXED + self.a_token * self.tokens + self.mask * self.tokens**2

    def free(self) -> int:
        return int(self.size)

    def rise(self, measured: Callable[[], None]) -> int:
        measured()
        return int(self.taken)


@pytest.fixture
def policy() -> TrainedPolicy:
    return TrainedPolicy(make_tiny_policy().model, TrainingConfig(), frozen_start=False)


def size_for(policy: TrainedPolicy, tokens: float) -> float:
    """Bytes of which ``tokens`` fit: 85% are used, and AdamW's states are 8 bytes a weight."""
    return (FIXED + A_TOKEN * tokens + 8 * sum(w.numel() for w in policy.parameters.values())) / 0.85


@pytest.mark.parametrize(
    ("fitting", "longest", "tokens", "checkpointing"),
    [
        (9000, 500, 8192, False),
        (8192.1, 8192, 8192, False),
        (1e9, 500, 65_536, False),  # no faster
        (9000, 9001, 65_536, True),  # a sequence does not fit: eight times as many do with checkpointing
    ],
)
def test_the_largest_power_of_two_that_fits(policy, monkeypatch, fitting, longest, tokens, checkpointing) -> None:
    meter = Meter(policy, size_for(policy, fitting), monkeypatch)
    before, state = copy.deepcopy(weights(policy.model)), torch.get_rng_state()
    fit_passes(policy, {"sft": [sample(0, 5, longest - 5)], "other": []}, meter)
    assert (policy.micro_batch_tokens, policy.checkpointing) == (tokens, checkpointing)
    assert all(weight.grad is None for weight in policy.parameters.values())
    assert equal(weights(policy.model), before)
    assert torch.equal(torch.get_rng_state(), state)
    passes = meter.passes
    fit_passes(policy, {"sft": [sample(0, 5, 20_000)]}, meter)
    assert meter.passes == passes  # once


def test_what_grows_with_the_square_is_found_by_a_pass_of_that_size(policy, monkeypatch) -> None:
    """Two small passes promise 16,384 tokens; one of 8,192 is as large as fits."""
    a_pair = 0.5
    size = size_for(policy, 8192 + a_pair * 8192**2 / A_TOKEN + 1)
    meter = Meter(policy, size, monkeypatch, a_pair)
    fit_passes(policy, {"sft": [sample(0, 5, 500, teacher=30)]}, meter)
    assert (policy.micro_batch_tokens, policy.checkpointing) == (8192, False)
    assert meter.passes == 5  # a first, two that are measured, 16,384 and 8,192


def test_a_measured_pass_has_the_rows_of_the_samples(policy, monkeypatch) -> None:
    seen = []

    def run(batch, loss, teacher):
        seen.append((batch, teacher))
        return [torch.ones((), requires_grad=True)]

    monkeypatch.setattr(policy, "run", run)
    fit._pass(policy, 1024, 400, taught=True)
    policy.packed = True
    fit._pass(policy, 1024, 400, taught=False)
    (padded, teacher), (packed, nobody) = seen
    assert (padded.student.input_ids.shape, padded.teacher.input_ids.shape, teacher) == ((3, 400), (3, 400), "current")
    assert (packed.student.cu_seq.tolist(), packed.student.longest, nobody) == ([0, 400, 800, 1024], 400, None)


def test_memory_that_runs_out_while_measuring_leads_to_checkpointing(policy, monkeypatch) -> None:
    meter = Meter(policy, FIXED + 0.5 * A_TOKEN * 2048, monkeypatch)
    monkeypatch.setattr(fit, "_USABLE", 1.0)
    monkeypatch.setattr(meter, "free", lambda: int(meter.size + 8 * sum(w.numel() for w in policy.parameters.values())))
    fit_passes(policy, {"sft": [sample(0, 5, 2000)]}, meter)
    assert (policy.micro_batch_tokens, policy.checkpointing) == (8192, True)


@pytest.mark.parametrize("changes", [{"micro_batch_tokens": 300}, {"micro_batch_tokens": 300, "gradient_checkpointing": False}])
def test_what_the_config_says_is_not_measured(monkeypatch, changes) -> None:
    policy = TrainedPolicy(make_tiny_policy().model, TrainingConfig(**changes), frozen_start=False)
    meter = Meter(policy, 1e9, monkeypatch)
    fit_passes(policy, {"sft": [sample(0, 5, 8)]}, meter)
    assert (meter.passes, policy.micro_batch_tokens, policy.checkpointing) == (0, 300, False)


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_the_fullest_device_decides_for_all_ranks(sharding, monkeypatch, tmp_path) -> None:
    """Ranks with room for 2,500 and 40,000 tokens measure the same passes, of which each has to make its part."""
    model = make_tiny_policy().model
    weights = sum(w.numel() for w in model.parameters())

    def fitted() -> tuple[int, bool, int]:
        policy = TrainedPolicy(model, TrainingConfig(), frozen_start=False, sharding=sharding)
        states = 8 * weights / (2 if sharding == "fsdp2" else 1)
        size = (FIXED + A_TOKEN * (2500, 40_000)[ranks.rank()] + states) / 0.85
        meter = Meter(policy, size, monkeypatch)
        fit_passes(policy, {"sft": [sample(0, 5, 500 + ranks.rank())]}, meter)
        return policy.micro_batch_tokens, policy.checkpointing, meter.passes

    assert in_ranks(2, fitted, tmp_path) == [(2048, False, 3)] * 2


def test_on_a_cpu_passes_stay_small(tmp_path) -> None:
    _, model = run(make_tiny_policy().model, [{"sft": [sample(0, 5, 8)]}], {"sft": Sft()}, tmp_path)
    assert not model.is_gradient_checkpointing
