"""Runs side by side in processes of their own, with a worker that does as its variant is called."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from search_e1.config import Config
from search_e1.errors import RunError
from search_e1.lab.sweep import running
from search_e1.lab.sweep.running import Ending
from search_e1.lab.sweep.spec import Run
from search_e1.runs.stopping import Stop, Stopped, on_signals

WORKER = """
import json, os, signal, sys, time
order = json.loads(sys.stdin.readline())
config = order["config"]
run = config["run"]
os.makedirs(run, exist_ok=True)
open(run + "/begun", "a").write(os.environ["OMP_NUM_THREADS"])
name = run.split("/")[-2]
def save(*_):
    open(run + "/saved", "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
if name == "wrong":
    print("grpo-1 ...")
    print("corpus.jsonl: no such file; give it:\\n  a detail")
    sys.exit(2)
if name == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if name == "stopped":
    os.kill(os.getpid(), signal.SIGTERM)
if name == "orphan":
    sys.stdin.read()
    save()
if name == "long":
    open(run + "/ready", "w").close()
    time.sleep(60)
"""


def a_run(directory: Path, variant: str, seed: int = 0) -> Run:
    config = Config.model_validate(
        {
            "run": directory / "runs" / variant / str(seed),
            "seed": seed,
            "policy": {"model": "small"},
            "data": {"corpus": "c.jsonl", "train": ["t.jsonl"], "eval": {"nq": "e.jsonl"}},
        }
    )
    return Run(variant, seed, config)


@pytest.fixture(autouse=True)
def worker(monkeypatch, tmp_path):
    monkeypatch.setattr(running, "WORKER", [sys.executable, "-S", "-c", WORKER])


def ignore_changes(active, outcomes) -> None:
    pass


def finish(run: Run) -> None:
    run.config.run.mkdir(parents=True, exist_ok=True)
    (run.config.run / running.FINISHED).write_text(json.dumps(running.finished_record(run.config)))


def test_a_run_that_fails_takes_no_other_with_it(tmp_path):
    runs = [a_run(tmp_path, name) for name in ("wrong", "good", "killed", "stopped", "fine")]
    outcomes = running.run_all(runs, tmp_path, 2, Stop(), ignore_changes)
    assert {outcome.run.variant: (outcome.ending, outcome.message) for outcome in outcomes} == {
        "wrong": (Ending.FAILED, "corpus.jsonl: no such file; give it:"),
        "good": (Ending.FINISHED, ""),
        "killed": (Ending.FAILED, "killed by SIGKILL"),
        "stopped": (Ending.STOPPED, "stopped by a signal"),
        "fine": (Ending.FINISHED, ""),
    }
    assert (runs[1].config.run / "begun").read_text() == "1"  # one thread
    log = next(outcome.log for outcome in outcomes if outcome.run.variant == "wrong")
    assert log == tmp_path / "logs" / "wrong-0.log"
    assert "a detail" in log.read_text()


def test_a_finished_run_is_not_begun_again(tmp_path):
    runs = [a_run(tmp_path, "good"), a_run(tmp_path, "fine")]
    finish(runs[0])
    outcomes = running.run_all(runs, tmp_path, 1, Stop(), ignore_changes)
    assert [(outcome.run.variant, outcome.ending) for outcome in outcomes] == [
        ("good", Ending.EARLIER), ("fine", Ending.FINISHED),
    ]  # fmt: skip
    assert not (runs[0].config.run / "begun").exists()


def test_a_variant_that_has_changed_is_refused_before_any_run(tmp_path):
    runs = [a_run(tmp_path, "good"), a_run(tmp_path, "fine")]
    finish(runs[1])
    changed = Run("fine", 0, runs[1].config.model_copy(update={"rounds": 5}))
    with pytest.raises(RunError, match=r"variant 'fine' has changed since it was run \(seed 0\).*\n  rounds: was 2, now 5"):
        running.run_all([runs[0], changed], tmp_path, 1, Stop(), ignore_changes)
    assert not runs[0].config.run.exists()


def test_never_more_at_work_than_jobs_and_other_seeds_first(tmp_path):
    runs = [a_run(tmp_path, variant, seed) for variant in ("a", "b") for seed in (0, 1)]
    seen: list[list[str]] = []
    running.run_all(runs, tmp_path, 2, Stop(), lambda active, _: seen.append([run.name for run in active]))
    assert max(map(len, seen)) == 2
    assert seen[0] == ["a/0", "a/1"]
    assert running._take_next([*runs[1:]], [_Fake(runs[0])]).name == "a/1"
    assert running._take_next([runs[2]], [_Fake(runs[0])]).name == "b/0"  # waits for what it shares, rather than for nothing


class _Fake:
    def __init__(self, run: Run) -> None:
        self.run = run


def test_a_signal_is_passed_on_and_begins_no_other_run(tmp_path):
    runs = [a_run(tmp_path, "long"), a_run(tmp_path, "good")]

    def stop_when_ready() -> None:
        while not (runs[0].config.run / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_ready, daemon=True).start()
    with pytest.raises(Stopped), on_signals() as stop:
        running.run_all(runs, tmp_path, 1, stop, ignore_changes)
    assert (runs[0].config.run / "saved").exists()
    assert not runs[1].config.run.exists()


def test_a_worker_knows_when_the_sweep_is_gone(tmp_path):
    """What the sweep holds open is closed when it dies, however it dies."""
    process = running._Process(a_run(tmp_path, "orphan"), tmp_path, False)
    assert process.process.stdin
    process.process.stdin.close()
    process.process.wait(timeout=30)
    assert (tmp_path / "runs" / "orphan" / "0" / "saved").exists()


def test_a_damaged_record_is_refused(tmp_path):
    run = a_run(tmp_path, "good")
    run.config.run.mkdir(parents=True)
    (run.config.run / running.FINISHED).write_text("{")
    with pytest.raises(RunError, match=r"finished\.json: damaged"):
        running.is_finished(run)
