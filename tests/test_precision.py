"""Which number type a policy computes in, and how its weights are kept while it is trained."""

import copy
import os
from pathlib import Path

import pytest
import torch

from conftest import make_tiny_policy
from search_e1.config import LoraConfig, PolicyConfig, TrainingConfig
from search_e1.stages.training_engine import _plain_weights
from search_e1.training import policy as policies
from search_e1.training.objectives.sft import Sft
from search_e1.training.policy import with_adapter
from search_e1.training.precision import compute_dtype
from search_e1.training.trained import TrainedPolicy
from test_objectives import spread
from trained import run, sample, weights


@pytest.mark.parametrize(
    ("name", "parameters", "has_bfloat16", "expected"),
    [
        ("auto", 135_000_000, True, torch.bfloat16),
        ("auto", 135_000_000, False, torch.float32),
        ("auto", 1_000_000, True, torch.float32),  # conversions would take longer than they save
        ("float32", 135_000_000, True, torch.float32),
        ("bfloat16", 1_000_000, False, torch.bfloat16),
        ("float16", 1_000_000, True, torch.float16),
    ],
)
def test_the_type_that_a_policy_computes_in(name, parameters, has_bfloat16, expected) -> None:
    assert compute_dtype(name, parameters, has_bfloat16) is expected


def test_weights_to_be_trained_are_float32_and_others_as_they_compute(tmp_path) -> None:
    make_tiny_policy().save(tmp_path)
    config = PolicyConfig(model=str(tmp_path), device="cpu", dtype="bfloat16")
    plain, master = policies.load(tmp_path, config), policies.load(tmp_path, config, master_weights=True)
    assert (plain.model.dtype, plain.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (master.model.dtype, master.dtype) == (torch.float32, torch.bfloat16)


def test_steps_that_bfloat16_would_round_away_are_kept(tmp_path) -> None:
    """At 1e-5 AdamW moves a weight of 0.02 by less than half of bfloat16's spacing there, 6e-5; ten steps add up."""

    def trained(master: bool) -> tuple[dict, dict]:
        model = make_tiny_policy().model.to(torch.float32 if master else torch.bfloat16)
        before = copy.deepcopy(weights(model))
        steps, config = [{"sft": [sample(i, 5, 8)]} for i in range(10)], TrainingConfig(master_weights=master)
        out = tmp_path / str(master)
        _, finished = run(model, steps, {"sft": Sft()}, out, config, learning_rate=1e-5, dtype=torch.bfloat16)
        return before, weights(finished)

    name = "model.layers.0.mlp.down_proj.weight"
    before, after = trained(master=True)
    assert after[name].dtype is torch.float32
    assert (after[name] != before[name]).float().mean() > 0.99
    before, after = trained(master=False)
    large = before[name].abs() > 0.01
    assert after[name].dtype is torch.bfloat16
    assert (after[name] != before[name])[large].float().mean() < 0.01


def test_what_is_sampled_from_computes_as_training_does() -> None:
    """Float32 master weights are sampled from rounded; the master weights stay."""
    model = make_tiny_policy().model
    policy = TrainedPolicy(model, TrainingConfig(), frozen_start=False, dtype=torch.bfloat16)
    with policy.sampled() as sampled:
        assert sampled.dtype is torch.bfloat16
        for name, weight in sampled.named_parameters():
            assert torch.equal(weight, model.get_parameter(name).to(torch.bfloat16))
    assert model.dtype is torch.float32


@pytest.mark.parametrize("keep", [True, False])
def test_a_rounded_copy_is_kept_in_place_where_graphs_point_to_it(keep: bool) -> None:
    model = make_tiny_policy().model
    policy = TrainedPolicy(model, TrainingConfig(), frozen_start=False, dtype=torch.bfloat16)
    with policy.sampled(keep=keep) as sampled:
        before = {name: weight.data_ptr() for name, weight in sampled.named_parameters()}
    assert sum(weight.numel() for weight in sampled.parameters()) == (model.num_parameters() if keep else 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    with policy.sampled(keep=keep) as sampled:
        for name, weight in sampled.named_parameters():
            assert torch.equal(weight, model.get_parameter(name).to(torch.bfloat16))
            assert not keep or weight.data_ptr() == before[name]


def test_adapters_over_bfloat16_are_merged_in_float32() -> None:
    model = make_tiny_policy().model.to(torch.bfloat16)
    before = {name: weight.float() for name, weight in weights(model).items()}
    adapted = spread(with_adapter(model, LoraConfig(rank=4, alpha=8)))
    layer = adapted.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    assert layer.lora_A["default"].weight.dtype is torch.float32
    change = layer.get_delta_weight("default")
    merged = TrainedPolicy(adapted, TrainingConfig(), frozen_start=False, dtype=torch.bfloat16).finish()
    found = weights(merged)["model.layers.0.mlp.down_proj.weight"]
    assert found.dtype is torch.float32
    torch.testing.assert_close(found - before["model.layers.0.mlp.down_proj.weight"], change.float(), rtol=1e-4, atol=1e-6)


def test_vllm_gets_adapters_added_and_the_base_stays_to_the_bit() -> None:
    model = make_tiny_policy().model.to(torch.bfloat16)
    adapted = spread(with_adapter(model, LoraConfig(rank=4, alpha=8)))
    expected = weights(copy.deepcopy(adapted).merge_and_unload())
    policy = TrainedPolicy(adapted, TrainingConfig(), frozen_start=False, dtype=torch.bfloat16)
    before = {name: weight.clone() for name, weight in adapted.named_parameters()}
    for _ in range(3):
        with policy.sampled() as plain:
            sent = dict(_plain_weights(plain))
    assert sent.keys() == expected.keys() - {"lm_head.weight"}  # tied to the embeddings
    for name, weight in sent.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-2, atol=1e-4)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.allclose(sent[name], before[f"base_model.model.{name.replace('.weight', '.base_layer.weight')}"], rtol=0.1)
    assert all(torch.equal(weight, before[name]) for name, weight in adapted.named_parameters())


def test_a_policy_in_bfloat16_is_loaded_with_few_compiled_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_policy().save(tmp_path)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "9")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    policies.load(str(tmp_path), PolicyConfig(model="", device="cpu", dtype="bfloat16"))
    assert (os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"]) == ("64", "9")
