"""A sweep in the terminal: active runs, and the comparison."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

from search_e1.cli.display import plain_table
from search_e1.evaluation.exports import percent, signed
from search_e1.lab.sweep.comparison import Comparison, VariantRow
from search_e1.lab.sweep.running import Ending, OnChange, Outcome
from search_e1.lab.sweep.spec import Run
from search_e1.runs.safe import printable


@contextmanager
def show_progress(console: Console, runs: int) -> Iterator[OnChange]:
    """A progress bar over the runs with the active ones and their stages; prints one line per run that ends."""
    stages = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    bars = Bars(
        TextColumn("runs"),
        BarColumn(bar_width=10),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[active]}", markup=False, table_column=stages),
        console=console,
        expand=True,
    )
    task, shown = bars.add_task("", total=runs, active=""), 0

    def on_change(active: Sequence[Run], outcomes: Sequence[Outcome]) -> None:
        nonlocal shown
        for outcome in outcomes[shown:]:
            if outcome.ending is not Ending.EARLIER:
                message = f": {outcome.message}" if outcome.message else ""
                style = "red" if outcome.ending is Ending.FAILED else ""
                line = printable(f"{outcome.run.name} {outcome.ending}{message}")
                bars.console.print(Text(line, style), soft_wrap=True)
        shown = len(outcomes)
        names = ", ".join(" ".join(filter(None, (run.name, _stage(run)))) for run in active)
        bars.update(task, completed=shown, active=printable(names))

    with bars:
        yield on_change


def _stage(run: Run) -> str:
    """The stage in progress, found in the run directory."""
    begun = (path.name[1:].removesuffix(".partial") for path in run.config.run.glob(".*.partial") if path.is_dir())
    return next(begun, "")


def show_comparison(console: Console, comparison: Comparison, stage: str) -> None:
    """Print EM with differences, then searches, tokens, leads and costs, one row per variant. Fits 80 columns."""
    rows = comparison.at(stage)
    seeds = sorted({seed for row in rows for seed in row.seeds})
    policies = "Last policies" if stage == "last" else stage
    title = f"{policies}, seeds {', '.join(map(str, seeds))}, {rows[0].questions} questions (micro average)"
    console.print(Text(printable(f"{title}; differences from {comparison.reference}"), style="italic"))
    console.print(_quality(rows))
    console.print()
    console.print(_trajectories(rows))
    console.print()
    console.print(_costs(rows))
    console.print(
        "\nBrackets: 95% intervals over seeds and questions, paired for differences. Charged: all it took to make a policy, "
        "including stages shared with other variants, excluding evaluation.",
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


def _quality(rows: Sequence[VariantRow]) -> Table:
    table = _table(None, "variant", "greedy EM x 100", "difference", "sampled EM, difference")
    for row in rows:
        differences = (signed(row.differences[name]) if name in row.differences else "" for name in ("em", "em_sampled"))
        table.add_row(printable(row.variant), percent(row.metrics["em"]), *differences)
    return table


def _trajectories(rows: Sequence[VariantRow]) -> Table:
    table = _table("Per question", "variant", "searches", "difference", "tokens", "difference")
    for row in rows:
        searches, tokens = (row.differences.get(name) for name in ("searches", "tokens"))
        table.add_row(
            printable(row.variant),
            f"{row.metrics['searches'].mean:.2f}",
            signed(searches, 1, 2) if searches else "",
            f"{row.metrics['tokens'].mean:.1f}",
            signed(tokens, 1, 1) if tokens else "",
        )
    return table


def _costs(rows: Sequence[VariantRow]) -> Table:
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
