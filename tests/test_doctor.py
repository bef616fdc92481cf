"""The doctor on policies of a few thousand weights: a sound run, one that cannot learn, one whose policy does not load."""

import json

import pytest
import torch

from conftest import make_tiny_policy
from search_e1 import evolve
from search_e1.cli import main as cli
from search_e1.config import Config
from search_e1.errors import ConfigError
from search_e1.evaluation.preflight import Level
from search_e1.lab import doctor
from search_e1.lab.plan.plan import misfits
from test_evolve import config, project
from test_preflight import mute, settings_of
from test_torchrun import toml

assert project
assert mute
AUDIT = ("reach", "reach", "wording", "repeats")


def run(monkeypatch, capsys, *words):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["search-e1", "doctor", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code, capsys.readouterr()


def test_a_sound_run(project, tmp_path, monkeypatch, capsys):
    settings = config(project, tmp_path / "run")
    status, said = run(monkeypatch, capsys, "--config", toml(settings, tmp_path / "c.toml"), "--json", tmp_path / "found.json")
    assert status == 0
    assert max(map(len, said.out.splitlines())) <= 80
    found = json.loads((tmp_path / "found.json").read_text())
    levels = {row["check"]: row["level"] for row in found["findings"]}
    assert list(levels) == ["policy", "form", "search", "groups", "answers", "overlap", *AUDIT[1:], "memory", "time"]
    assert {name for name, level in levels.items() if level != "ok"} == {"overlap"}  # evaluated on what is trained on
    assert found["observed"]["trajectories"] == 3 * 6 + 3
    assert found["observed"]["groups"] == 3
    assert "GRPO's updates" in found["findings"][-1]["text"]
    assert "3 of 3 evaluation questions are training questions" in " ".join(said.out.split())
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_learn(mute, tmp_path, monkeypatch, capsys):
    file = toml(settings_of(mute, tmp_path / "run"), tmp_path / "c.toml")
    status, said = run(monkeypatch, capsys, "--config", file, "--grpo.group_size", "20")
    assert status == 1
    words = " ".join(said.out.split())
    assert "stop form None of 84 trajectories made a search or gave an answer" in words
    assert "Add a [coldstart] section" in words
    assert words.endswith("The run cannot learn.")
    # 4 questions x 6 and 4 greedy answers are too few to be certain.
    status, said = run(monkeypatch, capsys, "--config", file)
    assert status == 0
    assert "warning form 100% of 28 trajectories are malformed." in " ".join(said.out.split())


def test_a_policy_whose_template_drops_the_question(project, tmp_path, monkeypatch, capsys):
    policy = make_tiny_policy()
    policy.tokenizer.chat_template = "{% for m in messages %}hello{% endfor %}"
    policy.save(tmp_path / "policy")
    settings = config(project, tmp_path / "run")
    file = toml(settings, tmp_path / "c.toml")
    status, said = run(monkeypatch, capsys, "--config", file, "--policy", tmp_path / "policy")
    assert status == 1
    assert "stop policy The policy's chat template drops the question" in " ".join(said.out.split())


def test_the_index_of_the_run_is_taken_over(project, tmp_path):
    settings = config(project, tmp_path / "run")
    evolve.train(settings.model_copy(update={"ofsd": "never", "grpo": settings.grpo.model_copy(update={"steps": 1})}))
    worked = []

    def watch(stage):
        worked.append(stage)
        return doctor.no_progress(stage)

    before = sorted(path for path in settings.run.rglob("*"))
    doctor.examine(settings, watch=watch)
    assert worked == ["sample", "search for answers", "train", "audit"]
    assert sorted(path for path in settings.run.rglob("*")) == before


def test_updates_are_measured(project, tmp_path, monkeypatch):
    settings = config(project, tmp_path / "run")
    calls = []
    honest = doctor.TrainedPolicy.run
    monkeypatch.setattr(doctor.TrainedPolicy, "run", lambda *args: calls.append(args) or honest(*args))
    found = doctor.examine(settings, questions=2, evaluated=1)
    assert len(calls) == 4
    assert found.observed
    assert found.observed.trajectories == 2 * 6 + 1
    assert found.can_learn


def test_memory_that_runs_out_is_a_finding(project, tmp_path, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(doctor, "updates_per_second", fails)
    found = {finding.check: finding for finding in doctor.examine(config(project, tmp_path / "run"), evaluated=1).findings}
    assert found["memory"].level is Level.WARNING
    assert "training is extra" in found["time"].text


def test_weights_that_do_not_fit_stop(project, tmp_path, monkeypatch):
    settings = config(project, tmp_path / "run")
    one_size = settings.grpo.training.model_copy(update={"micro_batch_tokens": 600, "gradient_checkpointing": False})
    settings = settings.model_copy(update={"grpo": settings.grpo.model_copy(update={"training": one_size})})
    settings = settings.model_copy(update={"distill": settings.distill.model_copy(update={"training": one_size})})
    monkeypatch.setattr(doctor, "misfits", lambda *args, **options: misfits(*args, **options, size=2**14))
    stops = [finding for finding in doctor.examine(settings, evaluated=1).findings if finding.level is Level.STOP]
    assert {finding.check for finding in stops} == {"memory"}
    assert stops[0].text.startswith("Grpo: update: needs")
    assert stops[0].remedy


def test_a_key_is_named_as_the_config_writes_it(project, tmp_path, monkeypatch, capsys):
    file = toml(config(project, tmp_path / "run"), tmp_path / "c.toml")
    status, said = run(monkeypatch, capsys, "--config", file, "--policy", "./none")
    assert status == 1
    assert "stop policy policy.model = './none': no such directory or file. Give a directory" in " ".join(said.out.split())


def test_a_mistake_is_one_line(project, tmp_path, monkeypatch, capsys):
    settings = config(project, tmp_path / "run")
    file = toml(settings, tmp_path / "c.toml")
    (tmp_path / "q.jsonl").write_text("{}\n")
    status, said = run(monkeypatch, capsys, "--config", file, "--data.train", tmp_path / "q.jsonl")
    assert status == 2
    assert len(said.err.splitlines()) == 1


def test_a_policy_that_the_cold_start_makes_is_not_looked_at(project, tmp_path):
    settings = config(project, tmp_path / "run")
    made = {"policy": {"model": "new", "device": "cpu"}, "coldstart": {"steps": 1}}
    found = doctor.examine(Config.model_validate(settings.model_dump() | made))
    assert [finding.check for finding in found.findings] == ["answers", "overlap", *AUDIT]
    assert found.observed is None
    assert found.can_learn


def test_demonstrations_that_train_refuses_are_refused(project, tmp_path):
    settings = settings_of(project, tmp_path / "run", coldstart={"steps": 1, "demonstrations": "file"})
    with pytest.raises(ConfigError, match=r"data\.demonstrations is missing; give the path of that file"):
        doctor.examine(settings, questions=1, evaluated=1)


def test_with_a_cold_start_to_come_a_mute_policy_is_no_reason_to_stop(mute, tmp_path):
    settings = settings_of(mute, tmp_path / "run", coldstart={"steps": 1})
    settings = settings.model_copy(update={"grpo": settings.grpo.model_copy(update={"group_size": 16})})
    levels = {finding.check: finding.level for finding in doctor.examine(settings).findings}
    assert levels["form"] is Level.WARNING
    again = doctor.examine(settings, str(mute / "policy"))  # as the cold start would have left it
    assert not again.can_learn
