"""Live tracking: TensorBoard really writes, and what is read back are the figures of the artifacts, under their names."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from search_e1 import evolve
from search_e1.config import TrackingConfig
from search_e1.errors import ConfigError
from search_e1.runs.stage_id import StageId
from search_e1.stages import tracking
from test_evolve import config, project

assert project  # the fixture: a tiny policy, passages and questions


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(directory)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_the_figures_of_every_stage(project, tmp_path):
    settings = config(project, tmp_path / "run").model_copy(update={"tracking": TrackingConfig(report_to=("tensorboard",))})
    summary = evolve.train(settings)
    run = settings.run
    assert {path.name for path in (run / "tracking").iterdir()} == {"grpo-1", "ofsd-1", "rounds", "evaluation"}
    for stage in ("grpo-1", "ofsd-1"):
        steps = [json.loads(line) for line in (run / stage / "steps.jsonl").read_text().splitlines()]
        told = scalars(run / "tracking" / stage)
        assert set(told) == {f"train/{name}" for step in steps for name in step} - {"train/step", "train/seconds"}
        for name in {name for step in steps for name in step} - {"step", "seconds"}:
            stored = [(step["step"], pytest.approx(step[name], rel=1e-6)) for step in steps if name in step]
            assert told[f"train/{name}"] == stored
    evaluated = scalars(run / "tracking" / "evaluation")
    for name in ("em", "em_sampled", "f1", "searches", "tokens"):
        steps = [tracking.run_of(StageId.parse(f"evaluation-{p.stage}"))[1] for p in summary.policies]
        stored = [(i, pytest.approx(getattr(p, name), rel=1e-6)) for i, p in zip(steps, summary.policies, strict=True)]
        # Files of one second are read in the order of their names, not of the policies.
        assert sorted(evaluated[f"eval/{'em_greedy' if name == 'em' else name}"]) == stored
    assert evaluated["eval/tiny/em_greedy"] == evaluated["eval/macro_em_greedy"] == evaluated["eval/em_greedy"]
    rounds = scalars(run / "tracking" / "rounds")
    assert rounds["train/lead/lead"] == [(1, pytest.approx(summary.lead["1"], abs=1e-6))]
    assert {tag for tag in rounds if "/em" in tag} >= {"train/pool/em_sampled", "train/lead/em_sampled_plain"}
    assert not {tag for tag in (*rounds, *evaluated) if tag.endswith("/em")}
    assert rounds["train/pairs/usable"] == [(1, summary.rounds["1"].pairs["usable"])]
    # It changes nothing in a run: whoever turns it off gets the run that is there.
    assert evolve.train(config(project, tmp_path / "run")) == summary


def test_a_killed_stage_leaves_nothing_behind(tmp_path):
    settings = TrackingConfig(report_to=("tensorboard",))
    for value in (1.0, 2.0):
        with tracking.tracked(settings, tmp_path, "grpo-1", {}) as track:
            track(1, {"reward": value})
    assert scalars(tmp_path / "tracking" / "grpo-1") == {"train/reward": [(1, 2.0)]}


def test_only_the_first_process_tells(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with tracking.tracked(TrackingConfig(report_to=("tensorboard",)), tmp_path, "grpo-1", {}) as track:
        track(1, {"reward": 1.0})
    assert not (tmp_path / "tracking").exists()


@pytest.mark.parametrize(
    ("stage", "run"),
    [
        ("grpo-2", ("grpo-2", 0)), ("coldstart", ("coldstart", 0)), ("lead-3", ("rounds", 3)),
        ("evaluation-base", ("evaluation", 0)), ("evaluation-coldstart", ("evaluation", 1)),
        ("evaluation-grpo-2", ("evaluation", 4)),
        ("evaluation-ofsd-2", ("evaluation", 5)), ("evaluation-mine", ("evaluation-mine", 0)),
    ],
)  # fmt: skip
def test_stages_are_runs_or_steps_of_one(stage, run):
    assert tracking.run_of(StageId.parse(stage)) == run


def test_trackers_that_are_not_there_are_refused_before_any_work(project, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    for tracker, message in (
        ("tensorbord", "no tracker 'tensorbord'; did you mean 'tensorboard'"),
        ("wandb", "'wandb' needs the package wandb; pip install wandb"),
    ):
        settings = config(project, tmp_path / "run").model_copy(update={"tracking": TrackingConfig(report_to=(tracker,))})
        with pytest.raises(ConfigError, match=message):
            evolve.train(settings)
    assert not list((tmp_path / "run").glob("*-*"))
