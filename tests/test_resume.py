"""A stage that was killed and goes on ends as one that was never interrupted, to the bit."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import PASSAGES, TinyRetriever
from search_e1.config import (
    DistillConfig,
    EvaluationConfig,
    GrpoConfig,
    LeadConfig,
    LoraConfig,
    PoolConfig,
    ReplayConfig,
)
from search_e1.distill import passes
from search_e1.distill import trainer as distill
from search_e1.evaluation.evaluate import evaluate
from search_e1.grpo import trainer as grpo
from search_e1.rollout import chunks, pool
from search_e1.rollout.engines.torch import HFGenerator
from search_e1.runs.checkpoints import Work
from search_e1.runs.progress import Progress, silent
from search_e1.selfdistill import lead as teacher
from search_e1.training.policy import Policy
from search_e1.types import Pair
from search_e1.warmstart.trainer import Demonstration
from search_e1.warmstart.trainer import train as warmstart
from taught import LIMITS, QUESTIONS, teach
from test_distill import pairs_of


class Killed(BaseException):
    pass


class KilledAt:
    """Progress that dies at a step, or when it has been told ``what`` as often."""

    def __init__(self, step: int, what: str = "") -> None:
        self.step, self.what, self.told = step, what, 0

    def __call__(self, done: int, total: int, figure: str = "") -> None:
        self.told += figure == self.what
        if self.step == (self.told if self.what else done) and figure not in {"teacher"} - {self.what}:
            raise Killed


@pytest.fixture(scope="module")
def taught() -> Policy:
    return teach()


Stage = Callable[..., dict[str, Any]]
"""Takes ``out``, ``progress`` and ``work``."""


def never_interrupted(stage: Stage, out: Path) -> dict[str, Any]:
    out.mkdir()
    return stage(out=out, progress=silent, work=None)


def interrupted(stage: Stage, out: Path, *steps: int) -> dict[str, Any]:
    """Killed in each of ``steps`` before anything of that step is saved, and gone on with."""
    out.mkdir()
    (out / ".work").mkdir()
    for step in steps:
        with pytest.raises(Killed):
            stage(out=out, progress=KilledAt(step), work=saving(out))
        newest = Work(out / ".work").newest()
        assert newest
        assert int(newest.name.removeprefix("step-")) < step
    return stage(out=out, progress=silent, work=saving(out))


def saving(out: Path) -> Work:
    """Saves at every step."""
    return Work(out / ".work", every_seconds=0.0, share=1.0)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if "second" not in key}
    return value


def assert_equal(ours: Path, theirs: Path) -> None:
    a, b = (load_file(out / "policy" / "model.safetensors") for out in (ours, theirs))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = (
        [without_times(json.loads(line)) for line in (out / "steps.jsonl").read_text().splitlines()]
        for out in (ours, theirs)
    )
    assert a == b


GRPO = GrpoConfig(steps=4, questions_per_step=2, group_size=4, learning_rate=3e-3)
LINEAR = {"lr_scheduler_type": "linear", "per_device_train_batch_size": 4}


@pytest.mark.parametrize(
    ("changes", "kills"),
    [
        ({"lora": LoraConfig(rank=4, dropout=0.2), "trainer": LINEAR}, (2, 4)),
        (
            {
                "replay": ReplayConfig(examples_per_step=2),
                "trainer": {"num_iterations": 2, **LINEAR},
                "keep_groups": True,
            },
            (4,),
        ),
    ],
    ids=["adapters", "all weights, replay, two iterations, groups kept"],
)
def test_grpo(taught, tmp_path, changes, kills):
    def stage(**kwargs) -> dict[str, float]:
        config = GRPO.model_copy(update=changes)
        return grpo.train(copy.deepcopy(taught), QUESTIONS, TinyRetriever(PASSAGES), config, LIMITS, seed=3, **kwargs)

    whole = never_interrupted(stage, tmp_path / "whole")
    assert without_times(interrupted(stage, tmp_path / "killed", *kills)) == without_times(whole)
    assert_equal(tmp_path / "killed", tmp_path / "whole")
    kept = [out / "groups.jsonl" for out in (tmp_path / "whole", tmp_path / "killed")]
    assert [path.exists() for path in kept] == [changes.get("keep_groups", False)] * 2
    if kept[0].exists():
        assert kept[1].read_bytes() == kept[0].read_bytes()
        groups = list(pool.read(kept[0]))
        assert len({group.question.id for group in groups}) == len(groups) == len(QUESTIONS)
        assert {len(group.trajectories) for group in groups} == {GRPO.group_size}


DISTILL = DistillConfig(epochs=2, batch_size=2, learning_rate=3e-3)


@pytest.fixture(scope="module")
def pairs(taught) -> list[Pair]:
    """Seven, so that the last batch of an epoch is a short one."""
    return pairs_of(taught, 7)


@pytest.mark.parametrize(
    ("changes", "kills"),
    [
        ({"lora": LoraConfig(rank=4, dropout=0.2), "teacher": "live"}, (2, 5, 7)),
        ({"objective": "sft", "lora": LoraConfig(rank=4, dropout=0.2)}, (3, 6)),
        ({"weights": "all", "trainer": {"per_device_train_batch_size": 1, "lr_scheduler_type": "cosine"}}, (5,)),
        ({"trainer": {"train_sampling_strategy": "random"}, "teacher": "live"}, (6,)),
    ],
    ids=["adapters", "no teacher", "all weights, cached teacher", "random order"],
)
def test_distillation(taught, pairs, tmp_path, changes, kills):
    def stage(**kwargs) -> dict[str, Any]:
        return distill.train(copy.deepcopy(taught), pairs, DISTILL.model_copy(update=changes), seed=5, **kwargs)

    whole = never_interrupted(stage, tmp_path / "whole")
    assert without_times(interrupted(stage, tmp_path / "killed", *kills)) == without_times(whole)
    assert_equal(tmp_path / "killed", tmp_path / "whole")


def test_what_the_teacher_has_read_it_does_not_read_again(taught, pairs, tmp_path, monkeypatch):
    read: list[int] = []

    def hidden_at(decoder, batch, role):
        read.append(len(batch["pairs"]))
        return passes_hidden_at(decoder, batch, role)

    passes_hidden_at = passes.hidden_at
    monkeypatch.setattr(passes, "hidden_at", hidden_at)

    def stage(**kwargs) -> dict[str, Any]:
        del read[:]
        return distill.train(copy.deepcopy(taught), pairs, DISTILL, seed=5, **kwargs)

    whole = never_interrupted(stage, tmp_path / "whole")
    student = sum(read) - len(pairs)
    killed = tmp_path / "killed"
    killed.mkdir()
    with pytest.raises(Killed):
        stage(out=killed, progress=KilledAt(3, "teacher"), work=saving(killed))
    assert read == [2, 2, 2]
    states = killed / ".work" / "scratch" / "states"
    damaged = bytearray(states.read_bytes())
    damaged[7] ^= 1  # in one of the three batches, and in no other
    states.write_bytes(damaged)
    assert without_times(stage(out=killed, progress=silent, work=saving(killed))) == without_times(whole)
    assert sum(read) - student == 2 + 1  # the damaged batch and the last, of one
    assert_equal(killed, tmp_path / "whole")


def test_each_epoch_has_an_order_of_its_own_that_follows_from_the_seed(taught, pairs, tmp_path, monkeypatch):
    orders: dict[int, list[list[int]]] = {}

    def run(seed: int) -> list[list[int]]:
        seen: list[int] = []
        monkeypatch.setattr(
            distill._Collator,
            "__call__",
            lambda self, rows: seen.extend(row["number"] for row in rows) or collate(self, rows),
        )
        config = DISTILL.model_copy(update={"teacher": "live"})
        distill.train(copy.deepcopy(taught), pairs, config, seed=seed, out=tmp_path)
        return [seen[at : at + len(pairs)] for at in range(0, len(seen), len(pairs))]

    collate = distill._Collator.__call__
    orders = {seed: run(seed) for seed in (5, 6)}
    assert all(sorted(order) == list(range(7)) for epochs in orders.values() for order in epochs)
    assert len({tuple(order) for epochs in orders.values() for order in epochs}) == 4
    assert run(5) == orders[5]


def test_a_warm_start(taught, tmp_path):
    def demonstrations() -> Iterator[list[Demonstration]]:
        dice = random.Random(1)
        while True:
            ids = tuple(dice.choices(range(200), k=12))
            yield [Demonstration(ids[:4], ids[4:], (1,) * 8)]

    def stage(out: Path, progress: Progress, work: Work | None) -> dict[str, Any]:
        policy = copy.deepcopy(taught)
        for layer in policy.model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        tracked: list[tuple[int, float]] = []
        losses = warmstart(
            policy, demonstrations(), steps=8, learning_rate=1e-2, seed=2, progress=progress, work=work,
            track=lambda step, figures: tracked.append((step, figures["loss"])),
        )  # fmt: skip
        assert tracked == list(enumerate(losses, 1))
        policy.save(out / "policy")
        (out / "steps.jsonl").touch()
        return {"losses": losses}

    whole = never_interrupted(stage, tmp_path / "whole")
    assert interrupted(stage, tmp_path / "killed", 2, 7) == whole
    assert_equal(tmp_path / "killed", tmp_path / "whole")


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(chunks, "_BATCHES_AT_ONCE", 1)


def lines_of(out: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in out.glob("*.jsonl")}


@pytest.mark.usefixtures("small_chunks")
def test_a_pool(taught, tmp_path):
    """Chunks of one question; killed within the second and within the third."""

    def stage(**kwargs) -> dict[str, Any]:
        generator = HFGenerator(taught.model, taught.tokenizer, batch_size=4)
        config, limits = PoolConfig(group_size=4), LIMITS.model_copy(update={"batch_size": 4})
        return pool.sample(
            generator, TinyRetriever(PASSAGES), QUESTIONS, taught.prompts, config, limits, seed=1, **kwargs
        )

    whole = never_interrupted(stage, tmp_path / "whole")
    killed = tmp_path / "killed"
    (killed / ".work").mkdir(parents=True)
    for at, kept in ((6, 1), (11, 2)):
        with pytest.raises(Killed):
            stage(out=killed, progress=KilledAt(at), work=saving(killed))
        assert len((killed / "groups.jsonl").read_text().splitlines()) == kept
    told: list[str] = []
    resumed = stage(
        out=killed, progress=lambda done, total, figure: told.append(f"{done}/{total} {figure}"), work=saving(killed)
    )
    assert lines_of(killed) == lines_of(tmp_path / "whole")
    assert without_times(resumed) == without_times(whole)
    assert sum(whole["stop_reasons"].values()) == 12
    # What is told counts the chunks that were there.
    assert [line.partition(" ")[0] for line in told] == ["9/12", "10/12", "11/12", "12/12"]
    assert f" EM {whole['em']:.3f}, " in told[-1]
    assert f" {whole['searches']:.2f} searches, " in told[-1]
    assert all(f"{name} {count}" in told[-1] for name, count in whole["stop_reasons"].items())
    seconds = sum(whole["seconds"].values())
    assert set(whole["seconds"]) == {"sampling", "retrieval", "rest"}
    assert whole["trajectories_per_second"] == pytest.approx(12 / seconds, rel=0.02)
    assert whole["tokens_per_second"] == pytest.approx(12 * whole["tokens"] / seconds, rel=0.02)


@pytest.mark.usefixtures("small_chunks")
def test_an_evaluation(taught, tmp_path):
    """Two benchmarks of three questions, greedy and twice sampled: 18 trajectories; killed in each of the four parts."""
    benchmarks = {"a": QUESTIONS, "b": [q.model_copy(update={"id": f"b-{q.id}"}) for q in QUESTIONS]}
    asked: list[int] = []

    def stage(out: Path, progress: Progress, work: Work | None) -> dict[str, Any]:
        del asked[:]
        evaluation = evaluate(
            HFGenerator(taught.model, taught.tokenizer, batch_size=2), TinyRetriever(PASSAGES), benchmarks,
            taught.prompts, EvaluationConfig(samples=2, latency=0), LIMITS.model_copy(update={"batch_size": 2}),
            seed=1, out=out, progress=progress, work=work,
        )  # fmt: skip
        return evaluation.model_dump()

    whole = never_interrupted(stage, tmp_path / "whole")
    killed = tmp_path / "killed"
    (killed / ".work").mkdir(parents=True)
    for at in (2, 5, 12, 17):
        with pytest.raises(Killed):
            stage(out=killed, progress=KilledAt(at), work=saving(killed))
    resumed = stage(out=killed, progress=lambda done, total, figure: asked.append(done), work=saving(killed))
    assert asked == list(range(1, 19))  # those that lay there are told as well
    assert resumed == whole
    assert lines_of(killed) == lines_of(tmp_path / "whole")
    assert (killed / "evaluation.json").read_text() == (tmp_path / "whole" / "evaluation.json").read_text()


def test_a_lead(taught, pairs, tmp_path):
    """Killed under the privileged prompt; the plain one is not sampled again."""
    config = LeadConfig(samples=2)

    def measure(directory: Path, progress: Progress) -> tuple[Any, Any]:
        (directory / ".work").mkdir(parents=True, exist_ok=True)
        return teacher.measure(
            taught, HFGenerator(taught.model, taught.tokenizer, batch_size=4), TinyRetriever(PASSAGES), pairs, config,
            LIMITS, temperature=1.0, seed=1, progress=progress,
            work=saving(directory),
        )  # fmt: skip

    told: list[int] = []
    whole = measure(tmp_path / "whole", lambda done, total, figure: told.append(total))
    total = told[0]
    with pytest.raises(Killed):
        measure(tmp_path / "killed", KilledAt(total // 2 + 3))
    assert (
        len((tmp_path / "killed" / ".work" / "scratch" / "trajectories.jsonl").read_text().splitlines()) == total // 2
    )
    del told[:]
    assert measure(tmp_path / "killed", lambda done, total, figure: told.append(done)) == whole
    assert told == list(range(total // 2 + 1, total + 1))
