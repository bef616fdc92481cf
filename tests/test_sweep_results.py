"""The results of a sweep: tables, charges, differences over seeds, the plot, the terminal."""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from pyarrow import parquet

from made_sweep import make
from search_e1.cli import main as cli
from search_e1.lab.sweep import comparison, plot, results
from search_e1.lab.sweep.results import Cost


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[results.PolicyResult]:
    """Reference: GRPO for two rounds. The other distills after the first, and is refused after the second."""
    directory, base = tmp_path_factory.mktemp("sweep"), (0, 0, 0, 0)
    runs = [
        make(directory, "grpo", 0, {"base": base, "grpo-1": (1, 0, 0, 0), "grpo-2": (1, 1, 0, 0)}),
        make(directory, "grpo", 1, {"base": base, "grpo-1": (0, 0, 0, 0), "grpo-2": (1, 0, 0, 0)}),
        make(directory, "ofsd", 0, {"base": base, "grpo-1": (1, 0, 0, 0), "ofsd-1": (1, 1, 1, 0), "grpo-2": (1, 1, 1, 1)},
             refused="2"),
        make(directory, "ofsd", 1, {"base": base, "grpo-1": (0, 0, 0, 0), "ofsd-1": (1, 1, 0, 0), "grpo-2": (1, 1, 0, 0)},
             refused="2"),
    ]  # fmt: skip
    return [evaluation for run in runs for evaluation in results.read_results(run)]


def row(found, **wanted):
    [one] = [row for row in results.policy_rows(found) if all(row[name] == value for name, value in wanted.items())]
    return one


def test_a_policy_is_charged_with_all_that_it_took(found):
    costs = {one.stage: (one.own, one.charged) for one in found if (one.variant, one.seed) == ("ofsd", 0)}
    grpo = Cost(10.0, 5.0, 200, 400, 2)
    distilled = Cost(40.0, 20.0, 650, 700, 4)  # pool, pairs, lead and distillation
    refused = Cost(30.0, 15.0, 650, 0, 0)
    assert costs["base"] == (Cost(), Cost())
    assert costs["grpo-1"] == (grpo, grpo)
    assert costs["ofsd-1"] == (distilled, grpo + distilled)
    assert costs["grpo-2"] == (grpo + refused, grpo + distilled + grpo + refused)


@pytest.mark.parametrize("before", [{"base": (0, 0)}, {}])
def test_the_cold_start_is_charged_and_may_be_the_first_policy(tmp_path, before):
    after = ("grpo-1", "ofsd-1", "grpo-2")
    found = results.read_results(make(tmp_path, "v", 0, before | dict.fromkeys(("coldstart", *after), (0, 1))))
    assert [one.stage for one in found] == [*before, "coldstart", *after]
    coldstart, grpo = found[len(before) : len(before) + 2]
    assert (coldstart.own, coldstart.charged) == (Cost(10.0, 5.0, 0, 900, 3), Cost(10.0, 5.0, 0, 900, 3))
    assert (grpo.own.seconds, grpo.charged.seconds, grpo.charged.steps) == (10.0, 20.0, 5)


def test_what_a_refused_round_cost_is_charged_to_the_policy_after_it(tmp_path):
    policies = {"base": (0, 0), "grpo-1": (0, 1), "grpo-2": (1, 1)}
    found = results.read_results(make(tmp_path, "v", 0, policies, refused="1"))
    assert [one.own.seconds for one in found] == [0.0, 10.0, 40.0]
    assert [one.refused for one in found] == [None, True, None]
    assert [one.last for one in found] == [False, False, True]


def test_rows_are_tidy(found):
    assert len(results.policy_rows(found)) == 14 * 3  # nq, musique, all
    one = row(found, variant="ofsd", seed=0, stage="ofsd-1", benchmark="all")
    assert {name: one[name] for name in ("n", *results.METRICS)} == {
        "n": 4, "em": 0.75, "em_sampled": 0.375, "f1": 0.75, "searches": 1.25, "tokens": 12.5,
    }  # fmt: skip
    assert (one["last"], one["lead"], one["refused"], one["seconds"], one["stage_seconds"]) == (
        False,
        None,
        None,
        50.0,
        40.0,
    )
    assert row(found, variant="ofsd", seed=0, stage="ofsd-1", benchmark="nq")["em"] == 1.0
    led = row(found, variant="ofsd", seed=0, stage="grpo-1", benchmark="all")
    assert (led["lead"], led["lead_low"], led["lead_high"], led["refused"]) == (0.25, 0.15, 0.35, False)
    assert row(found, variant="ofsd", seed=0, stage="grpo-2", benchmark="all")["refused"] is True


def test_questions_are_reached_and_columns_keep_their_types(found, tmp_path):
    results.write_parquet(results.question_rows(found), tmp_path / "q.parquet")
    table = parquet.read_table(tmp_path / "q.parquet")
    assert table.num_rows == 14 * 4
    kinds = {field.name: str(field.type) for field in table.schema}
    assert (kinds["seed"], kinds["hops"], kinds["em"], kinds["failure"], kinds["last"]) == (
        "int64", "int64", "double", "string", "bool",
    )  # fmt: skip
    first = table.to_pylist()[4]
    assert (first["variant"], first["seed"], first["stage"], first["id"]) == ("grpo", 0, "grpo-1", "q0")
    assert (first["em"], first["em_sampled"], first["tokens"], first["failure"]) == (1.0, 0.5, 10.0, None)
    results.write_parquet(results.policy_rows(found), tmp_path / "r.parquet")
    kinds = {field.name: str(field.type) for field in parquet.read_schema(tmp_path / "r.parquet")}
    assert (kinds["sampled_tokens"], kinds["stage_steps"], kinds["tokens"], kinds["lead"]) == (
        "int64", "int64", "double", "double",
    )  # fmt: skip


def test_differences_are_paired_by_seed_and_question(found):
    compared = comparison.compare_variants(found, "grpo")
    reference, ofsd = compared.at(comparison.LAST)
    assert (reference.variant, reference.differences, reference.seeds, reference.questions) == ("grpo", {}, (0, 1), 4)
    assert reference.metrics["em"].mean == 0.375
    assert ofsd.metrics["em"].mean == 0.75
    # Seed 0: +0, +0, +1, +1; seed 1: +0, +1, +0, +0.
    assert ofsd.differences["em"].mean == 0.375
    assert ofsd.differences["tokens"].mean == -3.75
    assert ofsd.differences["em_sampled"].mean == 0.1875
    assert ofsd.differences["em"].interval[0] < 0.375 < ofsd.differences["em"].interval[1]
    assert (ofsd.lead, ofsd.refused, ofsd.cost["seconds"], ofsd.cost["steps"]) == (0.25, 2, 90.0, 8.0)
    [_, nq] = compared.at("grpo-2", "nq")
    assert (nq.differences["em"].mean, nq.questions) == (0.25, 2)
    [alone] = compared.at("ofsd-1")
    assert alone.differences == {}  # the reference has no such policy
    same = compared.at("grpo-1")[1].differences["em"]
    assert (same.mean, same.interval) == (0.0, (0.0, 0.0))
    assert compared.notes == ()


def test_only_seeds_that_both_have_are_compared_with_a_note(found):
    kept = [one for one in found if (one.variant, one.seed) != ("ofsd", 1)]
    compared = comparison.compare_variants(kept, "grpo")
    assert compared.at(comparison.LAST)[1].differences["em"].mean == 0.5
    assert compared.notes == ("ofsd lacks seed 1: differences are over the seeds that both have",)


def test_one_seed_and_other_limits_are_noted(tmp_path):
    runs = [make(tmp_path, "a", 0, {"base": (0, 1)}), make(tmp_path, "b", 0, {"base": (1, 1)}, topk=5)]
    found = [one for run in runs for one in results.read_results(run)]
    limits, one_seed = comparison.compare_variants(found, "a").notes
    assert limits.startswith("mixed protocols: rollout.topk (3 for a/0:base, 5 for b/0:base)")
    assert one_seed.startswith("one seed:")


def test_records_hold_every_interval(found):
    records = comparison.compare_variants(found, "grpo").records()
    [one] = [r for r in records if (r["variant"], r["stage"], r["benchmark"], r["metric"]) == ("ofsd", "last", "all", "em")]
    assert (one["mean"], one["difference"], one["reference"], one["seeds"], one["questions"]) == (
        0.75,
        0.375,
        "grpo",
        2,
        4,
    )
    assert one["low"] <= 0.75 <= one["high"]
    assert one["difference_low"] <= 0.375 <= one["difference_high"]


def texts_of_the_plot(found, reference: str, path: Path) -> list[str]:
    plot.draw(comparison.compare_variants(found, reference), path)
    tree = ET.fromstring(path.read_text())
    return ["".join(element.itertext()).strip() for element in tree.iter() if element.tag.endswith("text")]


def test_the_plot_names_every_variant_and_is_the_same_each_time(found, tmp_path):
    path = tmp_path / "plot.svg"
    texts = texts_of_the_plot(found, "grpo", path)
    assert {"grpo", "ofsd", "EM, greedy", "EM, sampled", "searches", "sampled tokens"} <= set(texts)
    before = path.read_bytes()
    texts_of_the_plot(found, "grpo", path)
    assert path.read_bytes() == before


def test_the_plot_shows_many_variants(tmp_path):
    names = [f"a-variant-of-a-grid-of-many-values+number-{i}" for i in range(16)]
    runs = [make(tmp_path, name, 0, {"base": (0, 0), "ofsd-1": (1, 0)}) for name in names]
    texts = texts_of_the_plot([one for run in runs for one in results.read_results(run)], names[0], tmp_path / "p.svg")
    assert texts.count(names[0]) == 1  # in the legend
    assert all(texts.count(name) == 2 for name in names[1:])


def test_a_single_variant_has_no_differences_to_draw(tmp_path):
    found = results.read_results(make(tmp_path, "alone", 0, {"base": (0, 0), "grpo-1": (1, 0)}))
    assert "alone" in texts_of_the_plot(found, "alone", tmp_path / "p.svg")


CONFIG = 'run = "r"\n[policy]\nmodel = "small"\n[data]\ncorpus = "c.jsonl"\ntrain = "t.jsonl"\neval = { nq = "e.jsonl" }\n'


def verb(monkeypatch, capsys, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["search-e1", "sweep", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "80")
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def files(tmp_path) -> list[Path]:
    (tmp_path / "sweep.toml").write_text("seeds = [0, 1]\n[variants.grpo]\n[variants.ofsd]\nrounds = 1\n")
    (tmp_path / "base.toml").write_text(CONFIG)
    return [tmp_path / "sweep.toml", "--config", tmp_path / "base.toml", "--out", tmp_path / "out", "--report"]


def test_a_report_of_what_is_finished(files, tmp_path, monkeypatch, capsys):
    policies = {"base": (0, 0, 0, 1), "grpo-1": (1, 0, 0, 1)}
    for seed in (0, 1):
        make(tmp_path / "out", "grpo", seed, policies)
    status, out, err = verb(monkeypatch, capsys, *files)
    assert (status, err) == (1, "")  # two runs are missing
    assert "2 of 4 runs are not finished" in out
    assert all(len(line) <= 80 for line in out.splitlines() if str(tmp_path) not in line)
    assert "Last policies, seeds 0, 1, 4 questions (micro average); differences from grpo" in out
    assert "50.0" in out
    made = {path.name for path in (tmp_path / "out").iterdir() if path.is_file() and not path.name.startswith(".")}
    assert made == {"results.parquet", "questions.parquet", "comparison.parquet", "comparison.svg"}
    assert "25.0" in verb(monkeypatch, capsys, *files, "--stage", "base")[1]
    status, _, err = verb(monkeypatch, capsys, *files, "--stage", "ofsd-7")
    assert (status, err) == (2, "search-e1: --stage ofsd-7: no finished run has it; known: base, grpo-1, last\n")


def test_nothing_to_report(files, monkeypatch, capsys):
    status, _, err = verb(monkeypatch, capsys, *files)
    assert status == 2
    assert err.endswith("out: nothing finished to report; run it without --report\n")
