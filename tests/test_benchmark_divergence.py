"""The candidates of the side-by-side comparison compute the same thing."""

import argparse
import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "benchmarks" / "divergence.py"


@pytest.fixture(scope="module")
def divergence():
    spec = importlib.util.spec_from_file_location("benchmark_divergence", PATH)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PATH.parent)  # what is beside it
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", ["all positions", "30% sampled", "30% sampled, selected before"])
def test_candidates_agree(divergence, case):
    sizes = dict(positions=40, width=8, vocabulary=300, dtype="float32", device="cpu", threads=1, trained_head=False)
    rows = [divergence.measure(argparse.Namespace(**sizes), name, case) for name in ("ours", "naive", "TRL", "Liger")]
    for row in rows[1:]:
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
        assert row["gradient_norm"] == pytest.approx(rows[0]["gradient_norm"], rel=1e-4)
    assert rows[0]["loss"] > 0.01


def test_the_table_tells_what_was_asked(divergence, capsys):
    figures = dict(case="x", seconds_median=2.0, loss=0.5, gradient_norm=0.1)
    rows = [
        dict(candidate="naive", case="x", failed="out of memory"),
        dict(candidate="ours", peak_mib=50.0, seconds_min=1.0, **figures),
        dict(candidate="TRL", peak_mib=600.0, seconds_min=2.0, **figures),
    ]
    divergence.Console(width=80).print(divergence.table("x", rows))
    assert "1/12.0 (1/10)" in (out := capsys.readouterr().out)
    assert "0.50 (0.75)" in out
    assert "out of memory" in out
