"""A comparison as Markdown, LaTeX, CSV or JSON. JSON and CSV contain shares from 0 to 1, the others EM x 100."""

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from search_e1.errors import ConfigError
from search_e1.evaluation.compare import MACRO, Comparison, Figure, Row
from search_e1.evaluation.published import Row as Published
from search_e1.evaluation.results import FIGURES
from search_e1.runs.safe import printable

PUBLISHED = "published"
_CHANGE = ("policy", "won", "benchmark", "id", "question", "answers", "before", "after", "failure")
_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
_SIGNIFICANT = 0.05
_ACTIVE = re.compile(r"\||<(?=[A-Za-z/!?])|\](?=[(\[:])")
"""Characters to escape in Markdown: they end a table cell, begin HTML, or make a link."""


def percent(figure: Figure) -> str:
    """``47.4 [45.1, 49.8]``: a share x 100 and its interval."""
    low, high = figure.interval
    return f"{100 * figure.mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def signed(figure: Figure, scale: float = 100, digits: int = 1) -> str:
    """``+2.0 [-0.1, +4.1]``: a difference and its interval."""
    mean, low, high = (_signed(scale * value, digits) for value in (figure.mean, *figure.interval))
    return f"{mean} [{low}, {high}]"


def _signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # no -0


def p_value(p: float | None) -> str:
    return "" if p is None else "<.001" if p < 0.0005 else f"{p:.3f}"


def by_benchmark(comparison: Comparison) -> dict[str, list[Row]]:
    """Benchmark -> its rows, the baseline first."""
    parts: dict[str, list[Row]] = {}
    for row in comparison.rows:
        parts.setdefault(row.benchmark, []).append(row)
    return parts


def published_cells(row: Published, benchmarks: Sequence[str]) -> list[str]:
    """EM x 100 on each benchmark and on average; empty if not published."""
    figures = [*(row.em.get(name) for name in benchmarks), row.average]
    return ["" if figure is None else f"{figure:.1f}" for figure in figures]


def legend(comparison: Comparison) -> str:
    return (
        "EM x 100, greedy, with 95% intervals over questions (Wilson); "
        f"differences from {comparison.policies[0]}, paired (bootstrap); p: McNemar, exact."
    )


def to_json(comparison: Comparison, questions: bool) -> str:
    return comparison.model_dump_json(indent=2, exclude=None if questions else {"changes"}) + "\n"


def to_csv(comparison: Comparison, questions: bool) -> str:
    """One line per benchmark and policy, including published ones; with ``questions``, one per question won or lost."""
    if questions:
        return _csv([c.model_dump(mode="json") | {"answers": " | ".join(c.answers)} for c in comparison.changes], _CHANGE)
    rows = [_flat(row) for row in comparison.rows]
    for published in comparison.published:
        figures = published.em | ({} if published.average is None else {MACRO: published.average})
        rows += [
            {"benchmark": name, "policy": published.method, "source": PUBLISHED, "em": round(em / 100, 6)}
            for name, em in figures.items()
        ]
    return _csv(rows, tuple(dict.fromkeys(name for row in rows for name in row)))


def _flat(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {"benchmark": row.benchmark, "policy": row.policy, "source": "measured", "n": row.n}
    figures = {name: getattr(row, name) for name in (*FIGURES, "em_sampled")}
    figures |= {f"difference_{name}": getattr(row.difference, name, None) for name in FIGURES}
    for name, figure in figures.items():
        values = (figure.mean, *figure.interval) if figure else (None,) * 3
        flat |= zip((name, f"{name}_low", f"{name}_high"), values, strict=True)
    return flat | {name: getattr(row.difference, name, None) for name in ("won", "lost", "p")}


def _csv(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def to_markdown(comparison: Comparison, questions: bool) -> str:
    rows = []
    for row in comparison.rows:
        change = row.difference
        compared = (signed(change.em), p_value(change.p), str(change.won), str(change.lost)) if change else ("",) * 4
        costs = (f"{100 * row.f1.mean:.1f}", f"{row.searches.mean:.2f}", f"{row.tokens.mean:.0f}")
        rows.append((row.benchmark, row.policy, str(row.n), percent(row.em), *compared, *costs))
    headings = ("benchmark", "policy", "n", "greedy EM", "difference", "p", "won", "lost", "F1", "searches", "tokens")
    lines = _pipes(headings, rows, left=2)
    if comparison.published:
        names = list(comparison.published[0].em)
        others = [(row.method, *published_cells(row, names)) for row in comparison.published]
        lines += ["", *_pipes(("published EM, not measured here", *names, "macro average"), others, left=1)]
    lines += ["", legend(comparison), *(f"Note: {note}." for note in comparison.notes)]
    if questions:
        changes = [
            ["won" if c.won else "lost", *(str(known[name] or "") for name in _CHANGE if name != "won")]
            for c in comparison.changes
            for known in [c.model_dump() | {"answers": ", ".join(c.answers)}]
        ]
        lines += ["", *_pipes(["", *(name for name in _CHANGE if name != "won")], changes, left=len(_CHANGE))]
    return "\n".join(lines) + "\n"


def _pipes(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> list[str]:
    """A Markdown table; the first ``left`` columns are text."""
    rule = ["---"] * left + ["---:"] * (len(headings) - left)
    cells = ([_ACTIVE.sub(r"\\\g<0>", printable(" ".join(cell.split()))) for cell in row] for row in (headings, *rows))
    head, *body = [f"| {' | '.join(row)} |" for row in cells]
    return [head, f"| {' | '.join(rule)} |", *body]


def to_latex(comparison: Comparison, questions: bool) -> str:
    """A ``booktabs`` table: one line per policy, one column per benchmark; published rows below.

    Raises:
        ConfigError: with ``questions``.
    """
    if questions:
        raise ConfigError("--questions is not available for LaTeX; give --format markdown, csv or json")
    parts = by_benchmark(comparison)
    body = [
        _latex_row(policy, (_latex_cell(rows[i]) for rows in parts.values())) for i, policy in enumerate(comparison.policies)
    ]
    if comparison.published:
        names = list(comparison.published[0].em)
        body += [r"\midrule", rf"\multicolumn{{{len(parts) + 1}}}{{l}}{{\emph{{published, not measured here}}}} \\"]
        for row in comparison.published:
            known = dict(zip([*names, MACRO], published_cells(row, names), strict=True))
            body.append(_latex_row(row.method, (known.get(name) or "--" for name in parts)))
    lines = [
        f"% EM x 100, greedy, with 95% intervals over questions (Wilson); * p < {_SIGNIFICANT} (McNemar, exact) against",
        f"% {comparison.policies[0]}",
        *(f"% {' '.join(note.split())}" for note in comparison.notes),
        r"\begin{tabular}{l" + "r" * len(parts) + "}",
        r"\toprule",
        _latex_row("policy", map(_latex, parts)),
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _latex_row(name: str, cells: Iterable[str]) -> str:
    return " & ".join([_latex(name), *cells]) + r" \\"


def _latex_cell(row: Row) -> str:
    low, high = row.em.interval
    star = "$^{*}$" if row.difference and row.difference.p is not None and row.difference.p < _SIGNIFICANT else ""
    return f"{100 * row.em.mean:.1f}{star} {{\\scriptsize [{100 * low:.1f}, {100 * high:.1f}]}}"


def _latex(text: str) -> str:
    return re.sub(r"[&%$#_{}\\~^]", lambda match: _LATEX[match[0]], printable(" ".join(text.split())))


FORMATS: dict[str, Callable[[Comparison, bool], str]] = {
    "markdown": to_markdown, "latex": to_latex, "csv": to_csv, "json": to_json,
}  # fmt: skip
SUFFIXES = {".md": "markdown", ".tex": "latex", ".csv": "csv", ".json": "json"}
