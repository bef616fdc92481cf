"""Comparisons by hand, what is refused, and every export read back."""

import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from search_e1 import runs
from search_e1.cli import main as cli
from search_e1.errors import ConfigError
from search_e1.evaluation import results
from search_e1.evaluation.compare import MACRO, MICRO, Figure, compare, load
from search_e1.evaluation.exports import p_value, signed, to_csv, to_latex
from search_e1.evaluation.failures import Failure
from search_e1.evaluation.places import places
from search_e1.evaluation.results import Result
from search_e1.types import StopReason

LIMITS = {"max_searches": 4, "topk": 3, "batch_size": 8}
# Right or wrong on each question: nq has six, hotpotqa two.
BASE, AFTER = "001100" "10", "111001" "10"  # fmt: skip


def made(path: Path, right: str, *, limits=LIMITS, retrieval="abc", searches=2, samples=(), drop=(), retold=()) -> Path:
    rows = []
    for i, bit in enumerate(right):
        benchmark = "nq" if i < 6 else "hotpotqa"
        if f"q{i}" in drop:
            continue
        correct = bit == "1"
        rows.append(
            Result(
                benchmark=benchmark, id=f"q{i}", hops=None, question=f"What is {i}_%?{' Really?' if f'q{i}' in retold else ''}",
                answers=(f"a|{i}",), answer=f"a|{i}" if correct else None, em=float(correct), f1=float(correct),
                cover_em=float(correct), searches=searches + i % 2, tokens=10 * searches, stop_reason=StopReason.ANSWERED,
                em_of_samples=samples, yes_no=False, read=correct, in_topk=None, in_corpus=None,
                failure=None if correct else Failure.NOT_RETRIEVED,
            )
        )  # fmt: skip

    def make(out: Path):
        results.write(rows, out / results.QUESTIONS)
        return {}

    settings = {"rollout": limits, "prompts": None}
    runs.artifact(
        path, stage=path.name, settings=settings, inputs={"retrieval": retrieval}, seed=0, make=make
    )  # fmt: skip
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two evaluated policies and one that is being evaluated."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    made(tmp_path / "run" / "evaluation-base", BASE)
    made(tmp_path / "run" / "evaluation-grpo-1", AFTER, searches=1)
    (tmp_path / "run" / ".evaluation-ofsd-1.partial").mkdir()
    return tmp_path / "run"


def both(run: Path):
    return [load(run / f"evaluation-{name}", name) for name in ("base", "grpo-1")]


@pytest.fixture
def verb(monkeypatch, capsys):
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["search-e1", "compare", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "80")
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_figures_by_hand(run):
    found = compare(both(run))
    assert found.policies == ("base", "grpo-1")
    rows = {(row.benchmark, row.policy): row for row in found.rows}
    assert list(dict.fromkeys(benchmark for benchmark, _ in rows)) == ["nq", "hotpotqa", MACRO, MICRO]
    assert rows["nq", "base"].em.mean == pytest.approx(2 / 6)
    assert rows["nq", "base"].difference is None
    nq = rows["nq", "grpo-1"].difference
    assert (nq.won, nq.lost, nq.em.mean) == (3, 1, pytest.approx(2 / 6))
    assert nq.p == 2 * (1 + 4) / 16  # four coins, one of them or none against
    assert nq.searches.model_dump() == {"mean": -1.0, "interval": (-1.0, -1.0)}  # the same on every question
    assert rows["nq", "grpo-1"].searches.interval[0] < rows["nq", "grpo-1"].searches.interval[1]
    hotpot = rows["hotpotqa", "grpo-1"].difference
    assert (hotpot.won, hotpot.lost, hotpot.p, hotpot.em.mean) == (0, 0, 1.0, 0.0)
    assert rows[MACRO, "base"].em.mean == pytest.approx((2 / 6 + 1 / 2) / 2)
    assert rows[MACRO, "grpo-1"].difference.em.mean == pytest.approx((2 / 6 + 0) / 2)
    assert rows[MACRO, "grpo-1"].difference.p is None
    assert rows[MICRO, "base"].em.mean == 3 / 8
    assert rows[MICRO, "grpo-1"].difference.em.mean == pytest.approx(2 / 8)
    assert [(c.id, c.won, c.before, c.after) for c in found.changes] == [
        ("q0", True, None, "a|0"),
        ("q1", True, None, "a|1"),
        ("q5", True, None, "a|5"),
        ("q3", False, "a|3", None),
    ]
    assert {change.failure for change in found.changes} == {Failure.NOT_RETRIEVED}
    assert rows["nq", "base"].em_sampled is None


def test_a_paired_interval_is_narrower_than_two_apart(tmp_path):
    """Two policies that differ on one question of forty: what they share cancels."""
    before, after = made(tmp_path / "a", "10" * 20), made(tmp_path / "b", "11" + "10" * 19)
    row = compare([load(before, "a"), load(after, "b")]).rows[-1]
    low, high = row.difference.em.interval
    assert (low, high) == (0.0, pytest.approx(3 / 40))  # a binomial of 40 draws at 1/40
    assert row.em.interval[1] - row.em.interval[0] > 0.25


def test_sampled_em_has_an_interval_over_questions(tmp_path):
    one = load(made(tmp_path / "a", BASE, samples=(1.0, 0.0)), "a")
    found = compare([one, load(made(tmp_path / "b", BASE), "b")])
    assert found.rows[0].em_sampled.model_dump() == {"mean": 0.5, "interval": pytest.approx((0.110, 0.890), abs=5e-4)}
    assert found.rows[1].em_sampled is None


def test_other_questions_are_named_and_refused(run, tmp_path):
    fewer = load(made(tmp_path / "fewer", AFTER, drop=("q1", "q7")), "fewer")
    base = both(run)[0]
    with pytest.raises(ConfigError, match=r"base has 1 of nq \(q1\), 1 of hotpotqa \(q7\) that the others lack .* --common"):
        compare([base, fewer])
    found = compare([base, fewer], common=True)
    assert [row.n for row in found.rows if row.policy == "base"] == [5, 1, 6, 6]
    assert found.notes == ("base has 1 of nq (q1), 1 of hotpotqa (q7) that the others lack or have differently",)
    retold = load(made(tmp_path / "retold", AFTER, retold=("q2",)), "retold")
    with pytest.raises(ConfigError, match=r"base has 1 of nq \(q2\).*; retold has 1 of nq \(q2\)"):
        compare([base, retold])
    many = load(made(tmp_path / "many", AFTER, drop=("q0", "q1", "q2", "q3")), "many")
    with pytest.raises(ConfigError, match=r"4 of nq \(q0, q1, q2, \.\.\.\)"):
        compare([base, many])
    none = load(made(tmp_path / "none", AFTER, retold=[f"q{i}" for i in range(8)]), "none")
    with pytest.raises(ConfigError, match="none in common"):
        compare([base, none])
    with pytest.raises(ConfigError, match="no question in common"):
        compare([base, none], common=True)


def test_mixed_protocols_are_named_and_refused(run, tmp_path):
    base = both(run)[0]
    other = load(made(tmp_path / "other", AFTER, limits={**LIMITS, "topk": 5}, retrieval="def"), "other")
    with pytest.raises(ConfigError, match=r"retrieval \(abc for base, def for other\), rollout.topk \(3 for base, 5 for"):
        compare([base, other], common=True)
    assert compare([base, other], allow_mixed=True).notes[0].startswith("mixed protocols: retrieval")
    batches = load(made(tmp_path / "batches", AFTER, limits={**LIMITS, "batch_size": 99}), "batches")
    assert compare([base, batches]).notes == ()
    with pytest.raises(ConfigError, match="two evaluations are called 'base'"):
        compare([base, base])


def test_published_rows_are_marked_and_over_the_same_benchmarks(run, verb):
    status, out, err = verb(run, "--published", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 0
    assert "not finished, left out: ofsd-1" in err
    theirs = {(row["policy"], row["benchmark"]): float(row["em"]) for row in rows if row["source"] == "published"}
    assert theirs["Search-E1", "nq"] == 0.474
    assert theirs["Search-E1", MACRO] == pytest.approx((0.474 + 0.427) / 2)
    assert ("EviSD", MACRO) not in theirs  # its average is over all seven
    ours = {(row["policy"], row["benchmark"]): row for row in rows if row["source"] == "measured"}
    assert float(ours["grpo-1", "nq"]["difference_em"]) == pytest.approx(1 / 3)
    assert (ours["grpo-1", "nq"]["won"], ours["grpo-1", "nq"]["lost"], ours["base", "nq"]["won"]) == ("3", "1", "")
    assert float(ours["grpo-1", "nq"]["em_low"]) <= float(ours["grpo-1", "nq"]["em"])


def test_where_nothing_is_published(tmp_path):
    one, two = (load(made(tmp_path / name, "10"), name) for name in "ab")
    rows = {key: result.model_copy(update={"benchmark": "mine"}) for key, result in one.results.items()}
    mine = {("mine", id): result for (_, id), result in rows.items()}
    found = compare([replace(one, results=mine), replace(two, results=mine)], published=True)
    assert (found.published, found.notes) == ((), ("nothing is published for these benchmarks",))
    assert [row.benchmark for row in found.rows] == ["mine", "mine"]  # no averages of one benchmark


def test_the_terminal_shows_it_in_80_columns(run, verb):
    status, out, _ = verb(f"{run}:base", f"new={run}:grpo-1", "--published", "--questions")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    assert re.search(r"new +66\.7 \[30\.0, 90\.3\] +\+33\.3 \[.*\] 0\.625 +3 +1", out)
    assert re.search(r"nq +base +2\.50", out)
    assert "Published, not measured here" in out
    assert "won  new  nq q0  (not_retrieved)" in out
    assert "(none) -> a|0   right: a|0" in out
    assert "lost  new  nq q3" in out


@pytest.mark.parametrize("name", ["x.md", "x.tex", "x.csv", "x.json"])
def test_an_export_goes_to_a_file_of_that_format(run, verb, tmp_path, name):
    out = tmp_path / name
    assert verb(run, "--out", out, "--published")[0] == 0
    text = out.read_text()
    if name == "x.json":
        assert json.loads(text)["rows"][0]["em"]["mean"] == pytest.approx(1 / 3)
        assert "changes" not in json.loads(text)
    if name == "x.csv":
        assert len(list(csv.DictReader(io.StringIO(text)))) > 8
    if name == "x.md":
        [row] = [line for line in text.splitlines() if line.startswith("| nq | grpo-1 |")]
        assert row.split(" | ")[3:8] == ["66.7 [30.0, 90.3]", row.split(" | ")[4], "0.625", "3", "1"]
        assert "| Search-E1 | 47.4 | 42.7 | 45.0 |" in text
    if name == "x.tex":
        assert r"policy & nq & hotpotqa & macro average & micro average \\" in text
        assert r"Search-E1 & 47.4 & 42.7 & 45.0 & -- \\" in text
        assert text.count("{") == text.count("}")


def test_questions_in_each_export(run, verb):
    status, out, _ = verb(run, "--questions", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["id"], row["won"], row["after"]) for row in rows][-1] == ("q3", "False", "")
    assert len(json.loads(verb(run, "--questions", "--format", "json")[1])["changes"]) == 4
    assert (
        r"| lost | grpo-1 | nq | q3 | What is 3_%? | a\|3 | a\|3 |  | not_retrieved |"
        in verb(run, "--questions", "--format", "markdown")[1]
    )
    status, _, err = verb(run, "--questions", "--format", "latex")
    assert (status, "not available for LaTeX" in err) == (2, True)


def test_latex_is_escaped_and_stars_what_is_significant(tmp_path):
    one, two = load(made(tmp_path / "a", "000000"), "a_1"), load(made(tmp_path / "b", "111111"), "b&c")
    text = to_latex(compare([one, two]), False)
    assert r"a\_1 & 0.0 {\scriptsize [0.0, 39.0]} \\" in text
    assert r"b\&c & 100.0$^{*}$ {\scriptsize [61.0, 100.0]} \\" in text
    assert to_csv(compare([one, two]), False).splitlines()[0].startswith("benchmark,policy,source,n,em,em_low,em_high,f1")


def test_numbers_are_written_plainly():
    assert [p_value(p) for p in (None, 0.0, 0.0004, 0.0005, 0.049, 1.0)] == [
        "",
        "<.001",
        "<.001",
        "0.001",
        "0.049",
        "1.000",
    ]
    assert signed(Figure(mean=-0.0004, interval=(-0.02, 0.0004))) == "+0.0 [-2.0, +0.0]"


MISTAKES = {
    "no such place": (["nothing"], "nothing: no such directory; give an evaluation's directory, RUN:STAGE, or RUN"),
    "misspelt stage": (
        ["{run}:gpro-1"],
        "no evaluation of 'gpro-1' in it; did you mean 'grpo-1'?",
    ),
    "unfinished stage": (
        ["{run}:ofsd-1"],
        "no evaluation of 'ofsd-1' in it; it is not finished",
    ),
    "only one": (["{run}:base"], "give another to compare it with"),
    "the same twice": (["{run}:base", "{run}:base"], "two evaluations are called 'run/base'"),
    "a name for many": (["x={run}", "{run}:base"], "has 2 evaluations; name one: x="),
    "no format": (["{run}", "--out", "x.txt"], "--out x.txt: unknown format; end its name in"),
    "unknown stage": (["{run}:x"], "no evaluation of 'x' in it; available: base, grpo-1"),
    "no run": (["{empty}", "{run}"], "no run"),
    "not an evaluation": (["{run}:base", "{other}"], "give an artifact of `search-e1 evaluate`"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(run, tmp_path, verb, mistake):
    words, said = MISTAKES[mistake]
    other = tmp_path / "other"
    runs.artifact(other, stage="pool-1", settings={}, inputs={}, seed=0, make=lambda out: {})
    (empty := tmp_path / "empty").mkdir()
    status, _, err = verb(*(word.format(run=run, other=other, empty=empty) for word in words))
    assert (status, said in err) == (2, True), err
    assert len(err.splitlines()) == 1


def test_two_runs_tell_their_policies_apart(run, tmp_path):
    made(tmp_path / "second" / "evaluation-base", BASE)
    (tmp_path / "second" / "config.json").write_text("{}")
    found = places([str(run), f"{tmp_path}/second:base", f"mine={run / 'evaluation-base'}"])
    assert list(found) == ["run/base", "grpo-1", "second/base", "mine"]


def test_comparing_loads_no_engine(run):
    code = """
import sys
from search_e1.cli import main as cli
sys.argv = ["search-e1", "compare", sys.argv[1]]
cli.main()
"""
    ending = "import atexit, sys; atexit.register(lambda: print({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", ending + code, str(run)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
