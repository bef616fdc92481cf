"""Optimizers against torch's own, and the schedule of the learning rate by hand."""

import copy
import math

import pytest
import torch

from conftest import make_tiny_policy
from search_e1.config import LoraConfig, TrainingConfig
from search_e1.training.checkpoint import _load_optimizer
from search_e1.training.optimizer import Muon, make_optimizers, rate
from search_e1.training.policy import with_adapter


def rates(steps=8, **config):
    return [round(rate(step, steps, TrainingConfig(**config)), 6) for step in range(steps)]


def test_schedules_by_hand():
    assert rates() == [1.0] * 8
    assert rates(schedule="linear") == [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rates(4, schedule="cosine") == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2], abs=1e-6)
    assert rates(warmup=0.5) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert rates(warmup=0.5, schedule="linear") == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]
    assert rates(2, warmup=1.0) == [0.5, 1.0]
    assert rates(1, warmup=0.285) == [1.0]


def test_adamw_is_torchs_and_decays_matrices_alone():
    ours, theirs = make_tiny_policy().model, make_tiny_policy().model
    config = TrainingConfig(betas=(0.8, 0.95), weight_decay=0.3)
    (optimizer,) = make_optimizers(ours, config, 1e-2)
    shared = dict(lr=1e-2, betas=(0.8, 0.95), fused=False)
    others = [
        torch.optim.AdamW([w for w in theirs.parameters() if w.ndim == 2], weight_decay=0.3, **shared),
        torch.optim.AdamW([w for w in theirs.parameters() if w.ndim == 1], weight_decay=0.0, **shared),
    ]
    torch.manual_seed(0)
    for _ in range(3):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.step()
        for other in others:
            other.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_muon_is_torchs_but_for_its_precision(decay):
    torch.manual_seed(0)
    for shape in ((24, 48), (48, 24), (32, 32)):
        start = torch.randn(shape)
        ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
        optimizers = (
            Muon([ours], {"lr": 0.1, "weight_decay": decay}),
            torch.optim.Muon([theirs], lr=0.1, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        )
        for _ in range(3):
            gradient = torch.randn(shape)
            for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
                parameter.grad = gradient.clone()
                optimizer.step()
        assert (ours - theirs).norm() < 0.03 * (theirs - start).norm()  # bfloat16 has 8 bits


def names_of(model, optimizer):
    names = {id(weight): name for name, weight in model.named_parameters()}
    return {names[id(weight)] for group in optimizer.param_groups for weight in group["params"]}


def test_muons_momentum_stays_float32_in_a_checkpoint_of_bfloat16_weights():
    weight = torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16())
    weight.grad = torch.full_like(weight, 0.3)
    before, after = (Muon([weight], {"lr": 0.1, "weight_decay": 0.0}) for _ in range(2))
    before.step()
    _load_optimizer(after, copy.deepcopy(before.state_dict()))
    assert after.state[weight]["momentum"].dtype is torch.float32
    assert torch.equal(after.state[weight]["momentum"], before.state[weight]["momentum"])
    after.step()


def test_muon_takes_the_matrices_inside_the_layers_and_adamw_the_rest():
    model = make_tiny_policy().model
    muon, adamw = make_optimizers(model, TrainingConfig(optimizer="muon"), 1e-2)
    assert names_of(model, muon) == {n for n, w in model.named_parameters() if w.ndim == 2 and "layers" in n}
    assert names_of(model, adamw) == {n for n, w in model.named_parameters() if w.ndim == 1 or "embed" in n}
    assert type(muon) is Muon
    adapted = with_adapter(copy.deepcopy(model), LoraConfig(rank=2))
    (only,) = make_optimizers(adapted, TrainingConfig(optimizer="muon"), 1e-2)
    assert names_of(adapted, only) == {n for n, w in adapted.named_parameters() if "lora_" in n}


def test_what_is_frozen_is_in_no_optimizer():
    adapted = with_adapter(make_tiny_policy().model, LoraConfig(rank=2))
    (adamw,) = make_optimizers(adapted, TrainingConfig(), 1e-2)
    assert names_of(adapted, adamw) == {n for n, w in adapted.named_parameters() if "lora_" in n}
