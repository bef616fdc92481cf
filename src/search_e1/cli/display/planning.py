"""A plan in the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from search_e1.cli.display import plain_table, printable
from search_e1.lab.plan.constants import GIB
from search_e1.lab.plan.plan import Plan


def show_plan(console: Console, plan: Plan) -> None:
    """Print memory, work and disk, then assumptions and problems. Fits 80 columns."""
    console.print(Text(printable(plan.model), style="bold"))
    console.print(f"{plan.shape.parameters / 1e9:.2f} billion weights, on {plan.gpus} x {plan.gpu.name}")
    for table in (_memory(plan), _work(plan)):
        console.print()
        console.print(table)
    console.print(Text(f"\n{_error(plan)}", style="dim"))
    disk = ", ".join(f"{name} {_gib(size)}" for name, size in plan.disk.items())
    console.print(f"Disk, GiB: {disk}, sum {_gib(sum(plan.disk.values()))}; not counting an index.", style="dim")
    if plan.assumed:
        console.print(Text(f"Files not found, sizes assumed: {printable(', '.join(plan.assumed))}.", style="dim"))
    for warning in (*plan.problems, *plan.warnings):
        console.print(Text(f"! {printable(warning)}", style="yellow"))
    console.print("It does not fit." if plan.problems else "It fits.", style="red" if plan.problems else "green")


def _error(plan: Plan) -> str:
    """The error of the hours, in words."""
    measured = plan.measured
    if measured is None:
        return "Hours: error not measured; based on assumed fractions of the data sheet (constants.toml)."
    there = "" if plan.gpu.name.split("-")[0] in measured.device.lower() else ", another GPU"
    return f"Hours, for these token counts: within {measured.hours_error:.0%} of what was measured on {measured.device}{there}."


def _memory(plan: Plan) -> Table:
    table = plain_table(f"GiB per GPU at each stage's peak (of {plan.gpu.memory_gib:.1f}, {plan.usable / GIB:.1f} usable)")
    table.add_column("stage")
    parts = ("weights", "gradients", "optimizer", "other", "activations", "logits", "cache", "total")
    for heading in (
        "rows x\ntokens",
        "weights",
        "gra-\ndients",
        "opti-\nmizer",
        "other",
        "activ-\nations",
        "logits",
        "cache",
        "sum",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for memory in plan.memory:
        sizes = [_gib(getattr(memory, part)) for part in parts]
        table.add_row(memory.stage, f"{memory.rows} x {memory.tokens}", *sizes)
    return table


def _work(plan: Plan) -> Table:
    table = plain_table("Over all rounds")
    table.add_column("stage")
    for heading in ("trajec-\ntories", "tokens\nsampled", "tokens\ntrained on", "hours", "GPU-\nhours"):
        table.add_column(heading, justify="right")
    for work in plan.work:
        counts = (_count(number) for number in (work.trajectories, work.sampled, work.trained))
        table.add_row(work.stage, *counts, _hours(work.hours), _hours(work.hours * plan.gpus))
    table.add_row("sum", "", "", "", _hours(plan.hours), _hours(plan.hours * plan.gpus), style="bold")
    return table


def _gib(size: int) -> str:
    return "" if not size else f"{size / GIB:.1f}" if size >= 0.05 * GIB else "<0.1"


def _count(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}" if number else ""


def _hours(hours: float) -> str:
    return "" if not hours else f"{hours:,.1f}" if hours >= 0.1 else "<0.1"
