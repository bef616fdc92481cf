"""The memory that is planned, against tensors that really exist and what is counted by hand."""

import gc
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from planned import H100, FewLayers, a_config, memory_model, tiny
from search_e1.config import LoraConfig
from search_e1.errors import ConfigError
from search_e1.lab.plan import check_memory
from search_e1.lab.plan.constants import GIB, Gpu
from search_e1.lab.plan.memory import training_jobs
from search_e1.lab.plan.plan import misfit
from search_e1.lab.plan.shapes import empty_model, shape_of
from search_e1.lab.plan.trace import Activations, TracedModel
from search_e1.training.policy import with_adapter
from search_e1.training.trained import cast_adapter_inputs

SIZE = shape_of(tiny()).parameters
ADAPTERS = sum(a + b for a, b in [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)])
"""Numbers of a layer's adapters of rank 1: inputs and outputs of its matrices."""


def traced(dtype: torch.dtype = torch.float32, lora: LoraConfig | None = None, recompute: bool = False) -> TracedModel:
    return TracedModel(tiny(), dtype, lora, recompute)


def train(
    model: TracedModel | FewLayers, rows: int, width: int, *, autocast: bool = False, streamed: bool = False
) -> Activations:
    return model.train(rows, width, autocast=autocast, streamed=streamed)


# Traced passes, against the same passes on real tensors.


class Kept:
    """Bytes that autograd keeps for the backward pass, each storage once, without weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        self.seen: dict[int, int] = {}

    def __enter__(self) -> "Kept":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __exit__(self, *_: object) -> None:
        self.hooks.__exit__(*_)

    @property
    def bytes(self) -> int:
        return sum(self.seen.values())


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["whole", "lora"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_traced_pass_keeps_what_a_real_one_keeps(lora: LoraConfig | None, autocast: bool) -> None:
    planned = traced(lora=lora)
    real = AutoModelForCausalLM.from_config(tiny(), dtype=torch.float32)
    model = (with_adapter(real, lora) if lora else real).train()
    cast_adapter_inputs(model, not autocast)  # as ``TrainedPolicy`` does
    gc.collect()
    with Kept(model) as kept, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        decoder = (model.get_base_model() if lora else model).get_decoder()
        hidden = decoder(input_ids=torch.zeros(3, 40, dtype=torch.long), use_cache=False).last_hidden_state
    gradients = planned.trained
    assert train(planned, 3, 40, autocast=autocast).kept - gradients == pytest.approx(kept.bytes + hidden.nbytes, rel=0.03)


def test_weights_and_gradients_are_counted_once() -> None:
    assert sum(p.numel() for p in empty_model(tiny(), torch.float32).parameters()) == SIZE
    whole = traced(torch.bfloat16)
    assert whole.weights == whole.trained == 2 * SIZE  # the head is the embedding
    apart = TracedModel(tiny(tie_word_embeddings=False), torch.bfloat16, None, False)
    assert apart.weights == 2 * (SIZE + 512 * 64)
    # All gradients are present at the end, and the embedding's twice: what it adds to the head's.
    assert train(whole, 1, 8).peak == pytest.approx(whole.trained + 2 * 512 * 64, rel=0.08)
    adapted = traced(torch.bfloat16, LoraConfig(rank=4))
    assert adapted.trained == 4 * 4 * 2 * ADAPTERS  # float32, rank 4, two layers
    assert adapted.weights == 2 * SIZE + adapted.trained


def test_memory_grows_with_rows_and_shrinks_by_checkpointing() -> None:
    plain, recomputed = traced(), traced(recompute=True)
    one, two, four = (train(plain, rows, 128).kept - plain.trained for rows in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)
    kept = train(recomputed, 4, 128).kept - plain.trained
    # The input of each layer, and the last states twice.
    assert 4 * 128 * 64 * 4 * 3 <= kept < four / 4
    assert train(plain, 2, 64, streamed=True).peak < train(plain, 2, 64).peak


def test_a_deep_model_by_few_of_its_layers_is_what_a_whole_trace_finds() -> None:
    lora = LoraConfig(rank=4)
    whole, few = (made(tiny(num_hidden_layers=5), torch.bfloat16, lora, True) for made in (TracedModel, FewLayers))
    assert (few.weights, few.trained, few.forward(2, 16)) == (whole.weights, whole.trained, whole.forward(2, 16))
    assert train(few, 2, 16, autocast=True) == train(whole, 2, 16, autocast=True)


# Stages.


def update(gpus: int = 1, stage: str = "grpo", **sections: object):
    config = a_config(**{"rollout": {"max_tokens": 64}, **sections})
    return memory_model(config, gpus).update(stage, training_jobs(config)[stage], 128)


def test_an_update_holds_weights_gradients_and_two_states_of_what_is_trained() -> None:
    memory = update()
    assert (memory.weights, memory.gradients, memory.optimizer, memory.other) == (4 * SIZE, 4 * SIZE, 8 * SIZE, 0)
    assert memory.rows == 2
    assert memory.total == memory.fixed + memory.activations + memory.logits + memory.cache
    assert update(grpo={"kl_coefficient": 0.001}).other == 4 * SIZE  # the anchor
    adapted = update(grpo={"lora": {"rank": 4}, "kl_coefficient": 0.001})
    assert adapted.other == 0  # adapters are switched off for the anchor
    assert adapted.optimizer == 2 * 4 * 4 * 2 * ADAPTERS  # two states, float32, rank 4, two layers
    assert update(stage="distill", distill={"weights": "all"}).other == 4 * SIZE  # the frozen teacher
    rounded = {"policy": {"model": "small", "dtype": "bfloat16"}}
    assert update(**rounded).other == 2 * SIZE  # the copy that is sampled from
    assert update(**rounded, rollout={"max_tokens": 64, "engine": "vllm"}).other == 0  # vLLM has its own
    assert update(**rounded, grpo={"lora": {"rank": 4}}).other == 0
    assert update(stage="distill").rows == 1  # the teacher's rows are twice as long


def test_the_loss_holds_logits_hidden_states_and_the_heads_gradient() -> None:
    config = a_config(rollout={"max_tokens": 64}, grpo={"training": {"logits_mib": 1}})
    model, job = memory_model(config), training_jobs(config)["grpo"]
    assert model._head(2, job, 4) == 6 * 128 * 512 + 128 * 64 * (4 + 2 * 4) + 4 * 512 * 64
    assert model._head(40, job, 4) == 2**20 + 40 * 64 * 64 * (4 + 2 * 4) + 4 * 512 * 64


def test_sharding_divides_states_among_ranks() -> None:
    alone, halves = update(), update(2, parallel={"sharding": "fsdp2"})
    assert (halves.weights, halves.gradients, halves.optimizer) == (
        alone.weights // 2, alone.gradients // 2, alone.optimizer // 2
    )  # fmt: skip
    layer, embedding = shape_of(tiny()).largest_layer, 512 * 64
    assert halves.other == 4 * (3 * layer + embedding)  # gathered
    assert update(2).gradients == 2 * alone.gradients  # DDP's buckets


def test_the_cache_is_rows_times_tokens_times_keys_and_values() -> None:
    config = a_config(policy={"model": "small", "dtype": "bfloat16"}, rollout={"max_tokens": 128})
    memory = memory_model(config).sample("pool, eval.", rows=8, tokens=128)
    token = 2 * 2 * 2 * 16 * 2  # layers, keys and values, groups, width, bytes
    assert memory.cache == 9 * 128 * token  # a row more, for what all prompts begin with
    few = memory_model(config, gpu=Gpu(name="few", memory_gib=0.01))
    less = few.sample("pool, eval.", rows=1000, tokens=128)
    assert less.rows == int(0.6 * (few.usable - memory.weights) / (128 * token)) - 1


def test_vllm_takes_its_share_whatever_it_needs() -> None:
    config = a_config(rollout={"engine": "vllm"}, vllm={"gpu_memory_utilization": 0.5})
    model = memory_model(config)
    memory = model.sample("pool, eval.", rows=64, tokens=4096)
    assert memory.total == pytest.approx(0.5 * H100.memory_gib * GIB, rel=1e-6)
    assert memory.rows == 64
    beside = model.sample("grpo: sample", rows=8, tokens=128, during=training_jobs(config)["grpo"])
    assert beside.total == pytest.approx(0.3 * H100.memory_gib * GIB + 12 * SIZE, rel=1e-6)
    full = beside.model_copy(update={"optimizer": 60 * GIB})
    assert misfit(model, full).endswith("change [vllm] gpu_memory_utilization")
    states = beside.model_copy(update={"optimizer": 80 * GIB})  # alone more than the GPU has
    assert misfit(model, states).endswith("train adapters ([grpo.lora]), or use a smaller policy or larger GPUs")
    none = misfit(model, beside.model_copy(update={"rows": 0}))
    assert none == "grpo: sample: no trajectory of 128 tokens fits vLLM's cache; change [vllm] gpu_memory_utilization"


# At start.


def test_at_start_what_cannot_fit_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny().save_pretrained(tmp_path)
    model = str(tmp_path / "config.json")
    sections = {"rollout": {"max_tokens": 64}, "grpo": {"training": {"micro_batch_tokens": 128}}}
    config = a_config(**sections)
    check_memory(config, model, ("grpo", "distill"), 1, 80 * GIB)
    assert not caplog.records
    weights_alone = 4 * SIZE
    with pytest.raises(ConfigError, match=r"grpo: update: needs .* GiB per GPU, .* train adapters"):
        check_memory(config, model, ("grpo",), 1, weights_alone)
    check_memory(config, model, (), 1, weights_alone)
    check_memory(config, "someone/unheard-of", ("grpo",), 1, weights_alone)  # nothing is known of it
    check_memory(a_config(parallel={"sharding": "fsdp2"}, **sections), model, ("grpo",), 4, 12 * SIZE)
    caplog.clear()
    check_memory(config, model, ("grpo",), 1, 17 * SIZE)
    assert "with the longest trajectories, grpo: update: needs" in caplog.text
    on_cpu = a_config(policy={"model": "small", "device": "cpu"}, **sections)
    check_memory(on_cpu, model, ("grpo",), 1)
