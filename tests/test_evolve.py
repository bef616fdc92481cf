"""The whole loop on CPU: one round, killed and gone on with, refused without a lead."""

import json
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import PASSAGES
from search_e1 import evolve
from search_e1.config import Config
from search_e1.errors import RunError
from search_e1.progress import silent
from taught import QUESTIONS, teach
from test_report import report

STAGES = [
    "index", "ceiling", "evaluation-base", "grpo-1", "evaluation-grpo-1", "pool-1", "pairs-1", "lead-1", "ofsd-1",
    "evaluation-ofsd-1",
]  # fmt: skip


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
            },
            "grpo": {"steps": 2, "questions_per_step": 2, "group_size": 6, "learning_rate": 1e-3},
            "pool": {"group_size": 8},
            "lead": {"enforce": False, "samples": 1, "max_share": 0.4} | lead,
            "distill": {"epochs": 2, "batch_size": 2, "learning_rate": 1e-3},
        }
    )  # fmt: skip


class Watch:
    """Notes which stages work; may die when one begins, or when it has got somewhere."""

    def __init__(self, die_in: str = "", at: str = "begin") -> None:
        self.worked: list[str] = []
        self.die_in = die_in
        self.at = at

    @contextmanager
    def __call__(self, stage: str):
        self.worked.append(stage)
        if stage == self.die_in and self.at == "begin":
            raise KeyboardInterrupt
        yield self._dies if stage == self.die_in else silent

    def _dies(self, done: int, total: int, figure: str = "") -> None:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def finished(project, tmp_path_factory) -> tuple[Config, Watch, evolve.Summary]:
    settings, watch = config(project, tmp_path_factory.mktemp("runs") / "run"), Watch()
    return settings, watch, evolve.train(settings, watch)


def test_one_round_makes_every_stage_and_says_so(finished):
    settings, watch, summary = finished
    assert watch.worked == STAGES
    assert [p.stage for p in summary.policies] == ["base", "grpo-1", "ofsd-1"]
    assert set(summary.seconds) == set(STAGES) - {"index", "ceiling"}
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
    assert all(
        (path / "search_e1.json").read_text() == (project / "policy" / "search_e1.json").read_text() for path in files
    )


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
    groups = [
        json.loads(line) for line in (settings.run / "evaluation-base" / "sampled.jsonl").read_text().splitlines()
    ]
    sampled = sum(len(turn["action_ids"]) for g in groups for t in g["trajectories"] for turn in t["turns"])
    greedy = sum(t["tokens"] for t in records["trajectories"] if t["stage"] == "base")
    assert costs["evaluation-base"]["sampled_tokens"] == sampled + greedy
    measured = summary.rounds["1"].lead
    assert measured
    divergences = [kl for pair in records["pairs"] for kl in pair["kl"]["kl"]]
    assert sum(divergences) == pytest.approx(sum(part.tokens * part.mean for part in measured.kl.values()), rel=1e-4)
    assert all(
        "".join(p["kl"]["pieces"]) == "".join(t["text"] for t in p["student"]["turns"]) for p in records["pairs"]
    )


def test_a_second_call_does_no_work(finished):
    settings, _, summary = finished
    before = {p: p.stat().st_mtime_ns for p in settings.run.rglob("*") if p.is_file() and p.parent != settings.run}
    watch = Watch()
    assert evolve.train(settings, watch) == summary
    assert watch.worked == []
    assert before == {
        p: p.stat().st_mtime_ns for p in settings.run.rglob("*") if p.is_file() and p.parent != settings.run
    }


@pytest.mark.parametrize(
    ("stage", "at"), [("grpo-1", "middle"), ("pool-1", "middle"), ("ofsd-1", "begin"), ("ofsd-1", "middle")]
)
def test_a_killed_run_goes_on_and_ends_the_same(finished, project, tmp_path, stage, at):
    _, _, summary = finished
    settings, killed, again = config(project, tmp_path / "run"), Watch(stage, at), Watch()
    with pytest.raises(KeyboardInterrupt):
        evolve.train(settings, killed)
    resumed = evolve.train(settings, again)
    assert killed.worked == STAGES[: STAGES.index(stage) + 1]
    assert again.worked == STAGES[STAGES.index(stage) :]
    for ours, theirs in zip(resumed.policies[1:], summary.policies[1:], strict=True):
        a, b = (load_file(Path(p.path) / "model.safetensors") for p in (ours, theirs))
        assert all(torch.equal(a[name], b[name]) for name in b)
        assert (ours.em, ours.em_sampled, ours.tokens) == (theirs.em, theirs.em_sampled, theirs.tokens)


def test_without_a_lead_nothing_is_distilled_and_the_run_says_why(project, tmp_path):
    """The tiny policy was never shown a reference: it cannot lead by 0.9."""
    settings, watch = config(project, tmp_path / "run", enforce=True, minimum=0.9), Watch()
    summary = evolve.train(settings, watch)
    assert [p.stage for p in summary.policies] == ["base", "grpo-1"]
    assert "ofsd-1" not in watch.worked
    assert not (settings.run / "ofsd-1").exists()
    assert summary.rounds["1"].refused
    assert "the teacher does not lead" in summary.rounds["1"].refused
    assert summary.lead["1"] is not None


def test_a_run_directory_of_another_config_is_refused(finished, project):
    settings, _, _ = finished
    before = sorted(settings.run.rglob("*"))
    changed = settings.model_copy(update={"seed": 2})
    with pytest.raises(RunError, match=r"seed: 1 there, 2 given"):
        evolve.train(changed)
    assert sorted(settings.run.rglob("*")) == before
