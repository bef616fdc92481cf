"""The comparison as one plot: EM over charged CPU time, and differences from the reference variant, with 95% intervals."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search_e1.lab.sweep.comparison import LAST, Comparison, VariantRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE = "comparison.svg"
_TITLES = {"em": "EM, greedy", "em_sampled": "EM, sampled", "searches": "searches", "tokens": "sampled tokens"}
_COLORS = ("#555555", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito, 2008
_LINES = ("-", "--", ":", "-.")  # for more variants than colors
_LINE_INCHES = 0.22


def draw(comparison: Comparison, path: Path) -> None:
    """Write the plot as SVG, reproducible to the byte. Needs matplotlib, the extra ``plots``."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.variant for row in comparison.rows))
    others = [row for row in comparison.at(LAST) if row.differences]
    shown = [name for name in _TITLES if any(name in row.differences for row in others)]
    heights = (max(3.2, _LINE_INCHES * len(names)), _LINE_INCHES * len(others) + 0.5)
    figure = Figure(figsize=(11, sum(heights) + 1.5), layout="constrained")
    rows = figure.subfigures(2 if shown else 1, 1, height_ratios=heights if shown else None, squeeze=False)[:, 0]
    _draw_curves(rows[0].subplots(), comparison, names)
    if shown:
        rows[1].suptitle(f"Last policies minus {comparison.reference}, paired", fontsize="medium")
        for ax, name in zip(rows[1].subplots(1, len(shown), sharey=True, squeeze=False)[0], shown, strict=True):
            _draw_differences(ax, name, others)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "search-e1"}):  # text stays text, not paths
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_curves(ax: "Axes", comparison: Comparison, names: Sequence[str]) -> None:
    """Greedy EM of each policy over the CPU seconds charged to it, one line per variant."""
    for i, name in enumerate(names):
        policies = [row for row in comparison.rows if row.variant == name and row.benchmark == "all"]
        policies = sorted((row for row in policies if row.stage != LAST), key=_cpu_seconds)
        style: dict[str, Any] = {
            "color": _COLORS[i % len(_COLORS)],
            "linestyle": _LINES[i // len(_COLORS) % len(_LINES)],
        }
        means, errors = _means_and_errors(policies, "em", "metrics")
        ax.errorbar([_cpu_seconds(row) for row in policies], means, errors, label=name, marker="o", markersize=4, **style)
    ax.set_title("Greedy EM of each policy, 95% over seeds and questions", fontsize="medium")
    ax.set_xlabel("CPU seconds charged")
    ax.grid(alpha=0.3)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small", frameon=False)


def _draw_differences(ax: "Axes", name: str, rows: Sequence[VariantRow]) -> None:
    measured = [row for row in rows if name in row.differences]
    means, errors = _means_and_errors(measured, name, "differences")
    ax.axvline(0, color="#999999", linestyle="--", linewidth=1)
    places = [rows.index(row) for row in measured]
    for place, row, mean, low, high in zip(places, measured, means, *errors, strict=True):
        begin, end = row.differences[name].interval
        color = "#999999" if begin <= 0 <= end else "#0072b2"
        ax.errorbar(mean, place, xerr=[[low], [high]], marker="o", markersize=5, color=color)
    ax.set_title(_TITLES[name], fontsize="small")
    ax.set_yticks(range(len(rows)), [row.variant for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(labelsize="small")


def _cpu_seconds(row: VariantRow) -> float:
    return row.cost["cpu_seconds"]


def _means_and_errors(rows: Sequence[VariantRow], name: str, of: str) -> tuple[list[float], tuple[list[float], list[float]]]:
    """Means, and the distances from them to the lower and upper ends of their intervals."""
    figures = [getattr(row, of)[name] for row in rows]
    below = [max(0.0, figure.mean - figure.interval[0]) for figure in figures]
    above = [max(0.0, figure.interval[1] - figure.mean) for figure in figures]
    return [figure.mean for figure in figures], (below, above)
