"""The plan of a run against what is counted by hand: work, tokens and hours, what is warned of, the checked-in configs."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from planned import a_config, cluster, tiny
from search_e1.config import DistillConfig, LoraConfig, PoolConfig, load
from search_e1.errors import ConfigError, RunError
from search_e1.lab.plan import lengths
from search_e1.lab.plan.hardware import GIB, GPUS, Cluster, gpu
from search_e1.lab.plan.memory import Memory
from search_e1.lab.plan.plan import make_plan
from search_e1.lab.plan.shapes import read_config, shape_of
from search_e1.lab.plan.warnings import setting_warnings, sharing_problem, unfit
from search_e1.lab.plan.work import Clock, Counts, Job, Rates, passed, trained
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
