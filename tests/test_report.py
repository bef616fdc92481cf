"""What the report says of a run, without a browser: figures, costs, samples, and what is no run."""

import base64
import gzip
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from typer.testing import CliRunner

from made_run import POLICIES, make_run
from search_e1.cli.main import app
from search_e1.config import load
from search_e1.errors import ConfigError, DataError, RunError
from search_e1.evaluation.failures import Failure
from search_e1.evaluation.report import explain, page
from search_e1.evaluation.report.trajectories import _shares

DOCS, CONFIGS = (Path(__file__).parent.parent / folder for folder in ("docs", "configs"))
REPORT_CSS = Path(page.__file__).parent / "assets" / "report.css"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


def embedded(html: str) -> tuple[dict, dict]:
    """Overview and records, as the page reads them."""
    overview = re.search(r'<script type="application/json" id="overview">(.*?)</script>', html, re.DOTALL)
    records = re.search(r'<script type="text/plain" id="records">(.*?)</script>', html, re.DOTALL)
    assert overview
    assert records
    return json.loads(overview[1]), json.loads(gzip.decompress(base64.b64decode(records[1])))


def report(run: Path, out: Path, **options) -> tuple[dict, dict]:
    """What the page holds of the first run, and all records."""
    page.write(run, out, **options)
    overview, records = embedded(out.read_text())
    return overview["runs"][0], records


def test_gains_are_of_the_same_questions_with_a_paired_interval(run, tmp_path):
    overview, _ = report(run, tmp_path / "r.html")
    gains = {gain["stage"]: gain for gain in overview["gains"]}
    # 12 questions: base has the six even ones; each policy wins two of the odd ones, and grpo-2 loses question 0 besides.
    assert [(g["stage"], g["before"], g["won"], g["lost"]) for g in overview["gains"]] == [
        ("grpo-1", "base", 2, 0), ("ofsd-1", "grpo-1", 2, 0), ("grpo-2", "ofsd-1", 2, 1), ("ofsd-2", "grpo-2", 1, 0),
    ]  # fmt: skip
    assert gains["grpo-2"]["gain"] == pytest.approx(1 / 12)
    rng = np.random.default_rng(7)
    differences = np.array([1, 1, -1] + [0] * 9)
    means = rng.choice(differences, size=(20_000, 12)).mean(1)
    assert [gains["grpo-2"]["low"], gains["grpo-2"]["high"]] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.04)
    # All twelve right at the end: Wilson's interval has a width, whatever the artifact says.
    wilson = binomtest(12, 12).proportion_ci(method="wilson")
    assert overview["policies"][-1]["em_interval"] == pytest.approx([wilson.low, wilson.high])
    usable = binomtest(6, 10).proportion_ci(method="wilson")
    assert overview["rounds"][0]["usable_interval"] == pytest.approx([usable.low, usable.high])


def test_costs_come_from_the_manifests(run, tmp_path):
    overview, _ = report(run, tmp_path / "r.html")
    costs = {cost["stage"]: cost for cost in overview["costs"]}
    assert list(costs)[:3] == ["evaluation-base", "grpo-1", "evaluation-grpo-1"]
    # Five steps of 4 questions x 5 trajectories, of 13, 14, ..., 17 sampled tokens each; two GPUs for 90 seconds.
    assert costs["grpo-1"] == {
        "stage": "grpo-1", "seconds": 90.0, "cpu_seconds": costs["grpo-1"]["cpu_seconds"], "gpus": 2, "gpu_hours": 0.05,
        "sampled_tokens": 75 * 20, "trained_tokens": 75 * 20,
    }  # fmt: skip
    assert costs["pool-1"]["sampled_tokens"] == 10 * 8 * 30
    assert costs["lead-1"]["sampled_tokens"] == 400
    assert (costs["ofsd-1"]["sampled_tokens"], costs["ofsd-1"]["trained_tokens"]) == (None, 2100)
    assert costs["pairs-1"]["gpu_hours"] == 0


def test_rounds_and_curves(run, tmp_path):
    overview, _ = report(run, tmp_path / "r.html")
    assert overview["finished"] is True
    assert [policy["stage"] for policy in overview["policies"]] == list(POLICIES)
    assert [round["round"] for round in overview["rounds"]] == [1, 2]
    assert overview["rounds"][0]["pairs"]["usable"] == 6
    assert overview["rounds"][1]["lead"]["em_privileged"] == 0.75
    curves = {curve["stage"]: curve for curve in overview["curves"]}
    assert curves["grpo-2"]["figures"]["reward"] == [11, 12, 13, 14, 15]
    assert curves["ofsd-1"]["figures"]["loss"] == [11, 12, 13, 14, 15]


def test_trajectories_and_pairs_hold_text_and_no_ids(run, tmp_path):
    _, records = report(run, tmp_path / "r.html")
    assert len(records["trajectories"]) == 60
    assert len(records["questions"]) == 12
    first = records["trajectories"][0]
    assert (first["stage"], first["right"], first["class"], first["searches"]) == ("base", True, "right", 1)
    assert "ids" not in json.dumps(first)
    [_, passage] = records["passages"][first["turns"][0]["passages"][0]]
    assert passage.startswith("(Title: ")
    assert passage.endswith("by Gold 0.")
    assert [t["class"] for t in records["trajectories"][:8]].count("no action") == 1  # question 5 of base
    pair = records["pairs"][0]
    assert pair["round"] == 1
    assert sum(pair["lengths"]) == len(pair["kl"]["kl"]) == len(pair["kl"]["pieces"]) == pair["student"]["tokens"]


def test_of_many_trajectories_a_fixed_sample_of_questions_is_shown(run, tmp_path):
    overview, records = report(run, tmp_path / "r.html", most=30)
    shown = {policy: {t["question"] for t in records["trajectories"] if t["stage"] == policy} for policy in POLICIES}
    assert 0 < len(shown["base"]) < 12
    assert all(questions == shown["base"] for questions in shown.values())
    assert overview["left_out"] == 60 - len(records["trajectories"])
    assert overview["gains"][0]["n"] == 12  # figures are of all questions


def test_sampled_trajectories_share_the_limit_with_greedy_ones(tmp_path):
    run = make_run(tmp_path / "run", groups=4)
    overview, records = report(run, tmp_path / "r.html")
    sampled = [t for t in records["trajectories"] if t["source"] != "evaluation"]
    # Two rounds of four questions x three trajectories, in the pools and in GRPO's groups.
    assert Counter((t["source"], t["stage"]) for t in sampled) == {
        ("pool", "pool-1"): 12, ("pool", "pool-2"): 12, ("GRPO", "grpo-1"): 12, ("GRPO", "grpo-2"): 12,
    }  # fmt: skip
    assert [(t["sample"], t["right"], t["class"]) for t in sampled[3:6]] == [
        (1, True, "right"), (2, False, "wrong answer"), (3, False, "wrong answer"),
    ]  # fmt: skip
    assert overview["left_out"] == 0
    # Of 54: the two small sources fit into their thirds, nearly all of the rest is the evaluations'.
    overview, records = report(run, tmp_path / "r.html", most=54)
    counts = Counter(t["source"] for t in records["trajectories"])
    assert overview["left_out"] == 60 + 48 - sum(counts.values())
    assert counts.keys() == {"evaluation", "pool", "GRPO"}
    assert _shares([60, 24, 24], 54) == pytest.approx([18 / 60, 18 / 24, 18 / 24])
    assert _shares([60, 6, 24], 54) == pytest.approx([24 / 60, 1, 1])


def test_a_pool_that_grpo_sampled_is_shown_once(tmp_path):
    run = make_run(tmp_path / "run", groups=2)
    for round in (1, 2):
        manifest = run / f"pool-{round}" / "manifest.json"
        told = json.loads(manifest.read_text())
        told["settings"]["pool"]["source"] = "grpo"
        manifest.write_text(json.dumps(told))
    _, records = report(run, tmp_path / "r.html")
    assert Counter(t["source"] for t in records["trajectories"]) == {"evaluation": 60, "GRPO": 12}


def test_several_runs_in_one_page(tmp_path):
    first = make_run(tmp_path / "a" / "run", questions=4)
    second = make_run(tmp_path / "b" / "run", questions=4, policies=("base", "grpo-1"), seed=1)
    counts = page.write(first, tmp_path / "r.html", others=[second])
    assert (counts["policies"], counts["trajectories"], counts["pairs"]) == (7, 28, 8)
    overview, records = embedded((tmp_path / "r.html").read_text())
    assert [run["run"] for run in overview["runs"]] == ["a/run", "b/run"]
    assert overview["differences"] == [{"key": "seed", "values": ["0", "1"]}]
    assert Counter(t["run"] for t in records["trajectories"]) == {0: 20, 1: 8}
    assert {pair["run"] for pair in records["pairs"]} == {0}
    texts = {records["questions"][t["question"]]["text"] for t in records["trajectories"] if t["run"] == 1}
    assert len(texts) == 4
    assert len(records["questions"]) == 8  # the same ids, other texts
    with pytest.raises(RunError, match="run: given twice; give each run once"):
        page.write(first, tmp_path / "r.html", others=[second, first])


def test_the_config_in_the_page_is_the_run_s(run, tmp_path):
    copy, config = shutil.copytree(run, tmp_path / "run"), load(CONFIGS / "quickstart.toml")
    (copy / "config.json").write_text(json.dumps(config.fingerprint()))
    overview, _ = report(copy, tmp_path / "r.html")
    (tmp_path / "again.toml").write_text(overview["repeat"]["toml"])
    again = load(tmp_path / "again.toml")
    assert again.fingerprint() == config.fingerprint()
    assert again.run == Path("runs/run-again")
    assert overview["repeat"]["commands"] == (
        f"search-e1 train run.toml\nsearch-e1 compare {copy} runs/run-again\n"
        f"search-e1 report {copy} runs/run-again --out run-again.html\n"
    )


def test_a_secret_in_a_config_stays_out_of_the_page(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    config = {"seed": 0, "endpoint": {"api_key": "hush", "url": "http://me:hush@host/"}}
    (copy / "config.json").write_text(json.dumps(config))
    overview, _ = report(copy, tmp_path / "r.html")
    assert "hush" not in (tmp_path / "r.html").read_text()
    assert overview["repeat"]["toml"].startswith("# *** stands for a secret, which a run does not store: set it.\n")


GAIN = {"stage": "ofsd-1", "before": "grpo-1", "gain": -0.303, "low": -0.357, "high": -0.253, "n": 300, "won": 0, "lost": 91}
SCORES = [
    {"stage": "grpo-1", "em": 0.97, "searches": 2.21, "tokens": 63.0},
    {"stage": "ofsd-1", "em": 0.667, "searches": 2.53, "tokens": 61.0},
    {"stage": "grpo-2", "em": 0.97, "searches": 2.20, "tokens": 54.0},
]
LEAD = {"em_plain": 0.917, "em_privileged": 0.95, "low": -0.055, "high": 0.117, "pairs": 30, "tokens_plain": 72.8,
        "tokens_privileged": 58.2}  # fmt: skip


def test_why_em_fell_is_one_sentence_with_the_run_s_figures():
    why = explain.falls([GAIN], SCORES, [{"round": 1, "lead": LEAD}], {})
    assert why == {
        "ofsd-1": "Greedy EM fell by 0.303 from grpo-1 to ofsd-1 (95% −0.357 to −0.253): its teacher had no significant lead "
        "to pass on (+0.033 EM, 95% −0.055 to +0.117, 30 pairs) but was 20% shorter; it learned on stored trajectories of "
        "grpo-1, and once its own words change (searches 2.21 to 2.53, tokens 63 to 61 per question) it is in states that none "
        "of them visits; the GRPO that follows teaches the decisions again in the new words: grpo-2 has EM 0.970."
    }
    led = LEAD | {"em_privileged": 0.95, "em_plain": 0.45, "low": 0.3, "high": 0.7, "tokens_privileged": 72.0}
    fresh = explain.falls([GAIN | {"high": 0.01}], SCORES[:2], [{"round": 1, "lead": led}], {"distill": {"students": "fresh"}})
    assert fresh["ofsd-1"].startswith(
        "Greedy EM fell by 0.303 from grpo-1 to ofsd-1 (95% −0.357 to +0.010), which may be chance: "
    )
    assert "its teacher had a lead (+0.500 EM, 95% +0.300 to +0.700, 30 pairs); it learned on fresh" in fresh["ofsd-1"]
    assert fresh["ofsd-1"].endswith(
        "judge a round after the GRPO that follows, which teaches the decisions again in the new words."
    )
    tuned = explain.falls([GAIN], SCORES, [{"round": 1, "lead": None}], {"distill": {"objective": "sft"}})
    assert ": it was fine-tuned on references, without a teacher; it learned on" in tuned["ofsd-1"]
    assert explain.falls([GAIN | {"gain": 0.1}, GAIN | {"stage": "grpo-2"}], SCORES, [], {}) == {}


def test_an_empty_view_says_why(run, tmp_path):
    overview, _ = report(run, tmp_path / "r.html")
    assert overview["empty"] == {}
    copy = tmp_path / "run"
    copy.mkdir()
    shutil.copy(run / "config.json", copy)
    (copy / ".grpo-1.partial").mkdir()
    overview, _ = report(copy, tmp_path / "r.html")
    still = "Begun: grpo-1. No process is working on the run; `search-e1 train` with its config resumes it."
    assert overview["empty"] == {
        "loop": f"No figures: no policy is evaluated. {still}",
        "cost": f"No cost: no stage is complete. {still}",
        "trajectories": f"No trajectories: neither an evaluation nor a pool is complete. {still}",
        "pairs": f"No pairs: the run has not reached pair mining, which follows GRPO and the pool. {still}",
        "questions": "No questions yet: they appear once an evaluation is complete. " + still,
    }
    (copy / ".holder.json").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": "now"}))
    overview, _ = report(copy, tmp_path / "r.html")
    assert overview["empty"]["cost"].endswith(f"The run is in progress (process {os.getpid()} on {socket.gethostname()}).")
    ended = subprocess.Popen(["true"])
    ended.wait()
    (copy / ".holder.json").write_text(json.dumps({"pid": ended.pid, "host": socket.gethostname(), "since": "now"}))
    assert report(copy, tmp_path / "r.html")[0]["holder"] is None
    (copy / "config.json").write_text('{"ofsd": "never"}')
    overview, _ = report(copy, tmp_path / "r.html")
    assert overview["empty"]["pairs"].startswith('No pairs: the run does not distill (ofsd = "never"), so it mines none. ')


def test_the_glossary_says_what_the_documentation_says():
    words = json.loads((REPORT_CSS.parent / "glossary.json").read_text())
    rows = [
        (word.replace("_", " ").lower(), meaning.replace("`", ""))
        for file in ("glossary.md", "evaluation.md")
        for word, meaning in re.findall(r"^\| `?([^|`]+?)`? \| ([^|]+?) \|$", (DOCS / file).read_text(), re.MULTILINE)
    ]
    shared = [(word, meaning) for word, meaning in rows if word in words]
    assert {word for word, _ in shared} >= {"lead", "reference", "student", "teacher", "pool", "not read out", "wording"}
    assert [(word, words[word]) for word, _ in shared] == shared
    failures = {failure.value.replace("_", " ") for failure in Failure}
    assert failures - words.keys() == set()


def test_the_same_run_gives_the_same_file(run, tmp_path):
    page.write(run, tmp_path / "a.html")
    page.write(run, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_failure_classes_of_the_evaluation_are_used(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    found = {"read": False, "in_topk": True, "in_corpus": None}
    rows = [{"benchmark": "musique", "id": "q1", "em": 0.0, "failure": "not_retrieved", **found}]
    (copy / "evaluation-base" / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, records = report(copy, tmp_path / "r.html")
    assert [t["class"] for t in records["trajectories"][:4]] == ["right", "not retrieved", "right", "wrong answer"]
    assert [t["recall"] for t in records["trajectories"][:3]] == [None, {"read": False, "in_topk": True}, None]


def test_the_page_needs_nothing_else_and_lets_nothing_else_run(run, tmp_path):
    page.write(run, tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:|//)""", html)
    assert re.findall(r"https?://[^\s\"'`)]+", html) == ["http://www.w3.org/2000/svg"]  # a name, not a place
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    for kind, tag in (("script", "<script>"), ("style", "<style>")):
        content = html.split(tag)[1].split(f"</{kind}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy[1]


def test_an_unfinished_run_shows_what_there_is(run, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("evaluation-base", "config.json"):
        (shutil.copytree if (run / name).is_dir() else shutil.copy)(run / name, copy / name)
    (copy / ".grpo-1.partial").mkdir()
    (copy / ".grpo-1.partial" / "steps.jsonl").write_text('{"step": 1, "reward": 0.25, "kl": NaN}\n{"step": 2, "rew')
    overview, records = report(copy, tmp_path / "r.html")
    assert (overview["finished"], overview["begun"], overview["gains"]) == (False, ["grpo-1"], [])
    assert overview["curves"] == [
        {"stage": "grpo-1", "complete": False, "step": [1], "figures": {"kl": [None], "reward": [0.25]}}
    ]
    assert len(records["trajectories"]) == 12
    shutil.rmtree(copy / "evaluation-base")
    overview, records = report(copy, tmp_path / "r.html")
    assert (overview["policies"], records["trajectories"]) == ([], [])


def test_a_lead_without_token_values_still_shows_its_pairs(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "lead-1" / "kl.jsonl").unlink()
    shutil.rmtree(copy / "lead-2")
    _, records = report(copy, tmp_path / "r.html")
    assert [pair["kl"] for pair in records["pairs"]] == [None] * 8


def test_what_is_no_run_is_one_clear_line(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for place, message in (
        (tmp_path / "nowhere", "no such directory; give the run directory"),
        (tmp_path / "empty", "no run \\(neither config.json nor a stage in it\\)"),
    ):
        with pytest.raises(RunError, match=message) as refused:
            page.write(place, tmp_path / "r.html")
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "r.html").exists()
    with pytest.raises(RunError, match=r"missing/r\.html: no directory .*--out"):
        page.write(run, tmp_path / "missing" / "r.html")


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        ("evaluation-base/manifest.json", RunError, "manifest.json: damaged; remove"),
        ("evaluation-base/evaluation.json", RunError, "evaluation.json: damaged; remove"),
        ("evaluation-base/trajectories.jsonl", DataError, r"trajectories.jsonl:2: damaged; remove"),
        ("pairs-1/held_out.jsonl", DataError, r"held_out.jsonl:2: damaged; remove"),
        ("pool-1/groups.jsonl", DataError, r"groups.jsonl:2: damaged; remove"),
    ],
)
def test_damage_is_named(tmp_path, file, error, message):
    copy = make_run(tmp_path / "run", questions=4, groups=2)
    lines = (copy / file).read_text().splitlines(keepends=True)
    (copy / file).write_text("".join([*lines[:1], "{broken\n", *lines[2:]]) if len(lines) > 1 else "{broken\n")
    with pytest.raises(error, match=message):
        page.write(copy, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_the_verb_writes_into_the_run(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    done = CliRunner().invoke(app, ["report", str(copy)])
    assert done.exit_code == 0
    assert "report.html: 5 policies, 60 trajectories, 8 pairs" in done.output
    assert (copy / "report.html").is_file()


def test_the_verb_takes_several_runs(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "other")
    done = CliRunner().invoke(app, ["report", str(run), str(copy), "--out", str(tmp_path / "r.html")])
    assert done.exit_code == 0
    assert "r.html: 10 policies, 120 trajectories, 16 pairs" in done.output


def test_a_page_that_cannot_be_served_is_one_clear_line(run, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^--port {port}: cannot listen there \(Address already in use\); give another"):
            CliRunner().invoke(app, ["report", str(run), "--serve", "--port", str(port)], catch_exceptions=False)
    with pytest.raises(ConfigError, match="--serve writes no file; leave out --out"):
        CliRunner().invoke(app, ["report", str(run), "--serve", "--out", "r.html"], catch_exceptions=False)


def _luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    """WCAG 2.2's ratio."""
    dark, light = sorted((_luminance(a), _luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1, 2])
def test_text_can_be_read_in_both_themes(theme):
    """4.5 to 1 (AA) for every color of text on every color that it stands on; both dark themes are the same."""
    blocks = re.findall(r"\{([^{}]*--ink[^{}]*)\}", REPORT_CSS.read_text())
    colors = dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6})", blocks[theme]))
    for text in ("ink", "muted", "accent", "right", "wrong"):
        for back in ("surface", "back", "raised"):
            assert _contrast(colors[text], colors[back]) >= 4.5, (text, back)
    for text, back in (("ink", "mark"), ("right", "tint-right"), ("wrong", "tint-wrong"), ("accent", "tint-search"),
                       ("muted", "tint-search"), ("ink", "tint-search")):  # fmt: skip
        assert _contrast(colors[text], colors[back]) >= 4.5, (text, back)
    if theme == 2:
        assert colors == dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6})", blocks[1]))
