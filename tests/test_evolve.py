"""The whole loop on CPU: one round, killed and gone on with, refused without a lead."""

import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import PASSAGES
from forking import end, fork
from search_e1 import evolve, runs
from search_e1.cli import main as cli
from search_e1.cli.display import summary_table
from search_e1.config import CheckpointsConfig, Config
from search_e1.errors import ConfigError, DataError, NoLeadError, RunError, SearchE1Error
from search_e1.stages import tracking
from taught import QUESTIONS, teach
from test_report import report

STAGES = [
    "index", "recall", "evaluation-base", "preflight", "grpo-1", "evaluation-grpo-1", "pool-1", "pairs-1", "lead-1", "ofsd-1",
    "evaluation-ofsd-1",
]  # fmt: skip


KILLS = importlib.util.spec_from_file_location("kills", Path(__file__).parent.parent / "benchmarks" / "kills.py")
assert KILLS
assert KILLS.loader
kills_benchmark = importlib.util.module_from_spec(KILLS)
sys.modules["kills"] = kills_benchmark
KILLS.loader.exec_module(kills_benchmark)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A policy with habits, passages and questions, on disk."""
    root = tmp_path_factory.mktemp("project")
    teach().save(root / "policy")
    rows = [{"id": p.id, "contents": p.contents} for p in PASSAGES]
    (root / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"id": q.id, "question": q.text, "golden_answers": q.answers, "metadata": {"hops": 1}} for q in QUESTIONS]
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return root


def config(project: Path, run: Path, **lead) -> Config:
    return Config.model_validate(
        {
            "run": run,
            "seed": 1,
            "rounds": 1,
            "policy": {"model": str(project / "policy"), "device": "cpu"},
            "data": {
                "corpus": project / "corpus.jsonl",
                "train": [project / "questions.jsonl"],
                "eval": {"tiny": project / "questions.jsonl"},
            },
            "rollout": {
                "max_searches": 2, "topk": 1, "max_action_tokens": 24, "max_observation_tokens": 60, "max_tokens": 300,
                "batch_size": 2,
            },
            "grpo": {"steps": 2, "questions_per_step": 2, "group_size": 6, "learning_rate": 1e-3},
            "pool": {"group_size": 8},
            "lead": {"enforce": False, "samples": 1, "max_share": 0.4} | lead,
            "distill": {"epochs": 2, "batch_size": 2, "learning_rate": 1e-3},
        }
    )  # fmt: skip


class Watch:
    """Notes which stages work; does ``then`` when the stage ``at[0]`` begins, or has told its progress ``at[1]`` times."""

    def __init__(self, at: tuple[str, int] = ("", 0), then: Callable[[], None] = lambda: None) -> None:
        self.worked: list[str] = []
        self.at, self.then = at, then

    @contextmanager
    def __call__(self, stage: str):
        self.worked.append(stage)
        told = 0

        def progress(done: int, total: int, figure: str = "") -> None:
            nonlocal told
            told += 1
            if self.at == (stage, told):
                self.then()

        if self.at == (stage, 0):
            self.then()
        yield progress


@pytest.fixture(scope="module")
def finished(project, tmp_path_factory) -> tuple[Config, Watch, evolve.Summary]:
    settings, watch = config(project, tmp_path_factory.mktemp("runs") / "run"), Watch()
    return settings, watch, evolve.train(settings, watch)


def test_one_round_makes_every_stage_and_says_so(finished):
    settings, watch, summary = finished
    assert watch.worked == STAGES
    assert [p.stage for p in summary.policies] == ["base", "grpo-1", "ofsd-1"]
    assert set(summary.seconds) == set(STAGES) - {"index"}
    stored = json.loads((settings.run / "summary.json").read_text())
    assert [p["stage"] for p in stored["policies"]] == ["base", "grpo-1", "ofsd-1"]
    assert {"em", "em_sampled", "searches", "tokens", "by_hops"} <= set(stored["policies"][0])
    measured = json.loads((settings.run / "lead-1" / "lead.json").read_text())
    assert stored["lead"] == {"1": measured["em_privileged"] - measured["em_plain"]}
    pairs = stored["rounds"]["1"]["pairs"]
    assert pairs["train_pairs"] + pairs["held_out_pairs"] == pairs["pairs"] > 0


def test_each_policy_is_another_one_and_loads_anywhere(finished, project):
    _, _, summary = finished
    files = [project / "policy", *(Path(p.path) for p in summary.policies[1:])]
    weights = [load_file(path / "model.safetensors") for path in files]
    for before, after in pairwise(weights):
        assert before.keys() == after.keys()
        assert any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoModelForCausalLM.from_pretrained(files[-1]).num_parameters() > 0
    assert all((path / "search_e1.json").read_text() == (project / "policy" / "search_e1.json").read_text() for path in files)


def test_the_report_shows_what_the_run_made(finished, tmp_path):
    settings, _, summary = finished
    overview, records = report(settings.run, tmp_path / "report.html")
    assert overview["finished"]
    shown = [(p["stage"], p["em"], p["em_sampled"], p["searches"], p["tokens"]) for p in overview["policies"]]
    assert shown == [(p.stage, p.em, p.em_sampled, p.searches, p.tokens) for p in summary.policies]
    assert [g["gain"] for g in overview["gains"]] == pytest.approx([b.em - a.em for a, b in pairwise(summary.policies)])
    costs = {cost["stage"]: cost for cost in overview["costs"]}
    assert {name: costs[name]["seconds"] for name in summary.seconds} == summary.seconds
    assert all(cost["sampled_tokens"] for name, cost in costs.items() if name.split("-")[0] in ("grpo", "pool", "lead"))
    groups = [json.loads(line) for line in (settings.run / "evaluation-base" / "sampled.jsonl").read_text().splitlines()]
    sampled = sum(len(turn["action_ids"]) for g in groups for t in g["trajectories"] for turn in t["turns"])
    greedy = sum(t["tokens"] for t in records["trajectories"] if t["stage"] == "base")
    assert costs["evaluation-base"]["sampled_tokens"] == sampled + greedy
    measured = summary.rounds["1"].lead
    assert measured
    divergences = [kl for pair in records["pairs"] for kl in pair["kl"]["kl"]]
    assert sum(divergences) == pytest.approx(sum(part.tokens * part.mean for part in measured.kl.values()), rel=1e-4)
    assert all("".join(p["kl"]["pieces"]) == "".join(t["text"] for t in p["student"]["turns"]) for p in records["pairs"])


def test_without_distillation_a_round_is_grpo_alone(finished, tmp_path):
    """Branched off, so that all it needs is there; the report takes it for finished."""
    whole, _, summary = finished
    watch, settings = Watch(), whole.model_copy(update={"run": tmp_path / "run", "ofsd": "never"})
    alone = evolve.train(settings, watch, branch_of=whole.run)
    assert watch.worked == []
    assert [(p.stage, p.em, p.tokens) for p in alone.policies] == [(p.stage, p.em, p.tokens) for p in summary.policies[:2]]
    assert alone.rounds == {}
    overview, _ = report(settings.run, tmp_path / "report.html")
    assert overview["finished"]


def test_fine_tuning_on_references_asks_no_teacher(finished, tmp_path):
    """Branched off: the pairs are the same, no lead is measured or enforced, and the report takes it."""
    whole, _, _ = finished
    sections = {"lead": whole.lead.model_copy(update={"enforce": True, "minimum": 1.0})}
    sections |= {"distill": whole.distill.model_copy(update={"objective": "sft"})}
    watch = Watch()
    made = evolve.train(whole.model_copy(update={"run": tmp_path / "run", **sections}), watch, branch_of=whole.run)
    assert watch.worked == ["ofsd-1", "evaluation-ofsd-1"]
    assert [p.stage for p in made.policies] == ["base", "grpo-1", "ofsd-1"]
    assert (made.rounds["1"].lead, made.rounds["1"].refused, made.lead) == (None, None, {"1": None})
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / "run" / "pairs-1" / name).read_bytes() == (whole.run / "pairs-1" / name).read_bytes()
    summary_table(made)
    overview, _ = report(tmp_path / "run", tmp_path / "report.html")
    assert overview["finished"]


def test_a_second_call_does_no_work(finished):
    settings, _, summary = finished
    before = {p: p.stat().st_mtime_ns for p in settings.run.rglob("*") if p.is_file() and p.parent != settings.run}
    watch = Watch()
    assert evolve.train(settings, watch) == summary
    assert watch.worked == []
    assert before == {p: p.stat().st_mtime_ns for p in settings.run.rglob("*") if p.is_file() and p.parent != settings.run}


def test_a_run_that_is_killed_again_and_again_ends_the_same_to_the_bit(finished, project, tmp_path):
    """SIGKILL at a point in each kind of stage, and twice in one."""
    whole, _, _ = finished
    saving = {"every_seconds": 0.0, "share": 1.0}
    settings = config(project, tmp_path / "run").model_copy(update={"checkpoints": CheckpointsConfig(**saving)})
    kills = [
        ("evaluation-base", 4), ("grpo-1", 2), ("evaluation-grpo-1", 0), ("pool-1", 20), ("lead-1", 2), ("ofsd-1", 1),
        ("ofsd-1", 2), ("evaluation-ofsd-1", 6),
    ]  # fmt: skip
    for at in kills:
        watch = Watch(at, then=lambda: os.kill(os.getpid(), signal.SIGKILL))
        assert end([fork(evolve.train, settings, watch)]) == [-signal.SIGKILL], at
    evolve.train(settings)
    assert dict(kills_benchmark.content(settings.run)) == dict(kills_benchmark.content(whole.run))
    attempts = {
        stage: runs.read(settings.run / stage).manifest.attempts for stage in STAGES if stage not in ("index", "recall")
    }
    expected = dict.fromkeys(attempts, 1)
    for stage, _ in kills:
        expected[stage] += 1
    assert attempts == expected


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    finished, project, tmp_path, capfd, monkeypatch, signum, status
):
    whole, _, _ = finished
    run = tmp_path / "run"
    shutil.copytree(whole.run, run)
    for stage in STAGES[STAGES.index("grpo-1") :]:
        shutil.rmtree(run / stage)
    written = json.dumps(config(project, run).model_dump(mode="json", exclude_none=True))
    (tmp_path / "run.json").write_text(written)
    monkeypatch.setattr("search_e1.config.load", lambda *_: config(project, run))
    watch = Watch(("grpo-1", 1), then=lambda: os.kill(os.getpid(), signum))
    monkeypatch.setattr("search_e1.cli.display.watch", lambda *_: watch)
    monkeypatch.setattr("sys.argv", ["search-e1", "train", "--config", "run.json"])
    assert end([fork(cli.main)]) == [status]
    told = capfd.readouterr().err
    assert f"{signum.name}: finishing the step; repeat to stop immediately\n" in told
    assert told.endswith(f"search-e1: stopped by {signum.name}; run the same command again to resume\n")
    work = run / ".grpo-1.partial" / ".work"
    assert [path.name for path in work.glob("step-*")] == ["step-0000000001"]
    monkeypatch.setattr("search_e1.cli.display.watch", lambda *_: Watch(("evaluation-grpo-1", 0), then=lambda: sys.exit(7)))
    assert end([fork(cli.main)]) == [7]
    weights = "grpo-1/policy/model.safetensors"
    assert (run / weights).read_bytes() == (whole.run / weights).read_bytes()


def test_without_a_lead_nothing_is_distilled_and_the_run_says_why(finished, tmp_path):
    """The tiny policy was never shown a reference: it cannot lead by 0.9. Branched off for what comes before."""
    whole, _, _ = finished
    lead = whole.lead.model_copy(update={"enforce": True, "minimum": 0.9})
    settings, watch = whole.model_copy(update={"run": tmp_path / "run", "lead": lead}), Watch()
    summary = evolve.train(settings, watch, branch_of=whole.run)
    assert watch.worked == []  # the gate alone has changed: the measured lead is judged again, not measured
    assert [p.stage for p in summary.policies] == ["base", "grpo-1"]
    assert not (settings.run / "ofsd-1").exists()
    assert summary.rounds["1"].refused
    assert "the teacher does not lead" in summary.rounds["1"].refused
    assert summary.lead["1"] is not None


def test_where_no_teacher_follows_its_reference_nothing_is_distilled_and_the_run_says_why(finished, tmp_path, monkeypatch):
    whole, _, _ = finished

    def none_follows(*_):
        raise NoLeadError("none of 3 teachers follows its reference")

    monkeypatch.setattr("search_e1.stages.distill.verified", none_follows)
    verified = whole.distill.model_copy(update={"teachers": "verified"})
    settings = whole.model_copy(update={"run": tmp_path / "run", "distill": verified})
    summary = evolve.train(settings, branch_of=whole.run)
    assert [p.stage for p in summary.policies] == ["base", "grpo-1"]
    assert summary.rounds["1"].refused == "none of 3 teachers follows its reference"
    assert summary.rounds["1"].lead is not None
    assert not (settings.run / "ofsd-1").exists()


def test_a_run_directory_of_another_config_is_refused(finished, project):
    settings, _, _ = finished
    before = sorted(settings.run.rglob("*"))
    changed = settings.model_copy(update={"seed": 2})
    with pytest.raises(RunError, match=r"seed: was 1, now 2"):
        evolve.train(changed)
    assert sorted(settings.run.rglob("*")) == before


def test_a_stage_says_what_it_was_made_of(finished, project):
    """Names of settings and inputs: what decides whether an artifact may be used again."""
    settings, _, _ = finished
    manifests = {stage: runs.read(settings.run / stage).manifest for stage in STAGES}
    always = {"policy", "prompts"}
    assert {stage: set(made.settings) - always for stage, made in manifests.items()} == {
        "index": set(),
        "recall": {"rollout", "data.max_eval"},
        **{f"evaluation-{name}": {"evaluation", "rollout", "data.max_eval"} for name in ("base", "grpo-1", "ofsd-1")},
        "preflight": {"rollout", "grpo.group_size", "grpo.temperature", "data.max_train", "data.max_eval"},
        "grpo-1": {"grpo", "rollout", "reference"},
        "pool-1": {"pool", "rollout"},
        "pairs-1": {"reference", "pairs", "lead.pairs", "lead.max_share"},
        "lead-1": {"lead.samples", "rollout", "pool.temperature"},
        "ofsd-1": {"distill"},
    }
    assert all(always <= made.settings.keys() for stage, made in manifests.items() if stage != "index")
    sampled = {"policy", "retrieval", "train.0", "max_train"}
    evaluated = {"policy", "retrieval", "eval.tiny", "recall"}
    assert {stage: set(made.inputs) for stage, made in manifests.items()} == {
        "index": {"corpus"},
        "recall": {"retrieval", "eval.tiny"},
        "evaluation-base": evaluated,
        "evaluation-grpo-1": evaluated,
        "evaluation-ofsd-1": evaluated,
        "preflight": sampled | {"eval.tiny", "evaluation"},
        "grpo-1": sampled,
        "pool-1": sampled,
        "pairs-1": {"policy", "reader", "pool"},
        "lead-1": sampled | {"pairs"},
        "ofsd-1": {"policy", "pairs"},
    }
    trained = runs.checksum(settings.run / "grpo-1" / "policy")
    assert {manifests[stage].inputs["policy"] for stage in ("pool-1", "pairs-1", "lead-1", "ofsd-1")} == {trained}
    assert manifests["grpo-1"].inputs["policy"] == runs.checksum(project / "policy")
    seeds = {stage: made.seed for stage, made in manifests.items() if stage != "index"}
    assert seeds == {stage: runs.derived_seed(1, "evaluation" if stage.startswith("evaluation") else stage) for stage in seeds}


def test_each_checksum_is_computed_once(finished, monkeypatch):
    settings, _, _ = finished
    asked: list[Path] = []
    checksum = runs.checksum
    monkeypatch.setattr(runs, "checksum", lambda path: asked.append(path) or checksum(path))
    evolve.train(settings)
    policies = [path for path in asked if path.name == "policy"]
    assert len(policies) == len(set(policies)) == 3


MISTAKES = {
    "grpo.objective": ({"grpo": {"objective": "gropo"}}, "did you mean 'grpo'"),
    "distill.objective": ({"distill": {"objective": "sff"}}, "did you mean 'sft'"),
    "own objective": ({"distill": {"objective": "nowhere:Objective"}}, "distill.objective = 'nowhere:Objective'"),
    "tracker": ({"tracking": {"report_to": ["tensorbord"]}}, "did you mean 'tensorboard'"),
    "tracker not installed": ({"tracking": {"report_to": ["wandb"]}}, "pip install wandb"),
    "too few questions": ({"grpo": {"questions_per_step": 99}}, r"questions_per_step = 99, but there are 3"),
    "retriever": ({"retrieval": {"kind": "nowhere:Retriever"}}, "retrieval.kind = 'nowhere:Retriever'"),
    "engine": ({"rollout": {"engine": "vlm"}}, r"^rollout\.engine = .vlm.: "),
    "vLLM": ({"rollout": {"engine": "vllm"}}, "vLLM is not installed"),
    "vLLM server": (
        {"rollout": {"engine": "vllm"}, "vllm": {"url": "http://127.0.0.1:9"}},
        r"^vllm\.url: GRPO changes",
    ),
    "model": ({"policy": {"model": "./nothing"}}, "no such directory"),
    "context": ({"rollout": {"max_tokens": 8}}, "raise rollout.max_tokens"),
    "demonstrations": (
        {"pairs": {"references_by": "gold"}, "data": {"demonstrations": "nothing.jsonl"}},
        "nothing.jsonl",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_any_stage_is_found_before_the_first(project, tmp_path, monkeypatch, mistake):
    """No stage begins, and the directory belongs to nobody: the mended config may differ in all."""
    changes, message = MISTAKES[mistake]
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    sound = config(project, tmp_path / "run")
    whole = sound.model_dump()
    wrong = Config.model_validate(whole | {"seed": 7} | {name: {**whole[name], **part} for name, part in changes.items()})
    watch = Watch()
    with pytest.raises(SearchE1Error, match=message) as error:
        evolve.train(wrong, watch)
    assert "\n" not in str(error.value)
    assert set(watch.worked) <= {"index"}
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} <= {"index"}

    def begins() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evolve.train(sound, Watch(("recall", 0), begins))


def test_two_questions_with_one_id(project, tmp_path):
    rows = (project / "questions.jsonl").read_text()
    (tmp_path / "more.jsonl").write_text(rows)
    settings = config(project, tmp_path / "run")
    twice = settings.data.model_copy(update={"train": (*settings.data.train, tmp_path / "more.jsonl")})
    with pytest.raises((ConfigError, DataError), match="id"):
        evolve.train(settings.model_copy(update={"data": twice}))
    assert not [path for path in (tmp_path / "run").iterdir() if path.is_dir()]
