"""The CUDA paths, against the same on a CPU: `pytest -m gpu`. Without a GPU all of these are skipped."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import make_tiny_policy
from scripted import generate
from search_e1.config import DistillConfig, LoraConfig, TrainingConfig
from search_e1.rollout.engines.torch import PlainEngine, TorchEngine
from search_e1.training import attention
from search_e1.training.batch import make_batch
from search_e1.training.divergence import fused_divergence
from search_e1.training.fit import fit_passes
from search_e1.training.head import Head
from search_e1.training.logprobs import fused_token_loss
from search_e1.training.objectives.self_distillation import SelfDistillation
from search_e1.training.objectives.sft import Sft
from search_e1.training.policy import with_adapter
from search_e1.training.trained import TrainedPolicy
from trained import assert_near, grpo, opinionated, run, sample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
HALF = torch.bfloat16
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "mistral": {"sliding_window": 40},
    "gemma3_text": {"head_dim": 64, "sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]},
}
SAMPLES = [sample(i, 20 + i, 100 + 70 * i, teacher=60, advantage=(-1.0) ** i) for i in range(4)]


def family(name: str):
    shape = dict(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape | FAMILIES[name]))


@contextmanager
def no_waits() -> Iterator[None]:
    """Whatever waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gradients(model, objective, device: str, *, packed: bool, dtype=HALF, lora: bool = False, checkpointing: bool = False):
    model = copy.deepcopy(model)
    if lora:
        torch.manual_seed(0)
        model = with_adapter(model, LoraConfig(rank=4, dropout=0.0))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
    model = model.to(device)
    config = TrainingConfig(gradient_checkpointing=checkpointing)
    policy = TrainedPolicy(model, config, frozen_start=objective.needs_start, dtype=dtype)
    assert not packed or attention.takes_borders(policy._roles.decoder)
    policy.model.train()
    weights = [[1 / 300] * len(s.positions) for s in SAMPLES]
    batch = make_batch(SAMPLES, weights, packed=packed)
    for attempt in (1, 2):  # what is loaded or compiled at the first call may wait
        with no_waits() if device == "cuda" and attempt == 2 else nullcontext():
            loss, _figures = policy.run(batch, objective.loss, objective.teacher)
            loss.backward()
        found = {name: weight.grad.float().cpu() for name, weight in policy.parameters.items() if weight.grad is not None}
        policy.model.zero_grad()
    return loss.item(), found


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_have_the_gradients_of_padded_ones_on_a_cpu(name: str) -> None:
    model = family(name)
    loss, expected = gradients(model, Sft(), "cpu", packed=False, dtype=torch.float32)
    on_gpu, found = gradients(model, Sft(), "cuda", packed=True)
    assert on_gpu == pytest.approx(loss, rel=5e-3)
    assert_near(found, expected, 0.05)


@pytest.mark.parametrize("objective", [grpo(), SelfDistillation(DistillConfig())], ids=["grpo", "distill"])
@pytest.mark.parametrize(("lora", "checkpointing"), [(False, False), (True, False), (True, True)])
def test_objectives_wait_for_nothing_and_have_a_cpus_gradients(objective, lora: bool, checkpointing: bool) -> None:
    model = opinionated(family("qwen2"), 1.5)
    loss, expected = gradients(model, objective, "cpu", packed=False, dtype=torch.float32, lora=lora)
    on_gpu, found = gradients(model, objective, "cuda", packed=True, lora=lora, checkpointing=checkpointing)
    assert on_gpu == pytest.approx(loss, rel=0.05, abs=1e-3)
    assert_near(found, expected, 0.1)


@pytest.mark.parametrize("vocabulary", [1000, 151_936])
def test_the_fused_passes_are_those_of_float64(vocabulary: int) -> None:
    draw = torch.Generator().manual_seed(0)
    student, noise = (torch.randn(40, 64, generator=draw).to(HALF) for _ in range(2))
    weight = (torch.randn(vocabulary, 64, generator=draw) * 0.3).to(HALF)
    targets = torch.randint(vocabulary, (40,), generator=draw)
    teacher = student + 0.3 * noise

    def both(device: str, dtype: torch.dtype):
        out = []
        head = Head(weight.to(device, dtype))
        for loss in (
            lambda h: fused_divergence(h, teacher.to(device, dtype), head, tau=10.0)[0],
            lambda h: fused_token_loss(h, targets.to(device), head)[0],
        ):
            leaf = student.detach().to(device, dtype, copy=True).requires_grad_()
            value = loss(leaf)
            value.backward()
            out.append((value.item(), leaf.grad.double().cpu()))
        return out

    for (value, gradient), (expected, exact) in zip(both("cuda", HALF), both("cpu", torch.float64), strict=True):
        assert value == pytest.approx(expected, rel=1e-4)
        assert (gradient - exact).norm() < 1e-2 * exact.norm()


def test_training_in_float32_follows_a_cpus(tmp_path) -> None:
    """By the mask: the kernel has no float32. Products in TF32 are off by default."""
    steps = [{"sft": SAMPLES}] * 3
    on_cpu, _ = run(make_tiny_policy().model, steps, {"sft": Sft()}, tmp_path / "cpu")
    on_gpu, _ = run(make_tiny_policy().model.cuda(), steps, {"sft": Sft()}, tmp_path / "gpu")
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)


def test_the_size_of_a_pass_is_measured() -> None:
    policy = TrainedPolicy(family("qwen2").cuda(), TrainingConfig(), frozen_start=False, dtype=HALF)
    before = torch.cuda.memory_allocated()
    fit_passes(policy, {"sft": SAMPLES})
    assert policy.fitted
    assert policy.micro_batch_tokens >= 8192
    assert torch.cuda.memory_allocated() < before + 2**26


@pytest.mark.parametrize("name", FAMILIES)
def test_the_engine_samples_what_generate_does(name: str) -> None:
    model, tokenizer = family(name).cuda().eval(), make_tiny_policy().tokenizer
    prompts = [s.prompt_ids + s.response_ids[: 30 * i] for i, s in enumerate(SAMPLES)]
    made = [
        [g.ids for g in generate(engine, prompts, max_new_tokens=20, temperature=0.0, stop=())]
        for engine in (TorchEngine(model, tokenizer, batch_size=4), PlainEngine(model, tokenizer, batch_size=4))
    ]
    assert made[0] == made[1]
