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
grpo = {{ steps = 2, questions_per_step = 4, group_size = 2, lora = {{ rank = 4 }} }}
"""


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
    status, out, err = run(monkeypatch, capsys, "--config", config, "--gpu", "h100", "--gpus", 2, "--sharding", "full")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "2 x h100-80gb, weights sharded, sampled by transformers" in out
    for stage in (
        "grpo: sample",
        "grpo: update",
        "pool, eval.",
        "lead",
        "distillation",
        "index (bm25, 21,015,324 passages)",
    ):
        assert stage in out
    assert "none.jsonl is not here: 169,615 training questions assumed" in out
    assert out.endswith("It fits.\n")


def test_json_holds_everything(monkeypatch, capsys, config) -> None:
    status, out, _ = run(
        monkeypatch, capsys, "--config", config, "--gpu", "a100-80gb", "--json", "--passages", 7, "--grpo.group_size", 4
    )
    plan = json.loads(out)
    assert status == 0
    assert plan["cluster"]["gpu"]["name"] == "a100-80gb"
    update = next(row for row in plan["memory"] if row["stage"] == "grpo update")
    assert (update["rows"], update["tokens"], update["most_rows"]) == (16, 64, 16)
    assert plan["questions"] == {"train": 169_615, "evaluated": 3610}
    assert "index (bm25, 7 passages)" in [row["what"] for row in plan["storage"]]


def test_what_does_not_fit_leaves_with_1_and_says_what_to_change(monkeypatch, capsys, config) -> None:
    given = ("--memory", 0.01, "--tflops", 1, "--bandwidth", 1)
    status, out, _ = run(monkeypatch, capsys, "--config", config, *given)
    assert status == 1
    assert "! grpo update: needs 0.0 GiB a rank" in " ".join(out.split())
    assert out.endswith("It does not fit.\n")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "which GPU? Give --gpu (b200-180gb, "),
        (("--gpu", "h10"), "--gpu h10: unknown; did you mean"),
        (("--memory", "24"), "--tflops, --bandwidth as well"),
        (("--gpu", "h100", "--like", "nowhere"), "--like nowhere: no such directory"),
        (
            ("--gpu", "h100", "--policy.model", "me/mine"),
            "policy.model = 'me/mine': neither here nor a shape that is known",
        ),
        (("--gpu", "h100", "--grpo.stepz", "1"), "unknown key 'grpo.stepz'; did you mean 'grpo.steps'?"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, config, flags, says) -> None:
    status, out, err = run(monkeypatch, capsys, "--config", config, *flags)
    assert (status, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
