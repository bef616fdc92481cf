"""A sweep from the shell's side, with a real run of a tiny policy in a process of its own."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
from pyarrow import parquet

from conftest import PASSAGES
from forking import fork
from search_e1 import runs
from search_e1.lab.sweep import running, spec, worker
from taught import QUESTIONS, teach
from test_sweep_results import verb

BASE = """
run = "run"
rounds = 1
policy = {{ model = "{root}/policy", device = "cpu" }}
[data]
corpus = "{root}/corpus.jsonl"
train = "{root}/questions.jsonl"
eval = {{ tiny = "{root}/questions.jsonl" }}
[rollout]
max_searches = 2
topk = 1
max_action_tokens = 24
max_observation_tokens = 60
max_tokens = 300
[grpo]
steps = 1
questions_per_step = 2
group_size = 4
learning_rate = 1e-3
[evaluation]
latency = 0
"""
SWEEP = """
seeds = [4]
[variants.grpo]
ofsd = "never"
"""


@pytest.fixture
def project(tmp_path) -> Path:
    teach().save(tmp_path / "policy")
    rows = [{"id": p.id, "contents": p.contents} for p in PASSAGES]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"id": q.id, "question": q.text, "golden_answers": q.answers} for q in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (tmp_path / "base.toml").write_text(BASE.format(root=tmp_path))
    (tmp_path / "sweep.toml").write_text(SWEEP)
    return tmp_path


class ForkedWorker:
    """As much of a worker's ``Popen`` as a sweep uses, in a copy of this process: importing takes longer than the run."""

    def __init__(self, command: list[str], *, stdout: IO[bytes], env: dict[str, str], **options: Any) -> None:
        assert command == running.WORKER == [sys.executable, "-m", "search_e1.lab.sweep.worker"]
        assert options == {"stdin": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
        read, write = os.pipe()
        self._process = fork(_work, read, write, stdout, env)
        os.close(read)
        self.stdin = os.fdopen(write, "wb")

    def poll(self) -> int | None:
        return self.returncode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid or 0, number)


def _work(read: int, write: int, log: IO[bytes], environment: dict[str, str]) -> None:
    os.close(write)
    for number, file in enumerate((read, log.fileno(), log.fileno())):
        os.dup2(file, number)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    runpy.run_module(running.WORKER[2], run_name="__main__")


def test_a_run_of_a_sweep(project, monkeypatch, capsys):
    monkeypatch.setattr(running.subprocess, "Popen", ForkedWorker)
    out = project / "out"
    words = [project / "sweep.toml", "--config", project / "base.toml", "--out", out]
    status, shown, err = verb(monkeypatch, capsys, *words)
    assert (status, err) == (0, "")
    assert "grpo/4 finished" in shown
    run = out / "runs" / "grpo" / "4"
    shared = {path.name.rpartition("-")[0] for path in (out / "shared").iterdir() if path.is_dir()}
    assert shared == {"index", "recall", "evaluation-base", "preflight", "grpo-1", "evaluation-grpo-1"}
    rows = parquet.read_table(out / "results.parquet").to_pylist()
    [row] = [row for row in rows if row["stage"] == "grpo-1" and row["benchmark"] == "all"]
    manifest = runs.read(run / "grpo-1").manifest
    assert (row["seconds"], row["cpu_seconds"], row["steps"]) == (manifest.seconds, manifest.cpu_seconds, 1)
    assert manifest.cpu_seconds > 0
    evaluated = json.loads((run / "evaluation-grpo-1" / "evaluation.json").read_text())
    assert (row["em"], row["tokens"], row["n"]) == (evaluated["em"], evaluated["tokens"], 3)
    assert (out / "comparison.svg").exists()

    monkeypatch.delattr(running.subprocess, "Popen")  # nothing is left to do, so that none is begun
    assert verb(monkeypatch, capsys, *words)[0] == 0


def test_a_mistake_is_one_line_of_the_log(project, monkeypatch, capsys):
    monkeypatch.setattr(worker, "_end_with_the_sweep", lambda held: None)
    sweep = spec.read(project / "sweep.toml", project / "base.toml", project / "out", ["--data.corpus", "nowhere.jsonl"])
    order = {"config": sweep.runs[0].config.model_dump(mode="json"), "shared": str(project), "other_versions": False}
    (project / "order").write_text(json.dumps(order) + "\n")
    with (project / "order").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert worker.main() == running.MISTAKE
    said = capsys.readouterr().err
    assert said == "data.corpus = 'nowhere.jsonl': no such file; give the path of a JSON lines file\n"
    assert not running.is_finished(sweep.runs[0])
