"""Several processes make what one would: the same trajectories to the bit, the same weights but for rounding."""

import copy
import importlib.util
import json
import signal
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import PASSAGES, TinyRetriever
from ranked import in_ranks
from search_e1.config import (
    DistillConfig,
    EvaluationConfig,
    GrpoConfig,
    LeadConfig,
    LoraConfig,
    PoolConfig,
    ReplayConfig,
    Sharding,
)
from search_e1.distill import trainer as distill
from search_e1.distill.arguments import micro_batch
from search_e1.errors import ConfigError
from search_e1.evaluation.evaluate import evaluate
from search_e1.grpo import batching
from search_e1.grpo import trainer as grpo
from search_e1.rollout import chunks, pool
from search_e1.rollout.engines.torch import HFGenerator
from search_e1.runs import ranks
from search_e1.runs.checkpoints import Work
from search_e1.runs.stopping import Stopped
from search_e1.selfdistill import lead as teacher
from search_e1.training import sharding
from search_e1.training.policy import Policy
from search_e1.types import Pair
from taught import LIMITS, QUESTIONS, teach
from test_distill import pairs_of

SMALL = LIMITS.model_copy(update={"batch_size": 4})


@pytest.fixture(scope="module")
def taught() -> Policy:
    return teach()


@pytest.fixture(scope="module")
def pairs(taught) -> list[Pair]:
    """Seven, so that the last batch is a short one."""
    return pairs_of(taught, 7)


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(chunks, "_BATCHES_AT_ONCE", 1)


def work_in(out: Path) -> Work:
    (out / ".work").mkdir(parents=True, exist_ok=True)
    return Work(out / ".work")


def generator(policy: Policy) -> HFGenerator:
    return HFGenerator(policy.model, policy.tokenizer, batch_size=4)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if "second" not in key}
    return value


def sample(taught: Policy, out: Path) -> dict[str, Any]:
    return pool.sample(
        generator(taught), TinyRetriever(PASSAGES), QUESTIONS, taught.prompts, PoolConfig(group_size=4), SMALL,
        seed=1, out=out, work=work_in(out),
    )  # fmt: skip


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("count", [2, 4])
def test_a_pool_is_the_same_whatever_the_number_of_processes(taught, tmp_path, count):
    """Three chunks of one question, dealt out; with four processes one has nothing to do."""
    alone = sample(taught, tmp_path / "alone")
    first, *others = in_ranks(count, lambda: sample(taught, tmp_path / "out"), tmp_path / "ranks")
    assert (tmp_path / "out" / pool.FILE).read_bytes() == (tmp_path / "alone" / pool.FILE).read_bytes()
    assert without_times(first) == without_times(alone)
    assert others == [None] * (count - 1)


@pytest.mark.usefixtures("small_chunks")
def test_what_a_killed_attempt_has_left_is_used_by_another_number_of_processes(taught, tmp_path, monkeypatch):
    whole = sample(taught, tmp_path / "alone")
    out = tmp_path / "out"

    def killed_before_joining() -> None:
        ranks.first_goes_on = leave  # type: ignore[assignment]
        sample(taught, out)

    def leave() -> None:
        raise ranks.Left

    assert in_ranks(2, killed_before_joining, tmp_path / "ranks") == [None, None]
    assert not (out / pool.FILE).read_bytes()
    damaged = out / ".work" / "pieces" / f"{pool.FILE}-1"
    damaged.write_bytes(damaged.read_bytes().replace(b"answered", b"Answered"))

    asked: list[str] = []
    groups = chunks.Asking.groups
    monkeypatch.setattr(
        chunks.Asking,
        "groups",
        lambda self, chunk, *a, **k: asked.append(chunk[0].id) or groups(self, chunk, *a, **k),
    )
    assert without_times(sample(taught, tmp_path / "counted")) == without_times(whole)
    assert asked == ["arda", "eth", "bel"]
    del asked[:]

    def again() -> list[str]:
        with suppress(ranks.Left):
            assert without_times(sample(taught, out)) == without_times(whole)
        return asked

    assert sorted(id for part in in_ranks(3, again, tmp_path / "again") for id in part) == ["eth"]
    assert (out / pool.FILE).read_bytes() == (tmp_path / "alone" / pool.FILE).read_bytes()


@pytest.mark.usefixtures("small_chunks")
def test_an_evaluation(taught, tmp_path):
    benchmarks = {"a": QUESTIONS, "b": [q.model_copy(update={"id": f"b-{q.id}"}) for q in QUESTIONS]}

    def judged(out: Path) -> dict[str, Any]:
        limits = SMALL.model_copy(update={"batch_size": 2})
        told: list[int] = []
        found = evaluate(
            generator(taught), TinyRetriever(PASSAGES), benchmarks, taught.prompts,
            EvaluationConfig(samples=2, latency=1), limits, seed=1, out=out, work=work_in(out),
            progress=lambda done, total, figure="": told.append(done),
        )  # fmt: skip
        assert told[-1] == 18
        return found.model_dump()

    alone = judged(tmp_path / "alone")
    first, second = in_ranks(2, lambda: judged(tmp_path / "out"), tmp_path / "ranks")
    assert first == alone
    assert second is None
    for name in ("trajectories.jsonl", "sampled.jsonl", "questions.jsonl", "evaluation.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_a_lead(taught, pairs, tmp_path):
    def measured(out: Path) -> Any:
        return teacher.measure(
            taught, generator(taught), TinyRetriever(PASSAGES), pairs, LeadConfig(samples=2), SMALL,
            temperature=1.0, seed=1, work=work_in(out),
        )  # fmt: skip

    alone = measured(tmp_path / "alone")
    assert in_ranks(2, lambda: measured(tmp_path / "out"), tmp_path / "ranks") == [alone, None]


def compare(ours: Path, theirs: Path, *figures: str) -> None:
    a, b = ([json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()] for out in (ours, theirs))
    assert len(a) == len(b)
    for mine, other in zip(a, b, strict=True):
        assert mine.keys() == other.keys()
        for figure in figures:
            assert mine[figure] == pytest.approx(other[figure], rel=1e-4, abs=1e-6), figure
    a, b = (load_file(out / "policy" / "model.safetensors") for out in (ours, theirs))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


# Plain descent: Adam's first steps are the gradient's sign, which rounding can turn.
DESCENT = {"optim": "sgd"}


def untied(policy: Policy) -> Policy:
    """The same with a head of its own."""
    policy = copy.deepcopy(policy)
    policy.model.lm_head.weight = torch.nn.Parameter(policy.model.lm_head.weight.detach().clone())
    policy.model.config.tie_word_embeddings = False
    return policy


WAYS: list[Sharding] = ["none", "fsdp2"]
if importlib.util.find_spec("deepspeed"):  # an extra
    WAYS.append("zero3")


@pytest.fixture
def divided(monkeypatch) -> list[float]:
    """What share of the weights a process held, each time that all were gathered."""
    shares: list[float] = []
    fill = sharding.Twin.fill

    def counted(self: sharding.Twin, model: Any, dtype: Any = None) -> Any:
        weights = list(model.parameters())
        if hasattr(weights[0], "ds_tensor"):
            parts = [(weight.ds_tensor.numel(), weight.ds_numel) for weight in weights]
        else:
            parts = [(weight.to_local().numel(), weight.numel()) for weight in weights]
        shares.append(sum(held for held, _ in parts) / sum(all for _, all in parts))
        return fill(self, model, dtype)

    monkeypatch.setattr(sharding.Twin, "fill", counted)
    return shares


def in_all_ways(trained: Callable[[Path, Sharding], Any], directory: Path) -> list[Any]:
    """What each of two processes makes of ``trained`` in each of WAYS, in a directory of that name."""
    if "zero3" in WAYS:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling

    return in_ranks(2, lambda: [trained(directory / way, way) for way in WAYS], directory / "ranks")


@pytest.mark.parametrize(
    ("lora", "own_head"),
    [(None, False), (None, True), (LoraConfig(rank=4), True)],
    ids=["all weights", "all weights, untied", "adapters, untied"],
)
def test_grpo_has_the_same_losses_and_weights(taught, tmp_path, divided, lora, own_head):
    """Groups of six are cut by the border between two processes; replay's examples come from whole groups."""
    config = GrpoConfig(
        steps=2, questions_per_step=3, group_size=6, learning_rate=0.05, lora=lora,
        replay=ReplayConfig(examples_per_step=3, weight=0.5), trainer={**DESCENT, "per_device_train_batch_size": 3},
    )  # fmt: skip
    start = untied(taught) if own_head else taught

    def trained(out: Path, sharding: Sharding = "none") -> tuple[dict[str, Any], list[float]]:
        out.mkdir(exist_ok=True)
        divided.clear()
        made = grpo.train(
            copy.deepcopy(start), QUESTIONS, TinyRetriever(PASSAGES), config, SMALL, seed=3, out=out,
            sharding=sharding, work=work_in(out),
        )  # fmt: skip
        return made, divided.copy()

    alone, _ = trained(tmp_path / "alone")
    first, second = in_all_ways(trained, tmp_path)
    figures = ("reward", "searches", "sampled_tokens", "loss", "grad_norm", "replay_cross_entropy", "replay_examples")
    for way, (found, shares), (others, _) in zip(WAYS, first, second, strict=True):
        assert without_times(others) == without_times(found)
        assert without_times(found) == pytest.approx(without_times(alone), rel=1e-4)
        assert shares == pytest.approx([0.5] * 3 if way != "none" else [], abs=0.02)  # two rollouts, and the end
        compare(tmp_path / way, tmp_path / "alone", *figures)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": LoraConfig(rank=4), "teacher": "live"},
        {"weights": "all", "epochs": 2},
        {"weights": "all", "teacher": "live", "trainer": {"gradient_checkpointing": True}},
    ],
    ids=["adapters", "all weights, cached teacher", "all weights, frozen teacher, untied, checkpointing"],
)
def test_distillation_has_the_same_losses_and_weights(taught, pairs, tmp_path, divided, changes):
    """Seven pairs in batches of four: the last batch lacks one, and no pair counts twice for it."""
    further = changes.pop("trainer", {})
    config = DistillConfig(
        batch_size=4, learning_rate=0.05, trainer={**DESCENT, "per_device_train_batch_size": 1, **further}
    ).model_copy(update=changes)
    start = untied(taught) if further else taught

    def trained(out: Path, sharding: Sharding = "none") -> tuple[dict[str, Any], list[float]]:
        divided.clear()
        made = distill.train(copy.deepcopy(start), pairs, config, seed=5, out=out, sharding=sharding, work=work_in(out))
        return made, divided.copy()

    alone, _ = trained(tmp_path / "alone")
    for way, (found, shares) in zip(WAYS, in_all_ways(trained, tmp_path)[0], strict=True):
        assert without_times(found) == pytest.approx(without_times(alone), rel=1e-4)
        assert shares == pytest.approx([0.5] if way != "none" else [], abs=0.02)
        compare(tmp_path / way, tmp_path / "alone", "loss", "grad_norm", "learning_rate")
        files, same = (sorted(p.name for p in (tmp_path / n / "policy").iterdir()) for n in (way, "alone"))
        assert files == same


def test_a_checkpoint_of_divided_weights_is_anyones(taught, pairs, tmp_path):
    """Begun by two processes that divide weights and states and gone on with by one that has all, and the reverse."""
    config = DistillConfig(batch_size=4, learning_rate=1e-3, epochs=2, lora=LoraConfig(rank=4))

    def trained(out: Path, sharding: Sharding = "none", *, stop: bool = False) -> None:
        work = work_in(out)
        work.stop.asked = signal.SIGTERM if stop else None
        with pytest.raises(Stopped) if stop else nullcontext():
            distill.train(copy.deepcopy(taught), pairs, config, seed=5, out=out, sharding=sharding, work=work)

    def by_two(out: Path, sharding: Sharding) -> None:
        trained(out / "joined", sharding, stop=True)
        trained(out / "parted", sharding)

    trained(tmp_path / "alone")
    for way in WAYS:
        trained(tmp_path / way / "parted", stop=True)
    in_all_ways(by_two, tmp_path)
    for way in WAYS:
        trained(tmp_path / way / "joined")
        for name in ("joined", "parted"):
            compare(tmp_path / way / name, tmp_path / "alone", "loss", "grad_norm", "learning_rate")


def test_a_number_of_processes_that_does_not_divide_the_work_is_refused():
    with pytest.raises(ConfigError, match=r"12 trajectories cannot be shared by 5 .* launch 1, 2, 3, 4, 6 or 12"):
        batching.split(12, 5, {})
    with pytest.raises(ConfigError, match=r"distill\.batch_size = 6 cannot be shared by 4 .* launch 1, 2, 3 or 6"):
        micro_batch(DistillConfig(batch_size=6), 4)
    with pytest.raises(ConfigError, match=r"= 2 on 2 processes does not divide distill\.batch_size = 6"):
        micro_batch(DistillConfig(batch_size=6, trainer={"per_device_train_batch_size": 2}), 2)


def test_what_zero3_cannot_do_is_refused(monkeypatch):
    trainers = {"grpo.trainer": {"bf16": True}, "distill.trainer": {"fp16": True}}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sharding.check("fsdp2", "bfloat16", trainers)
    with pytest.raises(ConfigError, match=r"needs DeepSpeed, an extra: pip install .*search-e1\[deepspeed\]"):
        sharding.check("zero3", "float32", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    sharding.check("zero3", "float32", {"grpo.trainer": {"bf16": True}})
    with pytest.raises(ConfigError, match=r'policy\.dtype = "bfloat16": .* trains weights in float32'):
        sharding.check("zero3", "bfloat16", {})
    with pytest.raises(ConfigError, match=r"distill\.trainer\.fp16: .* set bf16 = true"):
        sharding.check("zero3", "float32", trainers)


def test_values_are_exchanged_in_the_order_of_ranks(tmp_path):
    def exchanged() -> tuple[list[int], str, bool]:
        return ranks.gathered(ranks.rank() * 10), ranks.of_first(f"from {ranks.rank()}"), ranks.on_one_machine()

    assert in_ranks(3, exchanged, tmp_path) == [([0, 10, 20], "from 0", True)] * 3
    assert exchanged() == ([0], "from 0", True)
