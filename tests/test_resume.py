"""A stage that was killed and goes on ends as one that was never interrupted, to the bit."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import PASSAGES, TinyRetriever
from search_e1.checkpoints import Work
from search_e1.config import GrpoConfig, LoraConfig, ReplayConfig
from search_e1.grpo import trainer as grpo
from search_e1.policy import Policy
from search_e1.progress import silent
from taught import LIMITS, QUESTIONS, teach


class Killed(BaseException):
    pass


class KilledAt:
    """Progress that dies at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, done: int, total: int, figure: str = "") -> None:
        if done == self.step:
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
        return {key: without_times(part) for key, part in value.items() if not key.startswith("seconds")}
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


GRPO = GrpoConfig(steps=5, questions_per_step=2, group_size=6, learning_rate=3e-3)
LINEAR = {"lr_scheduler_type": "linear", "per_device_train_batch_size": 4}


@pytest.mark.parametrize(
    ("changes", "kills"),
    [
        ({}, (2, 5)),
        ({"lora": LoraConfig(rank=4, dropout=0.2), "trainer": LINEAR}, (3,)),
        ({"replay": ReplayConfig(examples_per_step=2), "trainer": {"num_iterations": 2, **LINEAR}}, (4, 5)),
    ],
    ids=["plain", "adapters", "replay and two iterations"],
)
def test_grpo(taught, tmp_path, changes, kills):
    def stage(**kwargs) -> dict[str, float]:
        config = GRPO.model_copy(update=changes)
        return grpo.train(copy.deepcopy(taught), QUESTIONS, TinyRetriever(PASSAGES), config, LIMITS, seed=3, **kwargs)

    whole = never_interrupted(stage, tmp_path / "whole")
    assert without_times(interrupted(stage, tmp_path / "killed", *kills)) == without_times(whole)
    assert_equal(tmp_path / "killed", tmp_path / "whole")
