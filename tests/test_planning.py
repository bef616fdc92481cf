"""The plan against numbers that are published, counted by hand, or taken off tensors that really exist."""

import gc
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from search_e1.config import Config, DistillConfig, LoraConfig, PoolConfig, load
from search_e1.errors import ConfigError, ModelError, RunError
from search_e1.planning import lengths, start
from search_e1.planning.dry import DryModel
from search_e1.planning.hardware import GIB, GPUS, Cluster, gpu
from search_e1.planning.memory import Estimator, Memory, largest
from search_e1.planning.plan import make_plan
from search_e1.planning.shapes import SHAPES, empty_model, read_config, shape_of
from search_e1.planning.warnings import fewer_rows, setting_warnings, sharing_problem, unfit
from search_e1.planning.work import Clock, Counts, Job, Rates, passed, trained
from search_e1.policy import with_adapter
from search_e1.types import ActionKind, Group, Question, StopReason, Trajectory, Turn

CONFIGS = Path(__file__).parent.parent / "configs"
PLANNED = {  # checked-in config -> GPUs, and the kind it is made for
    "search-e1-3b": (8, "h100-80gb"),
    "search-e1-3b-1gpu": (1, "h100-80gb"),
    "search-e1-7b": (8, "h100-80gb"),
    "search-e1-7b-2nodes": (16, "h100-80gb"),
    "search-r1-3b": (8, "h100-80gb"),
    "qwen3-4b-tools": (8, "h100-80gb"),
    "search-e1-1.5b-24gb": (1, "4090-24gb"),
}
TINY = dict(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096,
)  # fmt: skip


def tiny(**changes: object):
    return AutoConfig.for_model("qwen2", **{**TINY, "tie_word_embeddings": True, **changes})


def a_config(**sections: object) -> Config:
    base = {
        "run": "unused",
        "policy": {"model": "small"},
        "data": {"corpus": "none.jsonl", "train": ["none.jsonl"], "eval": {"nq": "none.jsonl"}},
    }
    return Config.model_validate({**base, **sections})


def cluster(**changes: object) -> Cluster:
    return Cluster(gpu=GPUS["h100-80gb"], **changes)


# Shapes.


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-4b", 4_022_468_096),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3.1-8b", 8_030_261_248),
    ],
)
def test_known_shapes_have_the_published_number_of_weights(name: str, parameters: int) -> None:
    assert shape_of(read_config(name)).parameters == parameters


def test_a_shape_is_counted_as_by_hand() -> None:
    shape = shape_of(read_config("qwen2.5-3b"))
    assert shape.embedding == shape.head == 151_936 * 2048
    assert shape.tied
    # Queries and output 2048 x 2048, keys and values 2048 x 256, three matrices of the MLP.
    assert shape.active == 36 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 11_008)
    assert shape.cached == 36 * 2 * 2 * 128  # layers, keys and values, groups, width of a head
    assert shape.attention_width == 36 * 16 * 128
    apart = shape_of(read_config("qwen2.5-7b"))
    assert not apart.tied
    assert apart.parameters - apart.active > 2 * apart.head


def test_of_experts_only_those_that_a_token_passes_count() -> None:
    dense = dict(TINY, head_dim=16, tie_word_embeddings=False)
    experts = dict(
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1, mlp_only_layers=[]
    )
    shape = shape_of(AutoConfig.for_model("qwen3_moe", **dense, **experts))
    attention = 64 * 64 * 2 + 64 * 32 * 2
    router, expert = 64 * 8, 3 * 64 * 32
    assert shape.active == 2 * (attention + router + 2 * expert)


@pytest.mark.parametrize(
    ("model", "like"),
    [
        ("Qwen/Qwen2.5-3B-Instruct", "qwen2.5-3b"),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3-4b"),
        ("qwen2.5-7b", "qwen2.5-7b"),
    ],
)
def test_a_hub_id_has_the_shape_that_it_begins_with(model: str, like: str) -> None:
    assert read_config(model).to_dict() == AutoConfig.for_model(**SHAPES[like]).to_dict()


def test_a_config_json_or_a_directory_is_enough(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    for model in (tmp_path / "config.json",):
        assert shape_of(read_config(str(model))) == shape_of(tiny())
    assert shape_of(read_config("small")).parameters == 568_400


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("someone/unheard-of", "neither here nor a shape that is known without the network; give the directory"),
        ("qwen2.5-33b", "neither here nor a shape"),
    ],
)
def test_an_unknown_model_is_refused(model: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        read_config(model)


@pytest.mark.parametrize("text", ["{", "[]", '{"no": "type"}', '{"model_type": "unheard_of"}'])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=r"not the config\.json of a model"):
        read_config(str(path))


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


# Work.


def test_operations_are_those_of_the_formula() -> None:
    shape = shape_of(tiny())
    forward = 10 * (2 * shape.active + 2 * shape.attention_width * 100)
    assert passed(shape, 10, 100) == forward
    whole = Job(None, False, False, "adamw_torch")
    assert trained(shape, 10, 100, 0, whole) == 3 * forward
    assert trained(shape, 10, 100, 5, whole) - 3 * forward == 3 * 2 * shape.head * 5
    adapters = whole._replace(lora=LoraConfig())
    assert trained(shape, 10, 100, 0, adapters) == 10 * (4 * shape.active + 6 * shape.attention_width * 100)
    assert trained(shape, 10, 100, 0, whole._replace(checkpointing=True)) == 4 * forward


def test_tokens_are_trajectories_times_lengths() -> None:
    config = a_config(
        rounds=2, grpo={"steps": 10, "questions_per_step": 4, "group_size": 5}, pool={"questions": 100, "group_size": 8}
    )
    known = lengths.Lengths(
        prompt=100,
        turns=3,
        action=50,
        longest_action=100,
        observation=200,
        reference=600,
        pair_yield=0.5,
        source="made",
    )
    assert (known.sampled, known.response, known.total) == (150, 550, 650)
    work = {
        w.stage: w for w in Clock(shape_of(tiny()), config, cluster(), known, Counts(1000, 50), Rates(), 64).stages()
    }
    assert work["grpo"].trajectories == 2 * 10 * 20
    assert work["grpo"].read == 400 * (100 + 2 * 200)  # prompts and observations
    assert (work["grpo"].sampled, work["grpo"].trained) == (400 * 150, 400 * 650)
    assert work["pool"].trajectories == 2 * 800
    assert work["evaluation"].trajectories == 5 * 50 * 2
    assert (
        work["lead"].trajectories == 2 * 4 * 12.5 * 2
    )  # a quarter of 50 pairs is held out; two prompts, two kinds of start
    assert work["distillation"].trained == 2 * (50 - 12.5) * 650
    assert work["distillation"].read == 2 * (50 - 12.5) * 1250
    changes = {"distill": DistillConfig(objective="sft", epochs=3), "pool": PoolConfig(source="grpo", questions=100)}
    config = config.model_copy(update=changes)
    work = {
        w.stage: w for w in Clock(shape_of(tiny()), config, cluster(), known, Counts(1000, 50), Rates(), 64).stages()
    }
    assert not {"lead", "pool"} & set(work)  # nobody teaches, and GRPO's groups are there
    assert (work["distillation"].read, work["distillation"].trained) == (0, 2 * 3 * (50 - 12.5) * 650)


def test_more_gpus_take_less_time_and_a_step_of_sampling_never_less_than_its_layers() -> None:
    shape, config = shape_of(read_config("qwen2.5-3b")), a_config(policy={"model": "small", "dtype": "bfloat16"})
    known = lengths.assumed(config)
    one, eight = (
        Clock(shape, config, cluster(gpus=n), known, Counts(1000, 1000), Rates(), 64).stages() for n in (1, 8)
    )
    assert sum(w.hours for w in one) / 8 <= sum(w.hours for w in eight) < sum(w.hours for w in one) / 2
    # Five evaluations of 2,000 trajectories, 64 together, three actions of 100 tokens each, 36 layers.
    assert one[0].hours * 3600 >= 5 * 2000 / 64 * 300 * 36 * 0.6e-3


def test_lengths_are_measured_in_a_run(tmp_path: Path) -> None:
    def trajectory(*actions: int, right: bool) -> Trajectory:
        *searches, last = actions
        turns = [
            Turn(action_ids=(1,) * n, action_text="a", kind=ActionKind.SEARCH, argument="q", observation_ids=(2,) * 30)
            for n in searches
        ]
        turns.append(Turn(action_ids=(1,) * last, action_text="a", kind=ActionKind.ANSWER, argument="x"))
        return Trajectory(
            question_id="q", prompt_ids=(3,) * 20, turns=tuple(turns), stop_reason=StopReason.ANSWERED, answer="x",
            reward=float(right),
        )  # fmt: skip

    group = Group(
        question=Question(id="q", text="who", answers=("x",)),
        trajectories=(trajectory(10, 20, right=True), trajectory(12, right=False)),
    )
    (tmp_path / "pool-2").mkdir()
    (tmp_path / "pool-2" / "groups.jsonl").write_text(2 * (group.model_dump_json() + "\n"))
    found = lengths.measured(tmp_path, a_config())
    assert (found.prompt, found.turns, found.action, found.longest_action) == (20, 1.5, 14, 20)
    assert (found.observation, found.reference, found.pair_yield) == (30, 60 + 120, 1)
    assert found.source == f"measured: 4 trajectories of {tmp_path / 'pool-2'}"


def test_a_run_without_a_pool_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no pool in it"):
        lengths.measured(tmp_path, a_config())
    with pytest.raises(RunError, match="no such directory"):
        lengths.measured(tmp_path / "none", a_config())


# What goes wrong.


def test_a_number_of_gpus_that_does_not_divide_names_those_that_do() -> None:
    assert sharing_problem(320, 8) is None
    assert sharing_problem(320, 7) == "320 do not divide among 7 GPUs; 1, 2, 4, 5, 8, 10, 16, 20 GPUs would do"


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"policy": {"model": "small", "dtype": "bfloat16"}}, "steps of 1e-06 round away"),
        ({"policy": {"model": "small", "dtype": "float16"}}, "grpo trains in float16"),
        ({}, "grpo computes in float32"),
        ({"rollout": {"max_tokens": 8192}}, "rollout.max_tokens = 8192 is more than the policy's context of 4096"),
        ({"rollout": {"max_tokens": 3000}}, "a reference and a student of 3000 tokens each do not fit"),
        ({"distill": {"batch_size": 6}}, "distill.batch_size: 6 do not divide among 4 GPUs"),
        (
            {"distill": {"batch_size": 16, "trainer": {"per_device_train_batch_size": 3}}},
            "distill.trainer.per_device_train_batch_size = 3 does not divide the 4 pairs of a rank; use 2",
        ),
        ({"grpo": {"trainer": {"per_device_train_batch_size": 7}}}, "7 does not divide the 80 trajectories"),
        ({"grpo": {"questions_per_step": 9}}, "grpo.questions_per_step x grpo.group_size: 45 do not divide"),
        ({"grpo": {"questions_per_step": 2000}}, "but there are 1000 training questions"),
    ],
)
def test_settings_that_defeat_their_purpose_are_told(sections: dict, says: str) -> None:
    found = setting_warnings(a_config(**sections), shape_of(tiny()), cluster(gpus=4), Counts(1000, 10))
    assert any(says in warning for warning in found), found
    assert all("\n" not in warning for warning in found)


@pytest.mark.parametrize(
    ("memory", "gpus", "says"),
    [
        (
            dict(weights=70, optimiser=140, stage="grpo update"),
            8,
            'shard the weights (launch.sharding = "fsdp2"), train adapters',
        ),
        (
            dict(weights=70, optimiser=140, stage="distillation"),
            1,
            'set distill.weights = "lora", or use a smaller policy',
        ),
        (
            dict(activations=100, most_rows=0, stage="grpo update", knob="grpo.trainer.per_device_train_batch_size"),
            1,
            "set grpo.trainer.gradient_checkpointing = true, lower rollout.max_tokens",
        ),
        (
            dict(activations=100, most_rows=4, stage="grpo update", knob="grpo.trainer.per_device_train_batch_size"),
            1,
            "per_device_train_batch_size is 8: set it to 4",
        ),
        (dict(cache=100, stage="pool, evaluation", knob="rollout.batch_size"), 1, "lower rollout.batch_size = 8"),
        (dict(weights=10, stage="pool, evaluation", knob="rollout.batch_size"), 1, None),
    ],
)
def test_what_does_not_fit_says_what_to_change(memory: dict, gpus: int, says: str | None) -> None:
    sized = {
        key: value * GIB if isinstance(value, int) and key != "most_rows" else value for key, value in memory.items()
    }
    problem = unfit(Memory(rows=8, tokens=4096, **sized), cluster(gpus=gpus))
    assert problem is None if says is None else says in (problem or "")


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


# GPUs.


def test_gpus_by_name_and_by_figures() -> None:
    assert gpu("H100") == gpu("h100-80gb") == GPUS["h100-80gb"]
    assert gpu("a100-80gb", memory_gib=40).memory_gib == 40
    assert gpu(memory_gib=48, tflops=200, gb_per_second=900).tflops == 200
    for wrong, says in (
        (dict(name="h1000"), "did you mean"),
        (dict(memory_gib=48), "--tflops, --bandwidth as well"),
        (dict(name="h100", memory_gib=-1), "--memory -1: must be greater than 0"),
    ):
        with pytest.raises(ConfigError, match=says):
            gpu(**wrong)
    with pytest.raises(ValidationError):
        Cluster(gpu=GPUS["h100-80gb"], gpus=0)


# Checked-in configs.


@pytest.mark.parametrize("name", PLANNED)
def test_the_checked_in_configs_contradict_nothing(name: str) -> None:
    config = load(CONFIGS / f"{name}.toml")
    gpus, kind = PLANNED[name]
    assert config.launch.sharding == ("fsdp2" if gpus > 1 else "none")
    used = Cluster(gpu=GPUS[kind], gpus=gpus, sharding="full" if gpus > 1 else "none")
    shape = shape_of(read_config(config.policy.model))
    assert setting_warnings(config, shape, used, Counts(169_615, 51_713)) == []
    assert config.grpo.group_size == 5
    protocol = (
        config.rollout.max_searches,
        config.rollout.topk,
        config.rollout.max_action_tokens,
        config.rollout.max_tokens,
    )
    assert protocol == (4, 3, 500, 4096) or name == "search-e1-1.5b-24gb"
    assert f"--gpus {gpus}" in (CONFIGS / f"{name}.toml").read_text() or gpus == 1


def test_a_run_that_never_distils_plans_no_distillation(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    flags = ["--policy.model", str(tmp_path / "config.json"), "--ofsd", "never", "--rollout.max_tokens", "64"]
    plan = make_plan(load(CONFIGS / "quickstart.toml", flags), cluster(), passages=4735)
    assert [memory.stage for memory in plan.memory] == ["grpo sampling", "grpo update", "pool, evaluation"]
    assert {work.stage for work in plan.work} == {"evaluation", "grpo"}
    assert not any("distill" in warning for warning in plan.warnings)


def test_a_plan_of_the_quickstart(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    config = load(
        CONFIGS / "quickstart.toml", ["--policy.model", str(tmp_path / "config.json"), "--rollout.max_tokens", "64"]
    )
    plan = make_plan(config, cluster(), passages=4735)
    assert [m.stage for m in plan.memory] == [
        "grpo sampling",
        "grpo update",
        "pool, evaluation",
        "lead",
        "distillation",
    ]
    assert plan.fits
    assert [w.stage for w in plan.work] == ["evaluation", "grpo", "pool", "lead", "distillation"]
    assert plan.hours == sum(w.hours for w in plan.work)
    update = next(m for m in plan.memory if m.stage == "grpo update")
    assert (update.rows, update.tokens, update.most_rows) == (16, 64, 96)
    assert plan.storage[-1].disk == 4735 * (430 + 700)
    small = Cluster(gpu=gpu(memory_gib=0.01, tflops=1, gb_per_second=1))
    assert not make_plan(config, small, largest_rows=False).fits
