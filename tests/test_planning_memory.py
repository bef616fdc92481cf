"""The memory that is planned, against tensors that really exist and what is counted by hand."""

import gc
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from planned import a_config, cluster, tiny
from search_e1.config import LoraConfig
from search_e1.errors import ConfigError
from search_e1.lab.plan import start
from search_e1.lab.plan.dry import DryModel
from search_e1.lab.plan.hardware import GIB, Cluster, gpu
from search_e1.lab.plan.memory import Estimator, Memory, largest
from search_e1.lab.plan.shapes import empty_model, shape_of
from search_e1.lab.plan.warnings import fewer_rows, unfit
from search_e1.training.policy import with_adapter

# Dry passes, against the same passes on real tensors.


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
@pytest.mark.parametrize("masked", [False, True])
def test_a_dry_pass_keeps_what_a_real_one_keeps(lora: LoraConfig | None, masked: bool) -> None:
    dry = DryModel(tiny(), torch.float32, lora).train(3, 40, masked=masked)
    real = AutoModelForCausalLM.from_config(tiny(), dtype=torch.float32)
    model = (with_adapter(real, lora) if lora else real).train()
    ids = torch.zeros(3, 40, dtype=torch.long)
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[0, -5:] = 0  # without a gap transformers leaves the mask out
    gc.collect()
    with Kept(model) as kept:
        hidden = (
            (model.get_base_model() if lora else model)
            .get_decoder()(input_ids=ids, attention_mask=mask if masked else None, use_cache=False)
            .last_hidden_state
        )
    assert dry.kept == pytest.approx(kept.bytes + hidden.nbytes, rel=0.03)


def test_weights_and_gradients_are_counted_once() -> None:
    model = empty_model(tiny(), torch.float32)
    size = sum(p.numel() for p in model.parameters())
    dry = DryModel(tiny(), torch.bfloat16)
    assert dry.weights == dry.trained == 2 * size  # the head is the embedding
    apart = DryModel(tiny(tie_word_embeddings=False), torch.bfloat16)
    assert apart.weights == 2 * (size + 512 * 64)
    # All gradients are there at the end, and the embedding's twice: what it adds to the head's.
    assert dry.train(1, 8, masked=False).peak == pytest.approx(dry.trained + 2 * 512 * 64, rel=0.05)
    adapted = DryModel(tiny(), torch.bfloat16, LoraConfig(rank=4))
    inputs_and_outputs = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    assert adapted.trained == 4 * 4 * 2 * sum(a + b for a, b in inputs_and_outputs)  # float32, rank 4, two layers
    assert adapted.weights == 2 * size + adapted.trained


def test_memory_grows_with_rows_and_shrinks_by_checkpointing() -> None:
    plain, checkpointed = DryModel(tiny(), torch.float32), DryModel(tiny(), torch.float32, checkpointing=True)
    one, two, four = (plain.train(rows, 128, masked=True).kept for rows in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)
    kept = checkpointed.train(4, 128, masked=True).kept
    # The input of each layer, the last states twice, and what rotary embeddings and the mask take.
    assert kept < four / 4
    assert kept >= 4 * 128 * 64 * 4 * 3


def test_gradients_that_were_there_before_are_in_it() -> None:
    dry = DryModel(tiny(), torch.float32)
    first, second = (dry.train(2, 64, masked=True, accumulated=there) for there in (False, True))
    assert second.kept - first.kept == dry.trained
    streamed = dry.train(2, 64, masked=True, streamed=True)
    assert streamed.peak < first.peak


def test_rows_end_to_end_share_a_mask_of_all_by_all() -> None:
    dry = DryModel(tiny(), torch.bfloat16)
    apart, packed = (dry.train(4, 256, masked=True, packed=end_to_end).kept for end_to_end in (False, True))
    # Both layers keep the mask as numbers, and the mask itself is there once.
    assert packed - apart == pytest.approx((4 * 4 - 4) * 256 * 256 * (2 * 2 + 1), rel=0.05)


# Stages.


def test_states_take_what_the_trainers_keep() -> None:
    config = a_config(policy={"model": "small", "dtype": "float32"}, rollout={"max_tokens": 64, "batch_size": 4})
    size = sum(p.numel() for p in empty_model(tiny(), torch.float32).parameters())
    estimator = Estimator(tiny(), shape_of(tiny()), config, cluster())
    update = estimator.update(2, 2)
    assert (update.weights, update.optimiser) == (4 * size, 8 * size)
    assert update.total == sum(
        (
            update.weights,
            update.gradients,
            update.optimiser,
            update.others,
            update.activations,
            update.logits,
            update.cache,
        )
    )
    with_kl = a_config(grpo={"trainer": {"beta": 0.001}}, rollout={"max_tokens": 64})
    anchored = Estimator(tiny(), shape_of(tiny()), with_kl, cluster()).update(2, 2)
    assert anchored.others == 4 * size
    lora = a_config(grpo={"lora": {"rank": 4}, "trainer": {"beta": 0.001}}, rollout={"max_tokens": 64})
    adapted = Estimator(tiny(), shape_of(tiny()), lora, cluster()).update(2, 2)
    assert adapted.others == 0  # the adapters are switched off for the anchor
    assert adapted.optimiser == 2 * 4 * 4 * 2 * 1024  # two states, float32, rank 4, two layers, inputs and outputs


def test_sharding_divides_states_among_ranks() -> None:
    config = a_config(rollout={"max_tokens": 64})
    alone = Estimator(tiny(), shape_of(tiny()), config, cluster()).update(2, 2)
    halves = Estimator(tiny(), shape_of(tiny()), config, cluster(gpus=2, sharding="full")).update(2, 2)
    assert (halves.weights, halves.optimiser) == (alone.weights // 2, alone.optimiser // 2)
    assert halves.others > 0  # layers that are gathered
    zero2 = Estimator(tiny(), shape_of(tiny()), config, cluster(gpus=2, sharding="optimizer")).update(2, 2)
    assert (zero2.weights, zero2.optimiser) == (alone.weights, alone.optimiser // 2)
    copies = Estimator(tiny(), shape_of(tiny()), config, cluster(gpus=2)).update(2, 2)
    assert copies.gradients == 2 * alone.gradients  # DDP's buckets


def test_the_cache_is_rows_times_tokens_times_keys_and_values() -> None:
    config = a_config(policy={"model": "small", "dtype": "bfloat16"}, rollout={"max_tokens": 128})
    memory = Estimator(tiny(), shape_of(tiny()), config, cluster()).sample("pool", rows=8, tokens=128)
    token = 2 * 2 * 2 * 16 * 2  # layers, keys and values, groups, width, bytes
    assert memory.cache == 9 * 128 * token  # a slot more, for what all prompts begin with
    few = Cluster(gpu=gpu(memory_gib=0.01, tflops=1, gb_per_second=1))
    free = few.room - memory.weights
    less = Estimator(tiny(), shape_of(tiny()), config, few).sample("pool", rows=1000, tokens=128)
    assert less.rows == int(0.6 * free / (128 * token)) - 1
    assert fewer_rows([less], a_config(rollout={"batch_size": 1000}))[0].startswith(
        f"pool: {less.rows} trajectories of 128"
    )
    assert fewer_rows([memory], config) == []


def test_vllm_takes_its_share_whatever_it_needs() -> None:
    estimator = Estimator(tiny(), shape_of(tiny()), a_config(), cluster(engine="vllm", gpu_memory_utilization=0.5))
    memory = estimator.sample("pool", rows=64, tokens=4096)
    assert memory.total == pytest.approx(0.5 * 79.1 * GIB, rel=1e-6)
    assert memory.rows == 64


def test_the_largest_rows_are_tried() -> None:
    def measured(rows: int) -> Memory:
        return Memory(stage="x", rows=rows, tokens=1, activations=100 + rows * rows)

    assert largest(measured, [1, 2, 4, 8, 16], 164) == 8
    assert largest(measured, [1, 2, 4, 8, 16], 163) == 4
    assert largest(measured, [1], 200) == 1
    assert largest(measured, [1, 2], 100) == 0


# What does not fit.


def test_vllm_beside_training_states() -> None:
    estimator = Estimator(tiny(), shape_of(tiny()), a_config(), cluster(engine="vllm"))
    memory = estimator.sample("grpo sampling", rows=8, tokens=128, during="training")
    beside = memory.model_copy(update={"weights": 12 * GIB, "optimiser": 24 * GIB})
    assert "lower gpu_memory_utilization to 0.4" in (unfit(beside, cluster(engine="vllm")) or "")
    assert "hold" in (unfit(memory.model_copy(update={"rows": 0}), cluster(engine="vllm")) or "")


def test_at_start_what_cannot_fit_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny().save_pretrained(tmp_path)
    model, size = str(tmp_path / "config.json"), shape_of(tiny()).parameters
    config = a_config(grpo={"questions_per_step": 4, "group_size": 2}, rollout={"max_tokens": 64, "batch_size": 4})
    start.check_memory(config, model, start.Device(memory=80 * GIB, ranks=1), ("grpo", "distill"))
    assert not caplog.records
    tight = start.Device(memory=4 * size, ranks=1)  # the weights alone
    with pytest.raises(ConfigError, match=r"grpo update: needs .* GiB a rank .* train adapters"):
        start.check_memory(config, model, tight, ("grpo",))
    start.check_memory(config, model, tight, ())
    start.check_memory(config, "someone/unheard-of", tight, ("grpo",))  # not loaded yet: nothing is known of it
    start.check_memory(config, model, start.Device(memory=20 * size, ranks=1), ("grpo",))
    start.check_memory(config, model, start.Device(memory=14 * size, ranks=2, sharding="full"), ("grpo",))
    assert "with the longest trajectories, grpo update: needs" in caplog.text
    assert start.cuda_device(torch.device("cpu"), 8, "fsdp2") is None
