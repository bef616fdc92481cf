"""``search-e1 plan`` from outside."""

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from search_e1.cli import main as cli

TOML = """
run = "runs/x"
policy.model = "{model}"
policy.dtype = "bfloat16"
data = {{ corpus = "none.jsonl", train = ["none.jsonl"], eval = {{ nq = "none.jsonl" }} }}
rollout = {{ max_tokens = 64, batch_size = 4 }}
grpo = {{ steps = 2, questions_per_step = 4, group_size = 2, lora = {{ rank = 4 }}, training = {{ micro_batch_tokens = 256 }} }}
distill.training.micro_batch_tokens = 256
"""
# Where the size of a pass is not given, several are traced until one fits: see test_planning.


@pytest.fixture
def config(tmp_path: Path) -> Path:
    shape = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    AutoConfig.for_model("qwen2", **shape, num_key_value_heads=2).save_pretrained(tmp_path)
    path = tmp_path / "config.toml"
    path.write_text(TOML.format(model=tmp_path / "config.json"))
    return path


def run(monkeypatch, capsys, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["search-e1", "plan", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "80")
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_tables_fit_a_terminal_of_80_columns(monkeypatch, capsys, config) -> None:
    given = ("--gpu", "h100", "--gpus", 2, "--parallel.sharding", "fsdp2")
    status, out, err = run(monkeypatch, capsys, "--config", config, *given)
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "billion weights, on 2 x h100-80gb" in out
    for stage in ("grpo: sample", "grpo: update", "pool, eval.", "lead", "distill: update"):
        assert stage in out
    assert "Files not found, sizes assumed: 169,615 training questions, 3,610 of nq." in out
    assert "Hours: error not measured; based on assumed fractions of the data sheet" in " ".join(out.split())
    assert out.endswith("It fits.\n")


def test_hours_carry_the_error_that_was_measured(monkeypatch, capsys, config, tmp_path) -> None:
    told = '[measured]\ndevice = "NVIDIA H200"\norigin = "benchmarks/gpu.py"\nhours_error = 0.17\n'
    (tmp_path / "measured.toml").write_text("[hours]\ntraining = 0.41\n" + told)
    for gpu, said in (("h200", "on NVIDIA H200."), ("h100", "on NVIDIA H200, another GPU.")):
        words = ("--config", config, "--gpu", gpu, "--constants", tmp_path / "measured.toml")
        _, out, _ = run(monkeypatch, capsys, *words)
        assert f"Hours, for these token counts: within 17% of what was measured {said}" in " ".join(out.split())
        assert max(map(len, out.splitlines())) <= 80
    (tmp_path / "measured.toml").write_text("[measured]\nhours_error = 0.17\n")
    status, out, err = run(monkeypatch, capsys, *words)
    assert (status, out) == (2, "")
    assert "measured.device: Field required" in err


def test_json_holds_everything(monkeypatch, capsys, config) -> None:
    words = ("--config", config, "--gpu", "a100-80gb", "--json")
    status, out, _ = run(monkeypatch, capsys, *words)
    plan = json.loads(out)
    assert status == 0
    assert plan["gpu"]["name"] == "a100-80gb"
    update = next(row for row in plan["memory"] if row["stage"] == "grpo: update")
    assert (update["rows"], update["tokens"]) == (4, 64)
    assert {"shape", "work", "disk", "problems", "warnings", "assumed"} <= set(plan)


def test_what_does_not_fit_leaves_with_1_and_says_what_to_change(monkeypatch, capsys, config, tmp_path) -> None:
    sheet = "{ memory_gib = 0.01, tflops = 1, tflops_float32 = 1, gb_per_second = 1 }"
    (tmp_path / "mine.toml").write_text(f"[gpus]\nmine = {sheet}\n")
    given = ("--constants", tmp_path / "mine.toml", "--gpu", "mine", "--grpo.training.micro_batch_tokens", 4096)
    status, out, _ = run(monkeypatch, capsys, "--config", config, *given)
    assert status == 1
    assert "! grpo: update: needs 0.0 GiB per GPU" in " ".join(out.split())
    assert out.endswith("It does not fit.\n")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--gpu", "h10"), "--gpu h10: unknown (known: b200-180gb, "),
        (("--gpu", "h100", "--constants", "nowhere"), "nowhere: no such file; "),
        (
            ("--gpu", "h100", "--policy.model", "me/mine"),
            "policy.model = 'me/mine': neither on this machine nor a known shape",
        ),
        (
            ("--gpu", "h100", "--policy.model", "new", "--coldstart.steps", "4"),
            "policy.model = 'new': the cold start creates it",
        ),
        (("--gpu", "h100", "--grpo.stepz", "1"), "unknown key 'grpo.stepz'; did you mean 'grpo.steps'?"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, config, flags, says) -> None:
    status, out, err = run(monkeypatch, capsys, "--config", config, *flags)
    assert (status, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
