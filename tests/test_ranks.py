"""Several processes make what one would: the same trajectories to the bit, the same weights but for rounding."""

import copy
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import PASSAGES, TinyRetriever
from made_pairs import pairs_of
from ranked import in_ranks
from search_e1.config import Config, EvaluationConfig, GrpoConfig, LeadConfig, PoolConfig, Sharding
from search_e1.errors import ConfigError
from search_e1.evaluation.evaluate import evaluate
from search_e1.rollout import pool, sampler, sharing
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.runs import Artifact, ranks
from search_e1.runs.checkpoints import Checkpointer
from search_e1.runs.progress import Progress
from search_e1.runs.stopping import Stop, Stopped, on_signals
from search_e1.selfdistill import files
from search_e1.selfdistill import lead as teacher
from search_e1.stages import grpo as grpo_stage
from search_e1.stages.distill import Distill
from search_e1.stages.grpo import Grpo
from search_e1.stages.inputs import Inputs, Watch, no_progress
from search_e1.stages.runner import StageRunner
from search_e1.stages.stage import Stage
from search_e1.training import loop, sharding
from search_e1.training.policy import Policy
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Pair
from taught import LIMITS, QUESTIONS, teach
from test_evolve import config, project
from test_pairs_stage import LEAD

assert project  # the fixture: a tiny policy, passages and questions
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
    monkeypatch.setattr(sampler, "_BATCHES_AT_ONCE", 1)


def checkpointer_in(out: Path) -> Checkpointer:
    (out / ".work").mkdir(parents=True, exist_ok=True)
    return Checkpointer(out / ".work")


def generator(policy: Policy) -> TorchEngine:
    return TorchEngine(policy.model, policy.tokenizer, batch_size=4)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if "second" not in key}
    return value


# What is sampled.


def sample(taught: Policy, out: Path) -> dict[str, Any]:
    return pool.sample(
        generator(taught), TinyRetriever(PASSAGES), QUESTIONS, taught.prompts, PoolConfig(group_size=4), SMALL,
        seed=1, out=out, checkpointer=checkpointer_in(out),
    )  # fmt: skip


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("count", [2, 4])
def test_a_pool_is_the_same_whatever_the_number_of_processes(taught, tmp_path, count):
    """Three chunks of one question, dealt out; with four processes one has nothing to do."""
    alone = sample(taught, tmp_path / "alone")
    found = in_ranks(count, lambda: sample(taught, tmp_path / "out"), tmp_path / "ranks")
    assert (tmp_path / "out" / pool.FILE).read_bytes() == (tmp_path / "alone" / pool.FILE).read_bytes()
    assert [without_times(own) for own in found] == [without_times(alone)] * count


class KilledError(Exception):
    pass


@pytest.mark.usefixtures("small_chunks")
def test_what_a_killed_attempt_has_left_is_used_by_another_number_of_processes(taught, tmp_path, monkeypatch):
    whole, out = sample(taught, tmp_path / "alone"), tmp_path / "out"

    def killed_before_joining(checkpointer: Checkpointer, parts: Any) -> None:
        sharing._make_pieces(checkpointer, parts)
        raise KilledError

    def killed() -> None:
        with pytest.raises(KilledError):
            sample(taught, out)

    with monkeypatch.context() as patch:
        patch.setattr(pool, "write_parts", killed_before_joining)
        in_ranks(2, killed, tmp_path / "ranks")
    assert not (out / pool.FILE).read_bytes()
    damaged = out / ".work" / "pieces" / f"{pool.FILE}-1"
    damaged.write_bytes(damaged.read_bytes().replace(b"answered", b"Answered"))

    asked: list[str] = []
    groups = sampler.RolloutSampler.groups
    monkeypatch.setattr(
        sampler.RolloutSampler,
        "groups",
        lambda self, chunk, *a, **k: asked.append(chunk[0].id) or groups(self, chunk, *a, **k),
    )
    assert without_times(sample(taught, tmp_path / "counted")) == without_times(whole)
    assert asked == ["arda", "eth", "bel"]
    del asked[:]

    def again() -> list[str]:
        assert without_times(sample(taught, out)) == without_times(whole)
        return asked

    assert sorted(id for part in in_ranks(3, again, tmp_path / "again") for id in part) == ["eth"]
    assert (out / pool.FILE).read_bytes() == (tmp_path / "alone" / pool.FILE).read_bytes()


@pytest.mark.usefixtures("small_chunks")
def test_an_evaluation(taught, tmp_path):
    benchmarks = {"a": QUESTIONS, "b": [q.model_copy(update={"id": f"b-{q.id}"}) for q in QUESTIONS]}

    def judged(out: Path) -> dict[str, Any]:
        found = evaluate(
            generator(taught), TinyRetriever(PASSAGES), benchmarks, taught.prompts,
            EvaluationConfig(samples=2, latency=1), SMALL.model_copy(update={"batch_size": 2}), seed=1, out=out,
            checkpointer=checkpointer_in(out),
        )  # fmt: skip
        return found.model_dump()

    alone = judged(tmp_path / "alone")
    assert in_ranks(2, lambda: judged(tmp_path / "out"), tmp_path / "ranks") == [alone] * 2
    for name in ("trajectories.jsonl", "sampled.jsonl", "questions.jsonl", "evaluation.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_a_lead(taught, pairs, tmp_path):
    def measured(out: Path) -> Any:
        return teacher.measure(
            taught, generator(taught), TinyRetriever(PASSAGES), pairs, LeadConfig(samples=2), SMALL,
            temperature=1.0, seed=1, checkpointer=checkpointer_in(out),
        )  # fmt: skip

    alone = measured(tmp_path / "alone")
    assert in_ranks(2, lambda: measured(tmp_path / "out"), tmp_path / "ranks") == [alone] * 2
    trajectories = [tmp_path / out / ".work" / "scratch" / "trajectories.jsonl" for out in ("alone", "out")]
    assert trajectories[0].read_bytes() == trajectories[1].read_bytes()


# What is trained.

WAYS: tuple[Sharding, ...] = ("none", "fsdp2")


@pytest.fixture
def descent(monkeypatch) -> None:
    """Plain descent: Adam's first steps are the gradient's sign, which rounding can turn."""
    monkeypatch.setattr(loop, "make_optimizers", lambda model, config, rate: [torch.optim.SGD(trained_of(model), lr=rate)])


def trained_of(model: Any) -> list[Any]:
    return [weight for weight in model.parameters() if weight.requires_grad]


@pytest.fixture
def shares(monkeypatch) -> list[float]:
    """What share of the weights a process held, each time that all were gathered."""
    held: list[float] = []
    fill = sharding.UnshardedReplica.fill

    def counted(self: sharding.UnshardedReplica, model: Any, dtype: Any = None) -> Any:
        weights = list(model.parameters())
        held.append(sum(w.to_local().numel() for w in weights) / sum(w.numel() for w in weights))
        return fill(self, model, dtype)

    monkeypatch.setattr(sharding.UnshardedReplica, "fill", counted)
    return held


@pytest.fixture(scope="module")
def untied(taught, tmp_path_factory) -> Path:
    """The same policy with a head of its own."""
    policy = copy.deepcopy(taught)
    policy.model.lm_head.weight = torch.nn.Parameter(policy.model.lm_head.weight.detach().clone())
    policy.model.config.tie_word_embeddings = False
    path = tmp_path_factory.mktemp("untied") / "policy"
    policy.save(path)
    return path


@pytest.fixture(scope="module")
def mined(pairs, tmp_path_factory) -> Path:
    """The pairs' directory, and the lead's, which passes."""
    path = tmp_path_factory.mktemp("mined")
    (path / files.TRAIN).write_text("".join(pair.model_dump_json() + "\n" for pair in pairs))
    (path / "lead.json").write_text(LEAD)
    return path


def made(settings: Config, stage: Stage, root: Path, watch: Watch = no_progress, stop: Stop | None = None) -> Artifact:
    root.mkdir(exist_ok=True)
    return StageRunner(Inputs(settings, root, watch), stop).make(stage)


def steps_of(made: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (made / "steps.jsonl").read_text().splitlines()]


def compare(ours: Path, theirs: Path, start: Path) -> None:
    """Every figure of every step, and all weights; ``start``: these must have moved."""
    mine, other = steps_of(ours), steps_of(theirs)
    assert [step.keys() for step in mine] == [step.keys() for step in other]
    for a, b in zip(mine, other, strict=True):
        assert without_times(a) == pytest.approx(without_times(b), rel=1e-4, abs=1e-6)
    a, b, before = (load_file(p / "model.safetensors") for p in (ours / "policy", theirs / "policy", start))
    assert a.keys() == b.keys() == before.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)
    assert max(float((b[name] - before[name]).abs().max()) for name in b) > 1e-3


def settings_of(project: Path, policy: str | Path, way: Sharding = "none", **sections: Any) -> Config:
    base = config(project, Path("unused")).model_dump()
    given = {"policy": base["policy"] | {"model": str(policy)}, "parallel": {"sharding": way}, **sections}
    return Config.model_validate(base | given)


def in_both_ways(work: Callable[[Sharding], Any], directory: Path) -> list[list[Any]]:
    """What each of two processes makes, for each of WAYS."""
    return [list(row) for row in zip(*in_ranks(2, lambda: [work(way) for way in WAYS], directory), strict=True)]


@pytest.mark.usefixtures("descent")
@pytest.mark.parametrize(("lora", "own_head"), [(None, False), ({"rank": 4}, True)], ids=["all weights", "adapters, untied"])
def test_grpo_has_the_same_losses_and_weights(project, untied, tmp_path, shares, lora, own_head):
    """Of three questions one process has two; replay's examples come from all; no process has all passes at once."""
    policy = untied if own_head else project / "policy"
    grpo = {
        "steps": 2, "questions_per_step": 3, "group_size": 6, "learning_rate": 0.1, "lora": lora, "keep_groups": True,
        "replay": {"examples_per_step": 3, "weight": 0.5}, "training": {"micro_batch_tokens": 600},
    }  # fmt: skip

    def work(way: Sharding) -> tuple[Any, list[float]]:
        del shares[:]
        artifact = made(settings_of(project, policy, way, grpo=grpo), Grpo(policy, 1), tmp_path / way)
        return artifact.manifest, shares.copy()

    alone = made(settings_of(project, policy, grpo=grpo), Grpo(policy, 1), tmp_path / "alone")
    for way, ((first, held), (second, _)) in zip(WAYS, in_both_ways(work, tmp_path / "ranks"), strict=True):
        assert first == second
        assert first.inputs == alone.manifest.inputs
        assert without_times(first.result) == pytest.approx(without_times(alone.manifest.result), rel=1e-4)
        assert held == pytest.approx([0.5] * 3 if way == "fsdp2" else [], abs=0.02)  # two rollouts, and the end
        compare(tmp_path / way / "grpo-1", alone.path, Path(policy))
        kept = [run / "grpo-1" / "groups.jsonl" for run in (tmp_path / way, tmp_path / "alone")]
        assert [g.question.id for g in pool.read(kept[0])] == [g.question.id for g in pool.read(kept[1])]


DISTILL = {"batch_size": 4, "epochs": 2, "learning_rate": 0.1, "training": {"micro_batch_tokens": 200}}
CASES = {
    "adapters": {"lora": {"rank": 4}},
    "all weights": {"weights": "all"},
    "all weights, untied, checkpointing": {
        "weights": "all", "training": {"gradient_checkpointing": True, "micro_batch_tokens": 200},
    },
    "fine-tuning, all weights": {"weights": "all", "objective": "sft"},
    "fine-tuning, adapters": {"objective": "sft", "lora": {"rank": 4}},
}  # fmt: skip


@pytest.mark.usefixtures("descent")
@pytest.mark.parametrize("case", CASES)
def test_distillation_has_the_same_losses_and_weights(project, untied, mined, tmp_path, shares, case):
    """Seven pairs in batches of four: the last batch lacks one, and no pair counts twice for it."""
    policy = untied if "untied" in case else project / "policy"
    section = DISTILL | CASES[case]
    stage = Distill(policy, mined, None if "tuning" in case else mined, 1)

    def work(way: Sharding) -> tuple[Any, list[float]]:
        del shares[:]
        artifact = made(settings_of(project, policy, way, distill=section), stage, tmp_path / way)
        return artifact.manifest, shares.copy()

    alone = made(settings_of(project, policy, distill=section), stage, tmp_path / "alone")
    assert alone.manifest.result["steps"] == 4
    for way, ((first, held), (second, _)) in zip(WAYS, in_both_ways(work, tmp_path / "ranks"), strict=True):
        assert first == second
        assert first.result.keys() == alone.manifest.result.keys()
        assert without_times(first.result) == pytest.approx(without_times(alone.manifest.result), rel=1e-4)
        assert held == pytest.approx([0.5] if way == "fsdp2" else [], abs=0.02)
        compare(tmp_path / way / "ofsd-1", alone.path, Path(policy))
        assert first.files.keys() == alone.manifest.files.keys()


class KillSelf:
    """A watch whose stage sends a signal to its own process, on one rank, when step ``after`` is complete."""

    def __init__(self, on: int, after: int) -> None:
        self.on, self.after, self.told = on, after, []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[Progress]:
        def progress(done: int, total: int, figure: str = "") -> None:
            if stage == "index":
                return
            self.told.append(done)
            if (ranks.rank(), done) == (self.on, self.after):
                os.kill(os.getpid(), signal.SIGTERM)

        yield progress


def stopped(settings: Config, stage: Stage, root: Path, on: int, after: int) -> list[int]:
    """The steps that this rank has told before all stop."""
    watch = KillSelf(on, after)
    with on_signals() as stop, pytest.raises(Stopped, match="stopped by SIGTERM"):
        made(settings, stage, root, watch, stop)
    return watch.told


@pytest.mark.usefixtures("descent")
@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_is_anyones_and_a_signal_to_one_stops_all(project, mined, tmp_path, way):
    """Begun by two and finished by one, and the reverse; both processes stop after the same step."""
    policy = project / "policy"
    stage = Distill(policy, mined, mined, 1)
    settings = settings_of(project, policy, way, distill=DISTILL | {"lora": {"rank": 4}})
    alone = made(settings, stage, tmp_path / "alone")
    stopped(settings, stage, tmp_path / "parted", 0, 2)

    def by_two() -> list[int]:
        told = stopped(settings, stage, tmp_path / "joined", 1, 2)
        made(settings, stage, tmp_path / "parted")
        return told

    assert in_ranks(2, by_two, tmp_path / "ranks") == [[1, 2], [1, 2]]
    saved = tmp_path / "joined" / ".ofsd-1.partial" / ".work"
    assert [path.name for path in saved.glob("step-*")] == ["step-0000000002"]
    assert made(settings, stage, tmp_path / "joined").manifest.attempts == 2
    for run in ("parted", "joined"):
        compare(tmp_path / run / "ofsd-1", alone.path, policy)


@pytest.mark.parametrize("way", WAYS)
def test_two_that_stop_within_a_step_resume_to_the_bit(project, mined, tmp_path, monkeypatch, way):
    """A signal to the second in the second pass of the second step; Adam's states and gradients are each one's own."""
    policy = project / "policy"
    stage = Distill(policy, mined, mined, 1)
    settings = settings_of(project, policy, way, distill=DISTILL | {"lora": {"rank": 4, "dropout": 0.2}})
    run, passes = TrainedPolicy.run, []

    def counted(self: TrainedPolicy, *args: Any) -> Any:
        passes.append(1)
        if len(passes) == at and ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return run(self, *args)

    monkeypatch.setattr(TrainedPolicy, "run", counted)
    at = 0

    def whole_and_interrupted() -> tuple[int, int]:
        nonlocal at
        made(settings, stage, tmp_path / "whole")
        at = len(passes) // 2
        del passes[:]
        stopped(settings, stage, tmp_path / "cut", 2, 0)
        before = len(passes)
        made(settings, stage, tmp_path / "cut")
        return at, before

    ours, theirs = in_ranks(2, whole_and_interrupted, tmp_path / "ranks")
    assert ours == theirs
    assert ours[0] == ours[1] > 0
    a, b = (load_file(tmp_path / name / "ofsd-1" / "policy" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = ([without_times(s) for s in steps_of(tmp_path / name / "ofsd-1")] for name in ("whole", "cut"))
    assert a == b


def test_a_rank_that_waits_for_anothers_rollouts_stops_and_saves_with_it(project, tmp_path, monkeypatch):
    """Both get the signal in the second step, when the second has sampled its groups and the first has not."""
    policy = project / "policy"
    grpo = {"steps": 3, "questions_per_step": 2, "group_size": 2}
    settings, stage = settings_of(project, policy, grpo=grpo), Grpo(policy, 1)
    sample, meet, calls = grpo_stage.GroupSource._sample, ranks.meet, Counter()

    def sampled(self: grpo_stage.GroupSource, *args: Any) -> Any:
        calls["sampled"] += 1
        if calls["sampled"] == at and ranks.rank() == 0:
            with self._context.checkpointer.stop.finishing():
                time.sleep(0.3)  # the other waits by now
                os.kill(os.getpid(), signal.SIGTERM)
        return sample(self, *args)

    def met(leave: Callable[[], None]) -> None:
        calls["met"] += 1
        if calls["met"] == at and ranks.rank() == 1:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        meet(leave)

    monkeypatch.setattr(grpo_stage.GroupSource, "_sample", sampled)
    monkeypatch.setattr(ranks, "meet", met)
    at = 0

    def whole_and_interrupted() -> list[str]:
        nonlocal at
        made(settings, stage, tmp_path / "whole")
        calls.clear()
        at = 2
        stopped(settings, stage, tmp_path / "cut", 2, 0)
        ranks.barrier()
        saved = sorted(path.name for path in (tmp_path / "cut").glob(".grpo-1.partial/.work/step-*"))
        ranks.barrier()
        at = 0
        made(settings, stage, tmp_path / "cut")
        return saved

    assert in_ranks(2, whole_and_interrupted, tmp_path / "ranks") == [["step-0000000001"]] * 2
    assert made(settings, stage, tmp_path / "cut").manifest.attempts == 2
    a, b = ([without_times(s) for s in steps_of(tmp_path / name / "grpo-1")] for name in ("whole", "cut"))
    assert a == b


# Rank 0 decides.


def test_what_rank_0_refuses_no_other_begins(project, mined, tmp_path):
    """An artifact that lies there is returned to all; another one's place is refused by rank 0 with the reason."""
    policy = project / "policy"
    settings = settings_of(project, policy, distill=DISTILL)
    first = made(settings, Distill(policy, mined, mined, 1), tmp_path / "run")

    def again() -> Any:
        return made(settings, Distill(policy, mined, mined, 1), tmp_path / "run").manifest

    assert in_ranks(2, again, tmp_path / "ranks") == [first.manifest] * 2


def test_work_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"questions_per_step = 2 cannot be shared by 3 processes; raise it, or start"):
        grpo_stage.check(GrpoConfig(questions_per_step=2), QUESTIONS)
    grpo_stage.check(GrpoConfig(questions_per_step=3), QUESTIONS)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("meta:1", r"policy\.device = 'meta:1': each of 2 processes takes its own device; write 'meta'"),
        ("meta", r"process 1 of this machine has no meta device: 0 are visible; start fewer \(torchrun"),
    ],
)
def test_every_process_needs_a_device_of_its_own(project, tmp_path, monkeypatch, device, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    base = config(project, tmp_path)
    settings = base.model_copy(update={"policy": base.policy.model_copy(update={"device": device})})
    with pytest.raises(ConfigError, match=message):
        StageRunner(Inputs(settings, tmp_path)).check()
