"""Packed rows whose borders go to the attention: a stand-in for the kernel, over the same borders, on a CPU."""

import copy
import logging
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import make_tiny_policy
from made_pairs import gemma_policy, lfm2_policy
from search_e1.config import LoraConfig, TrainingConfig
from search_e1.training import attention, batch
from search_e1.training.batch import make_batch, pack, packs
from search_e1.training.objectives.sft import Sft
from search_e1.training.policy import with_adapter
from search_e1.training.trained import TrainedPolicy, cast_adapter_inputs
from trained import assert_near, grpo, opinionated, sample, weights

SHAPE = dict(
    vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512,
)  # fmt: skip
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 9},
    "phi3": {"sliding_window": None, "pad_token_id": 0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
}
SAMPLES = [sample(i, 3 + 2 * i, 8 + 7 * i, teacher=20 - i, advantage=(-1.0) ** i) for i in range(4)]


def stand_in(q, k, v, cu_seq, cu_seq_k, longest, longest_k, *, scale, window_size, enable_gqa):
    """What torch's kernel computes, [total, heads, width], from the same arguments, without asking what they hold."""
    assert (cu_seq is cu_seq_k, longest, cu_seq.dtype) == (True, longest_k, torch.int32)
    assert enable_gqa == (q.shape[1] != k.shape[1])
    CALLS.append((q.dtype, longest))
    place = torch.arange(len(q))
    row = torch.bucketize(place, cu_seq, right=True)
    back = place[:, None] - place
    seen = (row[:, None] == row) & (back >= 0)
    if window_size[0] >= 0:
        seen = seen & (back <= window_size[0])
    q, k, v = (states.transpose(0, 1)[None] for states in (q, k, v))
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa)
    return attended[0].transpose(0, 1)


CALLS: list[tuple[torch.dtype, int]] = []


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setattr(attention.varlen, "varlen_attn", stand_in)


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "obstacle", lambda model, dtype: None)


def family(name: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SHAPE | FAMILIES[name])
    return opinionated(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))


def gradients(model, objective, *, packed: bool, lora: bool = False, checkpointing: bool = False):
    """Of one pass over all samples: the loss and the gradients."""
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    model = with_adapter(model, LoraConfig(rank=2, dropout=0.0)) if lora else model
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    policy = TrainedPolicy(model, TrainingConfig(gradient_checkpointing=checkpointing), frozen_start=False)
    policy.packed = packed and pack(model, torch.float32)
    assert policy.packed is packed
    policy.model.train()
    whole = make_batch(SAMPLES, [[0.01] * len(s.positions) for s in SAMPLES], packed=packed)
    loss, _ = policy.run(whole, objective.loss, None)
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in policy.parameters.items()}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("any_device")
def test_gradients_are_those_of_padded_rows(name: str) -> None:
    model = family(name)
    loss, expected = gradients(model, Sft(), packed=False)
    assert not CALLS
    of_packed, found = gradients(model, Sft(), packed=True)
    assert {longest for _, longest in CALLS[-2:]} == {max(len(s.prompt_ids) + len(s.response_ids) for s in SAMPLES)}
    assert of_packed == pytest.approx(loss, rel=1e-5)
    assert_near(found, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.usefixtures("any_device")
def test_adapters_and_checkpoints_too(checkpointing: bool) -> None:
    """A layer that is computed again in the backward pass, out of all contexts, attends as it did."""
    model = family("qwen2")
    loss, expected = gradients(model, grpo(), packed=False, lora=True)
    of_packed, found = gradients(model, grpo(), packed=True, lora=True, checkpointing=checkpointing)
    assert of_packed == pytest.approx(loss, rel=1e-4, abs=1e-7)
    assert_near(found, expected, 1e-4)


@pytest.mark.usefixtures("any_device")
def test_under_autocast_the_kernel_gets_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llama")
    monkeypatch.setattr(batch, "_CLOSE", 0.2)
    assert pack(model, torch.bfloat16)
    assert {dtype for dtype, _ in CALLS} == {torch.bfloat16}
    assert model.dtype == torch.float32


@pytest.mark.usefixtures("any_device")
def test_sampling_and_what_is_saved_have_the_models_own_attention() -> None:
    model = family("qwen2")
    policy = TrainedPolicy(model, TrainingConfig(), frozen_start=False)
    assert pack(model, torch.float32)
    assert model.config._attn_implementation == attention.PACKED
    with policy.sampled() as lent:
        assert lent.config._attn_implementation == "sdpa"
        left_padded = lent(torch.tensor([[0, 5, 6]]), attention_mask=torch.tensor([[0, 1, 1]])).logits
    assert model.config._attn_implementation == attention.PACKED
    CALLS.clear()
    assert policy.finish().config._attn_implementation == "sdpa"
    again = model(torch.tensor([[0, 5, 6]]), attention_mask=torch.tensor([[0, 1, 1]])).logits
    assert torch.equal(left_padded, again)
    assert not CALLS


def test_adapters_take_halves_as_they_are_and_nothing_changes_by_a_bit() -> None:
    """bfloat16 weights under float32 adapters, as they are trained: less is kept for the backward pass."""

    def kept(cast: bool) -> tuple[int, float, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = with_adapter(family("llama").to(torch.bfloat16), LoraConfig(rank=2))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        policy = TrainedPolicy(model, TrainingConfig(), frozen_start=False, dtype=torch.bfloat16)
        with policy.sampled() as lent, torch.no_grad():
            lent(torch.tensor([[5, 6]]))  # without autocast
        if cast:
            cast_adapter_inputs(model, True)
        sizes = {}

        def pack_tensor(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        rows = make_batch(SAMPLES, [[0.01] * len(s.positions) for s in SAMPLES], packed=False)
        with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda tensor: tensor):
            loss, _ = policy.run(rows, Sft().loss, None)
        loss.backward()
        return sum(sizes.values()), loss.item(), {name: weight.grad for name, weight in policy.parameters.items()}

    (less, loss, found), (more, expected, others) = kept(False), kept(True)
    assert less < 0.95 * more
    assert loss == expected
    assert all(torch.equal(found[name], others[name]) for name in found)


@pytest.mark.usefixtures("any_device")
def test_rows_that_are_not_packed_are_rows_of_one_length() -> None:
    model = family("mistral").eval()
    samples = [sample(1, 5, 20), sample(2, 6, 30)]
    rows = make_batch(samples, [[1.0] * len(s.positions) for s in samples], packed=False).student
    with torch.no_grad():
        expected = rows.hidden(model.get_decoder())
        assert attention.attend_by_borders(model) == 9
        torch.testing.assert_close(rows.hidden(model.get_decoder()), expected, rtol=1e-4, atol=1e-5)
    assert [longest for _, longest in CALLS] == [36, 36]


# Where it cannot be.


def gemma_with_eyes():
    """Whose parts attend each in its own way."""
    text = SHAPE | FAMILIES["gemma3_text"]
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return AutoModelForCausalLM.from_config(config, attn_implementation={"text_config": "sdpa", "vision_config": "eager"})


def test_each_part_gets_its_own_attention_back_whatever_happens() -> None:
    model = gemma_with_eyes()
    before = {"": "sdpa", "text_config": {"": "sdpa"}, "vision_config": {"": "eager"}}
    assert attention.implementations(model.config) == before
    everywhere = {"": "eager", "text_config": {"": "eager"}, "vision_config": {"": "eager"}}
    with attention.attending(model, everywhere):
        assert attention.implementations(model.config) == everywhere
    assert attention.implementations(model.config) == before
    for wrong, error in ((everywhere, KeyError), (everywhere | {"vision_config": {"": "no such"}}, ValueError)):
        with pytest.raises(error), attention.attending(model, wrong):
            raise KeyError
        assert attention.implementations(model.config) == before


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("CUDA out of memory."), NotImplementedError("no kernel")], ids=str)
@pytest.mark.usefixtures("any_device")
def test_a_failed_trial_leaves_each_part_its_own_attention(failure: Exception, monkeypatch) -> None:
    def failing(*arguments, **options):
        raise failure

    monkeypatch.setattr(attention.varlen, "varlen_attn", failing)
    model = gemma_with_eyes()
    before = attention.implementations(model.config)
    fails = isinstance(failure, torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError) if fails else nullcontext():
        assert pack(model, torch.float32)
    assert attention.implementations(model.config) == before


@pytest.mark.parametrize(
    ("policy", "may", "why"),
    [
        (gemma_policy, True, "attention with softcap"),
        (lfm2_policy, False, ""),
        (make_tiny_policy, True, "it computes in float32"),
    ],
)
def test_others_are_packed_by_a_mask_and_say_why(policy, may, why, monkeypatch, caplog) -> None:
    model = policy().model
    before, kept = model.config._attn_implementation, weights(model)
    caplog.set_level(logging.INFO)
    if policy is not make_tiny_policy:
        monkeypatch.setattr(attention, "obstacle", lambda model, dtype: None)
    assert pack(model, torch.float32) is may
    records = [record for record in caplog.records if record.name.startswith("search_e1")]
    said = [record.message for record in records]
    assert said == ([f"packed rows are separated by a mask, which is slower: {why}"] if may else [])
    tried = why == "attention with softcap"  # it could have been otherwise
    assert all(record.levelno == (logging.WARNING if tried else logging.INFO) for record in records)
    assert model.config._attn_implementation == before
    assert all(torch.equal(kept[name], weight) for name, weight in weights(model).items())


@pytest.mark.usefixtures("any_device")
def test_a_kernel_that_lets_rows_see_each_other_is_found_out(monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)

    def leaking(q, k, v, cu_seq, _, *longest, **options):
        return stand_in(q, k, v, ends := cu_seq[[0, -1]], ends, *longest, **options)

    monkeypatch.setattr(attention.varlen, "varlen_attn", leaking)
    assert pack(family("llama"), torch.float32)
    assert caplog.messages[-1].endswith("its hidden states are not those of each row alone")


@pytest.mark.usefixtures("any_device")
def test_a_kernel_without_windows_is_found_out(monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)

    def windowless(*arguments, window_size, **options):
        return stand_in(*arguments, window_size=(-1, 0), **options)

    monkeypatch.setattr(attention.varlen, "varlen_attn", windowless)
    model = family("mistral")
    assert pack(model, torch.float32)
    assert caplog.messages[-1].endswith("its hidden states are not those of each row alone")
    assert packs(model)


@pytest.mark.usefixtures("any_device")
def test_a_kernel_without_a_way_back_is_found_out(monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, states):
            return states.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("FlashAttention backward for head dim > 192 requires A100/A800 or H100/H800\nmore")

    def one_way(*arguments, **options):
        return Forward.apply(stand_in(*arguments, **options))

    monkeypatch.setattr(attention.varlen, "varlen_attn", one_way)
    model = family("llama")
    assert pack(model, torch.float32)
    assert caplog.messages[-1].endswith(": FlashAttention backward for head dim > 192 requires A100/A800 or H100/H800")
    assert not attention.takes_borders(model.get_decoder())
    assert all(weight.grad is None for weight in model.parameters())


def test_obstacles() -> None:
    model = make_tiny_policy().model
    assert attention.obstacle(model, torch.float32) == "it computes in float32"
    assert attention.obstacle(model, torch.bfloat16) == "there is no such kernel for cpu"
