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
    """Print EM by benchmark, costs, published figures, and the questions won and lost. Fits 80 columns."""
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
    table = plain_table(f"{title} ({rows[0].n} questions)", "policy", "greedy EM x 100", "difference", "p", "won", "lost")
    for column, width in zip(table.columns, (14, 17, 20, 5, 5, 5), strict=True):  # the same for all benchmarks
        column.min_width = width
    for row in rows:
        change = row.difference
        compared = (signed(change.em), p_value(change.p), str(change.won), str(change.lost)) if change else ()
        table.add_row(printable(row.policy), percent(row.em), *compared)
    return table


def _costs(comparison: Comparison) -> Table:
    """Searches and tokens by benchmark and, if several, on average."""
    headings = ("benchmark", "policy", "searches", "difference", "tokens", "difference")
    table = plain_table("Searches and sampled tokens per question", *headings, left=2)
    for name, rows in by_benchmark(comparison).items():
        for row in rows:
            change = row.difference
            searches, tokens = (signed(change.searches, 1, 2), signed(change.tokens, 1, 0)) if change else ("", "")
            benchmark = "" if change else printable(name)
            costs = (f"{row.searches.mean:.2f}", searches, f"{row.tokens.mean:.0f}", tokens)
            table.add_row(benchmark, printable(row.policy), *costs)
    return table


def _published(comparison: Comparison) -> Table:
    names = list(comparison.published[0].em)
    headings = (name.removesuffix("multihopqa").removesuffix("qa") for name in (*names, "macro\naverage"))
    table = plain_table("Published, not measured here: EM x 100, whole test sets, wiki-18, 3B parameters", "method", *headings)
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
