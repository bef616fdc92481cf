"""Tables in a terminal of 80 columns: every EM by its full name, with n and an interval."""

import re
from io import StringIO

import pytest
from rich.console import Console

from search_e1.cli import display
from search_e1.evaluation import results
from search_e1.evaluation.statistics import wilson
from search_e1.evolve import PolicySummary, RoundSummary, Summary
from search_e1.selfdistill.lead import Lead

BENCHMARKS = ("nq", "2wikimultihopqa")


def printed(*shown: object) -> str:
    stream = StringIO()
    console = Console(file=stream, width=80, color_system=None)
    for one in shown:
        console.print(one)
    return stream.getvalue()


def result(benchmark: str, number: int, right: bool) -> results.Result:
    return results.Result.model_validate(
        {
            "benchmark": benchmark, "id": f"q{number}", "hops": 1 + number % 4, "question": "?", "answers": ("a",),
            "answer": "a" if right else "b", "em": float(right), "f1": float(right), "cover_em": float(right),
            "searches": 3, "tokens": 1234, "stop_reason": "answered", "em_of_samples": (1.0, 0.0) if number % 2 else (0.0, 0.0),
            "yes_no": False, "read": False, "in_topk": True, "in_corpus": True,
            "failure": None if right else "not_retrieved",
        }
    )  # fmt: skip


def evaluation(benchmarks: tuple[str, ...], n: int, right: int) -> results.Evaluation:
    return results.evaluation([result(name, i, i < right) for name in benchmarks for i in range(n)], seed=0)


def summary(benchmarks: tuple[str, ...], n: int, right: int) -> Summary:
    made = evaluation(benchmarks, n, right)
    own = {name: getattr(made, name) for name in PolicySummary.model_fields if name in type(made).model_fields}
    own |= {
        "by_hops": {str(hops): row.em for hops, row in made.by_hops.items()},
        "by_benchmark": {name: row.em for name, row in made.by_benchmark.items()},
    }
    stages = ("base", "coldstart", "grpo-1", "ofsd-1")
    policies = tuple(PolicySummary(stage=stage, path="p", **own) for stage in stages)
    lead = Lead.model_construct(em_plain=0.1, em_privileged=0.6)
    rounds = {"1": RoundSummary.model_construct(pairs={"train_pairs": 12345}, lead=lead, refused=None)}
    seconds = dict.fromkeys(("coldstart", "grpo-1", "pool-1", "ofsd-1"), 123456.0)
    return Summary.model_construct(seed=0, policies=policies, rounds=rounds, seconds=seconds)


@pytest.mark.parametrize("benchmarks", [BENCHMARKS[:1], BENCHMARKS], ids=["one", "several"])
def test_the_table_of_a_run_has_n_and_intervals(benchmarks):
    out = printed(display.summary_table(summary(benchmarks, 6, 0)))
    n = 6 * len(benchmarks)
    low, high = wilson(0, n)
    assert re.search(rf"grpo-1 +{n} +0\.000 +{low:.3f}-{high:.3f} +0\.250 +0\.[01]\d\d-0\.[34]\d\d", out)
    assert "…" not in out
    assert ("macro" in out, "micro" in out) == ((len(benchmarks) > 1,) * 2)
    assert re.search(r"ofsd-1 +0\.000 +0\.000 +0\.000 +0\.000 +3\.00 +1234 +\+0\.500 +12345 +246912", out)


def test_no_row_of_no_table_is_cut_at_the_largest_figures():
    several = summary(BENCHMARKS, 25_000, 24_999)
    out = printed(display.summary_table(several))
    assert "50000" in out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_narrow_terminal_loses_no_column():
    table = display.plain_table("Title", "policy", "\u6f22\u5b57", "first", "second", "third")
    table.add_row("grpo-1", *("0.97 [0.94, 0.98]",) * 3, "last")
    wide, stream = printed(table), StringIO()
    Console(file=stream, width=60, color_system=None).print(table)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) == 60
    assert "".join(wide.split()) == "".join(stream.getvalue().split())
    assert lines[-1] == "  last"


def test_a_stage_refused_at_once_shows_no_bar():
    shown = {}
    for name, done in (("refused", 0), ("failed", 1)):
        stream = StringIO()
        stage = display.watch(Console(file=stream, width=80), 1)(name)
        stage.__enter__()(done, 2)
        assert not stage.__exit__(RuntimeError, RuntimeError(), None)
        shown[name] = stream.getvalue().strip()
    assert shown["refused"] == ""
    assert shown["failed"].startswith("failed  ")


def test_a_notebook_shows_the_summary_as_a_table():
    made = summary(BENCHMARKS, 6, 0)
    evil = made.policies[0].model_copy(update={"stage": "<script>x"})
    rounds = {"1": RoundSummary.model_construct(pairs={}, lead=None, refused="lead < 0")}
    html = made.model_copy(update={"policies": (evil, *made.policies[1:]), "rounds": rounds})._repr_html_()
    low, high = wilson(0, 12)
    assert f"<td>&lt;script&gt;x</td><td>12</td><td>0.000 ({low:.3f}-{high:.3f})</td><td>0.250 (" in html
    assert html.count("<tr>") == 5
    assert "<p>round 1: not distilled: lead &lt; 0</p>" in html


def test_an_evaluation_names_greedy_and_sampled_micro_and_macro():
    stream = StringIO()
    display.show_evaluation(Console(file=stream, width=80, color_system=None), evaluation(BENCHMARKS, 8, 3))
    out = stream.getvalue()
    head = out.splitlines()[:2]
    assert re.search(r"greedy +sampled", head[0])
    assert re.search(r"questions +n +EM +95% +EM +F1", head[1])
    assert re.search(r"all \(micro\) +16 +0\.375 +0\.185-0\.614 +0\.250", out)  # Wilson's of 6 of 16
    assert re.search(r"macro average +0\.375 +0\.\d{3}-0\.\d{3} +0\.250", out)
    assert "…" not in out
    one = StringIO()
    display.show_evaluation(Console(file=one, width=80, color_system=None), evaluation(BENCHMARKS[:1], 8, 3))
    assert "macro" not in one.getvalue()
