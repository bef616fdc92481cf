"""The command line under torchrun, two processes on the tiny policy: what one process makes, stopped, killed and resumed.

Importing takes torchrun longer than all of the work; so its agent is a fork of this process, and so are its ranks, but for
those of one test.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args
from torch.distributed.run import main as torchrun_main

from forking import end, fork
from search_e1 import evolve, runs
from search_e1.cli import main as cli
from search_e1.config import Config
from search_e1.errors import ConfigError
from search_e1.runs import ranks
from search_e1.runs.progress import Progress
from test_evolve import config, project
from trained import assert_near

assert project  # the fixture: a tiny policy, passages and questions
BIN = Path(sys.executable).parent
TWO = ("--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
TIMED = ("timings.json", "manifest.json", "manifest.json.sha256")
WITHIN = 30.0
"""Seconds in which all have to end after one was lost."""


def settings_of(project: Path, run: Path) -> Config:
    base = config(project, run)
    sections = {
        "grpo": base.grpo.model_dump() | {"steps": 3, "learning_rate": 1e-4},
        "distill": base.distill.model_dump() | {"learning_rate": 1e-4},
        "checkpoints": {"every_seconds": 0.0, "share": 1.0},
    }
    return Config.model_validate(base.model_dump() | sections)


def toml(settings: Config, path: Path) -> Path:
    """As TOML: each key with its value, which in JSON is TOML's too."""

    def lines(prefix: str, section: dict[str, Any]) -> Iterator[str]:
        for key, value in section.items():
            if isinstance(value, dict):
                yield from lines(f"{prefix}{key}.", value)
            elif value != []:
                yield f"{prefix}{key} = {json.dumps(value)}\n"

    path.write_text("".join(lines("", settings.model_dump(mode="json", exclude_none=True))))
    return path


def at_step(stage: str, step: int, on: int, act: Callable[[], object]) -> Callable[..., Any]:
    """In place of ``display.watch``: rank ``on`` does ``act`` when ``step`` of ``stage`` is complete."""

    @contextmanager
    def watch(name: str) -> Iterator[Progress]:
        def progress(done: int, total: int, figure: str = "") -> None:
            if (name, done, ranks.rank()) == (stage, step, on):
                act()

        yield progress

    return lambda *_: watch


def status_of(agent: Callable[[], object]) -> int | None:
    """The exit status of a process that is ``agent``."""

    def process() -> None:
        status = 0
        try:
            agent()
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    return end([fork(process)])[0]


def torchrun(config: Path, *words: str) -> int | None:
    """``torchrun -- search-e1 train`` whose processes are forked; its exit status."""

    def rank() -> None:
        sys.argv = ["search-e1", "train", "--config", str(config), *words]
        cli.main()

    def agent() -> None:
        launching, *_ = config_from_args(parse_args([*TWO, "unused"]))
        launching.start_method = "fork"
        elastic_launch(launching, entrypoint=rank)()

    return status_of(agent)


def torchrun_command(config: Path) -> int | None:
    """The same with ranks that are commands of their own, as a user's are; only torchrun itself is forked."""
    words = ["--no-python", "--", BIN / "search-e1", "train", "--config", config]
    return status_of(lambda: torchrun_main([*TWO, *map(str, words)]))


@pytest.fixture(scope="module")
def alone(project, tmp_path_factory) -> Path:
    """The run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    evolve.train(settings_of(project, run))
    return run


def assert_the_same(run: Path, alone: Path, *, exact: Path | None = None) -> None:
    """The artifacts of ``alone``, weights but for rounding; ``exact``: those of two processes, to the bit."""
    names = sorted(path.parent.name for path in alone.glob(f"*/{runs.MANIFEST}"))
    assert sorted(path.parent.name for path in run.glob(f"*/{runs.MANIFEST}")) == names
    assert not list(run.glob(".*.partial"))
    for name in names:
        ours, theirs = runs.read(run / name).manifest, runs.read(alone / name).manifest
        assert ours.files.keys() == theirs.files.keys(), name
        assert (ours.settings, ours.seed, ours.inputs.keys()) == (theirs.settings, theirs.seed, theirs.inputs.keys())
    for name in ("index", "recall", "evaluation-base"):  # before any weight changes
        ours, theirs = (
            {n: s for n, s in runs.read(r / name).manifest.files.items() if not n.endswith(TIMED)} for r in (run, alone)
        )
        assert ours == theirs, name
    for name in ("grpo-1", "ofsd-1"):
        weights = [load_file(r / name / "policy" / "model.safetensors") for r in (run, alone)]
        assert_near(*weights, tolerance=1e-3)
        if exact:
            assert runs.checksum(run / name / "policy") == runs.checksum(exact / name / "policy")


@pytest.fixture(scope="module")
def together(project, tmp_path_factory) -> tuple[Path, int | None]:
    """The same run of two processes, never interrupted, and how it ended."""
    place = tmp_path_factory.mktemp("together")
    return place / "run", torchrun(toml(settings_of(project, place / "run"), place / "run.toml"))


def test_two_processes_make_the_artifacts_of_one(together, alone):
    run, status = together
    assert status == 0
    assert_the_same(run, alone)
    ours, theirs = (json.loads((path / evolve.SUMMARY).read_text()) for path in (run, alone))
    assert [p["stage"] for p in ours["policies"]] == ["base", "grpo-1", "ofsd-1"]
    assert ours["policies"][0] == theirs["policies"][0]


def test_a_run_that_is_stopped_and_killed_ends_the_same(project, together, alone, tmp_path, monkeypatch, capfd):
    """SIGTERM to torchrun in GRPO, SIGKILL to a rank in distillation; ranks of the real command finish it."""
    run = tmp_path / "run"
    path = toml(settings_of(project, run), tmp_path / "run.toml")
    monkeypatch.setattr("search_e1.cli.display.watch", at_step("grpo-1", 2, 1, lambda: os.kill(os.getppid(), signal.SIGTERM)))
    assert torchrun(path) == 1
    said = capfd.readouterr().err
    assert said.count("search-e1: stopped by SIGTERM; run the same command again to resume\n") == 1
    saved = run / ".grpo-1.partial" / ".work"
    assert sorted(saved.glob("step-*"))[-1].name in ("step-0000000002", "step-0000000003")

    times = tmp_path / "killed"

    def kill() -> None:
        times.write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("search_e1.cli.display.watch", at_step("ofsd-1", 2, 1, kill))
    assert torchrun(path) == 1
    assert time.time() - float(times.read_text()) < WITHIN
    # Whichever torchrun notices first: the rank that was killed, or the one that lost its peer.
    said = capfd.readouterr().err
    assert "Signal 9 (SIGKILL) received by PID" in said or "by peer" in said
    assert (run / "grpo-1").exists()
    assert not (run / "ofsd-1").exists()
    assert torchrun_command(path) == 0, capfd.readouterr().err
    attempts = {stage: runs.read(run / stage).manifest.attempts for stage in ("evaluation-base", "grpo-1", "ofsd-1")}
    assert attempts == {"evaluation-base": 1, "grpo-1": 2, "ofsd-1": 2}
    assert_the_same(run, alone, exact=together[0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--grpo.objective", "gropo"), "grpo.objective = 'gropo': no such objective; did you mean 'grpo'?"),
        (("--grpo.stepz", "1"), "unknown key 'grpo.stepz'; did you mean 'grpo.steps'?"),
    ],
    ids=["found together", "found before they meet"],
)
def test_a_mistake_is_one_line_of_rank_0(project, tmp_path, capfd, words, said):
    path = toml(settings_of(project, tmp_path / "run"), tmp_path / "run.toml")
    assert torchrun(path, *words) == 1
    lines = "".join(capfd.readouterr()).splitlines()
    [told] = [line for line in lines if line.startswith("search-e1")]
    assert told.endswith(said)
    assert not [path for path in (tmp_path / "run").glob("*") if path.is_dir()]


def test_what_one_rank_finds_alone_is_said_by_it(project, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(cli, "_AFTER_FIRST", 0.1)
    path = toml(settings_of(project, tmp_path / "run"), tmp_path / "run.toml")
    check = evolve.StageRunner.check

    def fails_on_1(self: evolve.StageRunner) -> None:
        check(self)
        if ranks.rank() == 1:
            raise ConfigError("no device")

    monkeypatch.setattr(evolve.StageRunner, "check", fails_on_1)
    assert torchrun(path) == 1
    assert "search-e1, process 1: no device\n" in capfd.readouterr().err
