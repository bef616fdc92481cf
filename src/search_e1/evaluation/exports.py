"""A comparison as Markdown, LaTeX, CSV or JSON. JSON and CSV contain shares from 0 to 1, the others EM x 100."""

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from search_e1.errors import ConfigError
from search_e1.evaluation.compare import Comparison, Figure, Row
from search_e1.evaluation.published import Row as Published
from search_e1.evaluation.results import FIGURES
from search_e1.runs.safe import printable

PUBLISHED = "published"
_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
_SIGNIFICANT = 0.05
_ACTIVE = re.compile(r"\||<(?=[A-Za-z/!?])|\](?=[(\[:])")
"""Ends a Markdown cell, begins HTML, or makes a link."""


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


def to_json(comparison: Comparison, questions: bool) -> str:
    return comparison.model_dump_json(indent=2, exclude=None if questions else {"changes"}) + "\n"


def to_csv(comparison: Comparison, questions: bool) -> str:
    """A line for each benchmark and policy, including published ones; with ``questions``, for each question won or lost."""
    if questions:
        changes = [
            change.model_dump(mode="json") | {"answers": " | ".join(change.answers)} for change in comparison.changes
        ]
        return _csv(changes, ("policy", "won", "benchmark", "id", "question", "answers", "before", "after", "failure"))
    rows = [_flat(row) for row in comparison.rows]
    for published in comparison.published:
        figures = [
            *published.em.items(),
            *([("macro average", published.average)] if published.average is not None else []),
        ]
        rows += [
            {"benchmark": name, "policy": published.method, "source": PUBLISHED, "em": round(em / 100, 6)}
            for name, em in figures
        ]
    return _csv(rows, tuple(dict.fromkeys(name for row in rows for name in row)))


def _flat(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {"benchmark": row.benchmark, "policy": row.policy, "source": "measured", "n": row.n}
    for name in (*FIGURES, "em_sampled"):
        flat |= _spread(name, getattr(row, name))
    for name in FIGURES:
        flat |= _spread(f"difference_{name}", getattr(row.difference, name, None))
    return flat | {name: getattr(row.difference, name, None) for name in ("won", "lost", "p")}


def _spread(name: str, figure: Figure | None) -> dict[str, float | None]:
    low, high = figure.interval if figure else (None, None)
    return {name: figure.mean if figure else None, f"{name}_low": low, f"{name}_high": high}


def _csv(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def to_markdown(comparison: Comparison, questions: bool) -> str:
    headings = ("benchmark", "policy", "n", "EM", "difference", "p", "won", "lost", "F1", "searches", "tokens")
    lines = _head(headings, left=2)
    for row in comparison.rows:
        change = row.difference
        compared = (signed(change.em), p_value(change.p), str(change.won), str(change.lost)) if change else ("",) * 4
        costs = (f"{100 * row.f1.mean:.1f}", f"{row.searches.mean:.2f}", f"{row.tokens.mean:.0f}")
        lines.append(_pipes((row.benchmark, row.policy, str(row.n), percent(row.em), *compared, *costs)))
    if comparison.published:
        names = list(comparison.published[0].em)
        lines += ["", *_head(("published EM, not measured here", *names, "average"), left=1)]
        lines += [_pipes((row.method, *published_cells(row, names))) for row in comparison.published]
    lines += ["", legend(comparison), *(f"Note: {note}." for note in comparison.notes)]
    if questions:
        fields = ("policy", "benchmark", "id", "question", "answers", "before", "after", "failure")
        lines += ["", *_head(("", *fields), left=len(fields) + 1)]
        for change in comparison.changes:
            known = change.model_dump() | {"answers": ", ".join(change.answers)}
            lines.append(_pipes(("won" if change.won else "lost", *(str(known[field] or "") for field in fields))))
    return "\n".join(lines) + "\n"


def legend(comparison: Comparison) -> str:
    return (
        "EM x 100 with 95% bootstrap intervals over questions; "
        f"differences from {comparison.policies[0]}, paired; p: McNemar, exact."
    )


def _head(headings: Sequence[str], left: int) -> list[str]:
    return [_pipes(headings), _pipes(["---"] * left + ["---:"] * (len(headings) - left))]


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_ACTIVE.sub(r"\\\g<0>", printable(" ".join(cell.split()))) for cell in cells) + " |"


def published_cells(row: Published, benchmarks: Sequence[str]) -> list[str]:
    """EM x 100 on each benchmark and on average; empty where none is published."""
    cells = [f"{row.em[name]:.1f}" if name in row.em else "" for name in benchmarks]
    return [*cells, "" if row.average is None else f"{row.average:.1f}"]


def to_latex(comparison: Comparison, questions: bool) -> str:
    """A ``booktabs`` table: a line for each policy, a column for each benchmark; published rows below.

    Raises:
        ConfigError: ``questions`` is asked for.
    """
    if questions:
        raise ConfigError("--questions is not available for LaTeX; give --format markdown, csv or json")
    parts = by_benchmark(comparison)
    body = []
    for i, policy in enumerate(comparison.policies):
        cells = [_latex_cell(rows[i]) for rows in parts.values()]
        body.append(" & ".join([_latex(policy), *cells]) + r" \\")
    if comparison.published:
        names = list(comparison.published[0].em)
        body += [r"\midrule", rf"\multicolumn{{{len(parts) + 1}}}{{l}}{{\emph{{published, not measured here}}}} \\"]
        for row in comparison.published:
            known = dict(zip([*names, "macro average"], published_cells(row, names), strict=True))
            cells = [known.get(name) or "--" for name in parts]
            body.append(" & ".join([_latex(row.method), *cells]) + r" \\")
    notes = [f"% {' '.join(note.split())}" for note in comparison.notes]
    return (
        "\n".join(
            [
                f"% EM x 100 with 95% bootstrap intervals over questions; * p < {_SIGNIFICANT} (McNemar, exact) against",
                f"% {comparison.policies[0]}",
                *notes,
                r"\begin{tabular}{l" + "r" * len(parts) + "}",
                r"\toprule",
                " & ".join(["policy", *map(_latex, parts)]) + r" \\",
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )
        + "\n"
    )


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
