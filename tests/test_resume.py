"""A stage that was killed or stopped and goes on ends as one that was never interrupted, to the bit."""

import copy
import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from made_pairs import pairs_of
from search_e1 import runs
from search_e1.config import Config, TrainingConfig
from search_e1.rollout import pool, sampler
from search_e1.runs.checkpoints import Checkpointer
from search_e1.runs.context import StageContext
from search_e1.runs.progress import Progress
from search_e1.runs.stopping import Stop, Stopped, on_signals
from search_e1.selfdistill import files
from search_e1.stages.coldstart import BatchSource
from search_e1.stages.distill import Distill, EpochSource
from search_e1.stages.evaluate import Evaluate
from search_e1.stages.grpo import Grpo
from search_e1.stages.inputs import Inputs, Watch, no_progress
from search_e1.stages.lead import MeasureLead
from search_e1.stages.pool import Pool
from search_e1.stages.runner import StageRunner
from search_e1.stages.stage import Stage
from search_e1.training.loop import Schedule, train
from search_e1.training.objectives.sft import Sft
from search_e1.training.trained import TrainedPolicy
from taught import teach
from test_evolve import config, kills_benchmark, project
from test_pairs_stage import LEAD
from trained import equal, sample, weights

assert project  # the fixture: a tiny policy, passages and questions


class Killed(BaseException):
    pass


class Tells:
    """A watch that notes what a stage tells and is killed when it has told ``last`` times."""

    def __init__(self, last: int = 0) -> None:
        self.last, self.told = last, []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[Progress]:
        def progress(done: int, total: int, figure: str = "") -> None:
            if stage == "index":
                return
            self.told.append((done, total, figure))
            if len(self.told) == self.last:
                raise Killed

        yield progress


@pytest.fixture(scope="module")
def mined(tmp_path_factory) -> Path:
    """The directory of seven pairs, so that the last batch of an epoch is a short one, and of a lead that passes."""
    path = tmp_path_factory.mktemp("mined")
    lines = "".join(pair.model_dump_json() + "\n" for pair in pairs_of(teach(), 7))
    for name in (files.TRAIN, files.HELD_OUT):
        (path / name).write_text(lines)
    (path / "lead.json").write_text(LEAD)
    return path


def made(settings: Config, stage: Stage, root: Path, watch: Watch = no_progress, stop: Stop | None = None) -> runs.Artifact:
    root.mkdir(exist_ok=True)
    return StageRunner(Inputs(settings, root, watch), stop).make(stage)


def killed_again_and_again(settings: Config, stage: Stage, root: Path) -> tuple[runs.Artifact, list[int]]:
    """Attempt n is killed when it tells of its progress for the n-th time; also what the last attempt told."""
    for attempt in itertools.count(1):
        watch = Tells(attempt)
        try:
            return made(settings, stage, root, watch), [done for done, *_ in watch.told]
        except Killed:
            assert not (root / str(stage.id)).exists()
    raise AssertionError


def assert_the_same(ours: Path, theirs: Path) -> None:
    """All files to the bit, but for times."""
    found, expected = dict(kills_benchmark.content(ours)), dict(kills_benchmark.content(theirs))
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def settings_of(project: Path, **sections: Any) -> Config:
    base = config(project, Path("unused")).model_dump()
    always = {"checkpoints": {"every_seconds": 0.0, "share": 1.0}}
    return Config.model_validate(base | always | sections)


LORA = {"rank": 4, "dropout": 0.2}
SMALL = {"micro_batch_tokens": 400}
GRPO = {"steps": 3, "questions_per_step": 2, "group_size": 4, "learning_rate": 3e-3, "training": SMALL}
DISTILL = {"epochs": 2, "batch_size": 4, "learning_rate": 3e-3, "training": {"micro_batch_tokens": 200}}
TRAINING = {
    "GRPO, adapters": {
        "grpo": GRPO | {"lora": LORA, "epochs": 2, "training": SMALL | {"schedule": "linear", "warmup": 0.3}}
    },
    "GRPO, all weights, two mini-batches, groups kept": {
        "grpo": GRPO | {"mini_batches": 2, "keep_groups": True, "kl_coefficient": 0.1, "replay": {"examples_per_step": 2}}
    },
    "distillation, adapters": {"distill": DISTILL | {"lora": LORA}},
    "distillation, all weights": {
        "distill": DISTILL | {"weights": "all", "training": {"micro_batch_tokens": 200, "optimizer": "muon"}}
    },
    "fine-tuning": {"distill": DISTILL | {"objective": "sft", "lora": LORA, "epochs": 3}},
}  # fmt: skip


def training(project: Path, mined: Path, case: str) -> tuple[Config, Stage]:
    policy = str(project / "policy")
    lead = None if case == "fine-tuning" else mined
    return settings_of(project, **TRAINING[case]), Grpo(policy, 1) if "GRPO" in case else Distill(policy, mined, lead, 1)


@pytest.fixture(scope="module")
def undisturbed(project, mined, tmp_path_factory) -> Callable[[str], tuple[runs.Artifact, int]]:
    """What a stage makes that is never interrupted, and the number of its passes."""

    @cache
    def of(case: str) -> tuple[runs.Artifact, int]:
        run, passes = TrainedPolicy.run, []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainedPolicy, "run", lambda *args: passes.append(1) or run(*args))
            return made(*training(project, mined, case), tmp_path_factory.mktemp("whole")), len(passes)

    return of


@pytest.mark.parametrize("case", TRAINING)
def test_training(project, mined, undisturbed, tmp_path, case):
    """The step that is killed was not saved, the one before it was."""
    settings, stage = training(project, mined, case)
    whole, _ = undisturbed(case)
    again, told = killed_again_and_again(settings, stage, tmp_path / "killed")
    assert again.manifest.attempts > 2
    assert told[-1] == whole.manifest.result["steps"]
    assert_the_same(tmp_path / "killed", whole.path.parent)
    if "kept" in case:
        groups = list(pool.read(again.path / pool.FILE))
        assert len({group.question.id for group in groups}) == len(groups)
        assert {len(group.trajectories) for group in groups} == {4}


@pytest.mark.parametrize("case", TRAINING)
def test_a_signal_between_two_passes(project, mined, undisturbed, tmp_path, monkeypatch, case):
    """SIGTERM in every third pass of an attempt, until all is done: what is done of a step is not done again."""
    settings, stage = training(project, mined, case)
    whole, total = undisturbed(case)
    run, passes = TrainedPolicy.run, []

    def counted(self: TrainedPolicy, *args: Any) -> Any:
        passes.append(attempts)
        if passes.count(attempts) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return run(self, *args)

    monkeypatch.setattr(TrainedPolicy, "run", counted)
    attempts = 0
    while not (tmp_path / "cut" / str(stage.id)).exists():
        attempts += 1
        try:
            with on_signals() as stop:
                made(settings, stage, tmp_path / "cut", stop=stop)
        except Stopped:
            continue
    assert attempts > settings.grpo.steps
    assert len(passes) == total
    assert_the_same(tmp_path / "cut", whole.path.parent)


SAMPLING = {
    "pool": lambda policy, mined: Pool(policy, 1),
    "evaluation": lambda policy, mined: Evaluate(policy, "base"),
    "lead": lambda policy, mined: MeasureLead(policy, mined, 1),
}


@pytest.mark.parametrize("case", SAMPLING)
def test_sampling(project, mined, tmp_path, monkeypatch, case):
    """Chunks of a question or two. What the last attempt tells counts the chunks that were there."""
    monkeypatch.setattr(sampler, "_BATCHES_AT_ONCE", 1)
    settings = settings_of(project, lead={"samples": 1}, pool={"group_size": 4})
    stage = SAMPLING[case](str(project / "policy"), mined)
    watch = Tells()
    whole = made(settings, stage, tmp_path / "whole", watch)
    again, told = killed_again_and_again(settings, stage, tmp_path / "killed")
    assert again.manifest.attempts > 2
    assert again.manifest.files.keys() == whole.manifest.files.keys()
    total = watch.told[-1][1]
    assert len({done for done, *_ in watch.told}) == total
    assert told[-1] == total
    assert len(told) <= total + 1  # an evaluation ends with its figures
    assert watch.told[-1][2]
    assert_the_same(tmp_path / "killed", tmp_path / "whole")


def test_a_pool_tells_what_it_has(project, tmp_path):
    watch = Tells()
    settings = settings_of(project, pool={"group_size": 4})
    result = made(settings, Pool(str(project / "policy"), 1), tmp_path, watch).manifest.result
    assert (result["questions"], sum(result["stop_reasons"].values()), len(watch.told)) == (3, 12, 12)
    said = watch.told[-1][2]
    assert f"EM {result['em']:.3f}, " in said
    assert f" {result['searches']:.2f} searches, " in said
    assert all(f"{name} {count}" in said for name, count in result["stop_reasons"].items())
    seconds = sum(result["seconds"].values())
    assert set(result["seconds"]) == {"sampling", "retrieval", "rest"}
    assert result["trajectories_per_second"] == pytest.approx(12 / seconds, rel=0.05)
    assert result["tokens_per_second"] == pytest.approx(12 * result["tokens"] / seconds, rel=0.05)


def test_demonstrations(tmp_path):
    """A source that draws from an iterator skips what was trained on: a cold start."""

    def batches() -> Iterator[list[Any]]:
        dice = random.Random(1)
        while True:
            yield [sample(dice.randrange(10**6)) for _ in range(2)]

    def stage(out: Path, checkpointer: Checkpointer, progress: Callable[..., None]) -> tuple[list[float], Any]:
        policy = copy.deepcopy(teach())
        for layer in policy.model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        trained = TrainedPolicy(policy.model, TrainingConfig(optimizer="muon"), frozen_start=False)
        out.mkdir(exist_ok=True)
        context = StageContext(out, 2, progress, checkpointer=checkpointer)
        steps = train(trained, BatchSource(batches(), 1024), {"sft": Sft()}, trained.config, Schedule(6, 1e-2), context)
        return [step["loss"] for step in steps], weights(trained.finish())

    def killed_at(at: int) -> Callable[..., None]:
        def progress(done: int, *_: object) -> None:
            if done == at:
                raise Killed

        return progress

    def resumed(at: int) -> tuple[list[float], Any]:
        saving = Checkpointer(tmp_path / "work", every_seconds=0, share=1)
        return stage(tmp_path / "killed", saving, killed_at(at))

    losses, expected = stage(tmp_path / "whole", Checkpointer(), killed_at(0))
    for at in (2, 5):
        with pytest.raises(Killed):
            resumed(at)
    again, found = resumed(0)
    assert again == losses
    assert equal(found, expected)
    assert len(set(losses)) == 6


def test_each_epoch_has_an_order_of_its_own_that_follows_from_the_seed():
    samples = [sample(i) for i in range(7)]

    def epochs(seed: int) -> list[tuple[str, ...]]:
        source = EpochSource(samples, 3, seed)
        assert source.steps == 3
        asked = [[s.question_id for s in source.next(step)["distill"]] for step in range(6)]
        assert [len(batch) for batch in asked] == [3, 3, 1] * 2
        return [tuple(itertools.chain(*asked[:3])), tuple(itertools.chain(*asked[3:]))]

    orders = epochs(5) + epochs(6)
    assert all(sorted(order) == [s.question_id for s in samples] for order in orders)
    assert len(set(orders)) == 4
    assert epochs(5) == orders[:2]
