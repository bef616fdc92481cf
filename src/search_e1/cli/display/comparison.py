"""A comparison in the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from search_e1.cli.display import plain_table
from search_e1.evaluation.compare import Change, Comparison, Row
from search_e1.evaluation.exports import by_benchmark, legend, p_value, percent, published_cells, signed
from search_e1.runs.safe import printable


def show_comparison(console: Console, comparison: Comparison, *, questions: bool = False) -> None:
    """A table of EM for each benchmark, one of costs, what others report, and what was won and lost. Fits 80 columns."""
    for name, rows in by_benchmark(comparison).items():
        console.print(_compared(printable(name), rows))
        console.print()
    console.print(_costs(comparison))
    if comparison.published:
        console.print()
        console.print(_published(comparison))
    console.print(f"\n{legend(comparison)}", markup=False, highlight=False, style="dim")
    for note in comparison.notes:
        console.print(Text(f"note: {printable(note)}", style="yellow"))
    if questions:
        for change in comparison.changes:
            _show_change(console, change)


def _compared(title: str, rows: Sequence[Row]) -> Table:
    table = plain_table(f"{title} ({rows[0].n} questions)")
    for heading, width in (("policy", 14), ("EM", 17), ("difference", 20), ("p", 5), ("won", 5), ("lost", 5)):
        left = heading == "policy"
        table.add_column(
            heading, justify="left" if left else "right", min_width=width, overflow="fold", no_wrap=not left
        )
    for row in rows:
        found = row.difference
        compared = (signed(found.em), p_value(found.p), str(found.won), str(found.lost)) if found else ()
        table.add_row(printable(row.policy), percent(row.em), *compared)
    return table


def _costs(comparison: Comparison) -> Table:
    """Searches and tokens over all questions and, of several benchmarks, on each."""
    table = plain_table("Searches and sampled tokens a question")
    for heading in ("benchmark", "policy", "searches", "difference", "tokens", "difference"):
        left = heading in ("benchmark", "policy")
        table.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    benchmark = ""
    for row in comparison.rows:
        found = row.difference
        table.add_row(
            printable(row.benchmark) if row.benchmark != benchmark else "",
            printable(row.policy),
            f"{row.searches.mean:.2f}",
            signed(found.searches, 1, 2) if found else "",
            f"{row.tokens.mean:.0f}",
            signed(found.tokens, 1, 0) if found else "",
        )
        benchmark = row.benchmark
    return table


def _published(comparison: Comparison) -> Table:
    names = list(comparison.published[0].em)
    table = plain_table("Published, not measured here: EM x 100, whole test sets, wiki-18, 3B parameters")
    table.add_column("method", overflow="fold")
    for name in (*names, "average"):
        table.add_column(name.removesuffix("multihopqa").removesuffix("qa"), justify="right")
    for row in comparison.published:
        table.add_row(row.method, *published_cells(row, names))
    return table


def _show_change(console: Console, change: Change) -> None:
    gold = ", ".join(change.answers)
    outcome = ("won", "green") if change.won else ("lost", "red")
    console.print()
    console.print(
        Text.assemble(
            outcome, f"  {change.policy}  {printable(change.benchmark)} {printable(change.id)}", f"  ({change.failure})"
        )
    )
    console.print(Text("  " + printable(change.question)))
    answers = " -> ".join("(none)" if answer is None else printable(answer) for answer in (change.before, change.after))
    console.print(Text(f"  {answers}   right: {printable(gold)}", style="dim"))
