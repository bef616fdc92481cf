"""A sweep in the terminal: what is at work, and what came out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

from search_e1.cli.display import plain_table
from search_e1.evaluation.exports import percent, signed
from search_e1.lab.sweep.comparison import Comparison, Row
from search_e1.lab.sweep.running import Ending, Outcome, Told
from search_e1.lab.sweep.spec import Run
from search_e1.runs.safe import printable


@contextmanager
def watch(console: Console, runs: int) -> Iterator[Told]:
    """A bar of the runs that have ended, with those at work and their stages; a line for each that has ended."""
    bars = Bars(
        TextColumn("runs"),
        BarColumn(bar_width=10),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[at]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        console=console,
        expand=True,
    )
    task, told = bars.add_task("", total=runs, at=""), 0

    def tell(active: Sequence[Run], outcomes: Sequence[Outcome]) -> None:
        nonlocal told
        for outcome in outcomes[told:]:
            if outcome.ending is not Ending.THERE:
                said = f": {outcome.said}" if outcome.said else ""
                style = "red" if outcome.ending is Ending.FAILED else ""
                bars.console.print(Text(printable(f"{outcome.run.name} {outcome.ending}{said}"), style), soft_wrap=True)
        told = len(outcomes)
        at = ", ".join(" ".join(filter(None, (run.name, _stage(run)))) for run in active)
        bars.update(task, completed=told, at=printable(at))

    with bars:
        yield tell


def _stage(run: Run) -> str:
    """The stage at work, read off the run directory."""
    begun = (path.name[1:].removesuffix(".partial") for path in run.config.run.glob(".*.partial") if path.is_dir())
    return next(begun, "")


def show_comparison(console: Console, comparison: Comparison, stage: str) -> None:
    """EM with differences, then searches, tokens, leads and costs: a row for each variant. Fits 80 columns."""
    rows = comparison.at(stage)
    seeds = sorted({seed for row in rows for seed in row.seeds})
    policies = "Last policies" if stage == "last" else stage
    title = f"{policies}, seeds {', '.join(map(str, seeds))}, {rows[0].questions} questions"
    console.print(Text(printable(f"{title}; differences from {comparison.reference}"), style="italic"))
    console.print(_quality(rows))
    console.print()
    console.print(_trajectories(rows))
    console.print()
    console.print(_costs(rows))
    console.print(
        "\nBrackets: 95% intervals over seeds and questions, paired in differences. Charged: all that a policy took to make, "
        "stages shared with other variants included, evaluation not.",
        style="dim",
    )
    for note in comparison.notes:
        console.print(Text(f"note: {printable(note)}", style="yellow"))


def _table(title: str | None, *headings: str) -> Table:
    table = plain_table(title)
    for heading in headings:
        left = heading == "variant"
        table.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    return table


def _quality(rows: Sequence[Row]) -> Table:
    table = _table(None, "variant", "EM x 100", "difference", "sampled, difference")
    for row in rows:
        differences = (
            signed(row.differences[name]) if name in row.differences else "" for name in ("em", "em_sampled")
        )
        table.add_row(printable(row.variant), percent(row.figures["em"]), *differences)
    return table


def _trajectories(rows: Sequence[Row]) -> Table:
    table = _table("A question", "variant", "searches", "difference", "tokens", "difference")
    for row in rows:
        searches, tokens = (row.differences.get(name) for name in ("searches", "tokens"))
        table.add_row(
            printable(row.variant),
            f"{row.figures['searches'].mean:.2f}",
            signed(searches, 1, 2) if searches else "",
            f"{row.figures['tokens'].mean:.1f}",
            signed(tokens, 1, 1) if tokens else "",
        )
    return table


def _costs(rows: Sequence[Row]) -> Table:
    table = _table("Charged, means over seeds", "variant", "seeds", "lead", "refused", "s", "CPU s", "sampled", "steps")
    for row in rows:
        table.add_row(
            printable(row.variant),
            str(len(row.seeds)),
            "" if row.lead is None else f"{row.lead:+.3f}",
            str(row.refused or ""),
            f"{row.cost['seconds']:,.0f}",
            f"{row.cost['cpu_seconds']:,.0f}",
            f"{row.cost['sampled_tokens']:,.0f}",
            f"{row.cost['steps']:,.0f}",
        )
    return table
