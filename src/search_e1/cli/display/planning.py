"""A plan in the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from search_e1.cli.display import plain_table, printable
from search_e1.lab.plan.hardware import GIB
from search_e1.lab.plan.memory import Memory
from search_e1.lab.plan.plan import Plan

_SHARED = {"none": "nothing sharded", "optimizer": "optimiser states sharded", "full": "weights sharded"}
_SHORT = {"grpo sampling": "grpo: sample", "grpo update": "grpo: update", "pool, evaluation": "pool, eval."}


def show_plan(console: Console, plan: Plan) -> None:
    """What is planned, memory, work, storage, then what was assumed and what will go wrong. Fits 80 columns."""
    shape, cluster = plan.shape, plan.cluster
    head = "the head is the embedding" if shape.tied else "head and embedding apart"
    console.print(Text(printable(plan.model), style="bold"))
    console.print(
        f"{shape.parameters / 1e9:.2f} billion weights ({head}), context {shape.context_length:,}", highlight=False
    )
    console.print(
        f"{cluster.gpus} x {cluster.gpu.name}, {_SHARED[cluster.sharding]}, sampled by {cluster.engine}",
        highlight=False,
    )
    for table in (memory_table(plan), work_table(plan), storage_table(plan)):
        console.print()
        console.print(table)
    console.print()
    rates = plan.rates
    lines = (
        f"Lengths {plan.lengths.source}.",
        f"Hours from {rates.training:.0%} of the products promised in training, {rates.reading:.0%} in reading, "
        f"{rates.bandwidth:.0%} of the bandwidth in sampling, {rates.layer_ms[cluster.engine]:g} ms a layer and step; "
        "retrieval, loading and saving not counted.",
        *(f"{note}." for note in plan.notes),
    )
    for line in lines:
        console.print(Text(printable(line), style="dim"))
    for warning in plan.warnings:
        console.print(Text(f"! {printable(warning)}", style="yellow"))
    verdict = ("It fits.", "green") if plan.fits else ("It does not fit.", "red")
    console.print(Text(*verdict))


def memory_table(plan: Plan) -> Table:
    """GiB of a rank at each stage's peak."""
    cluster = plan.cluster
    table = plain_table(
        f"Memory of a GPU at each stage's peak, GiB (it has {cluster.gpu.memory_gib:.1f}, {cluster.room / GIB:.1f} usable)"
    )
    table.add_column("stage")
    for heading in (
        "rows x\ntokens",
        "weights",
        "gra-\ndients",
        "opti-\nmiser",
        "others",
        "activ-\nations",
        "logits",
        "cache",
        "sum",
        "most\nrows",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for memory in plan.memory:
        fits = memory.total <= (
            cluster.room if cluster.engine == "transformers" or memory.cache == 0 else cluster.gpu.memory_gib * GIB
        )
        table.add_row(
            _SHORT.get(memory.stage, memory.stage),
            f"{memory.rows} x {memory.tokens}",
            *(_gib(part) for part in _parts(memory)),
            Text(_gib(memory.total), style="bold" if fits else "bold red"),
            "" if memory.most_rows is None else str(memory.most_rows),
        )
    return table


def _parts(memory: Memory) -> tuple[int, ...]:
    return (
        memory.weights, memory.gradients, memory.optimiser, memory.others, memory.activations, memory.logits, memory.cache
    )  # fmt: skip


def work_table(plan: Plan) -> Table:
    """Tokens, operations and hours of each stage over all rounds."""
    table = plain_table("Work, over all rounds")
    table.add_column("stage")
    for heading in (
        "times",
        "trajec-\ntories",
        "tokens\nsampled",
        "tokens\nread",
        "tokens\ntrained on",
        "PFLOP",
        "hours",
        "GPU-\nhours",
    ):
        table.add_column(heading, justify="right")
    for work in plan.work:
        table.add_row(
            work.stage,
            str(work.times),
            *(_count(number) for number in (work.trajectories, work.sampled, work.read, work.trained)),
            _count(work.flops / 1e15),
            _hours(work.hours),
            _hours(work.hours * plan.cluster.gpus),
        )
    table.add_row("sum", *[""] * 6, _hours(plan.hours), _hours(plan.hours * plan.cluster.gpus), style="bold")
    return table


def storage_table(plan: Plan) -> Table:
    table = plain_table("Storage, GiB")
    table.add_column("what")
    table.add_column("disk", justify="right")
    table.add_column("memory of the searching host", justify="right")
    for row in plan.storage:
        table.add_row(row.what, _gib(row.disk), _gib(row.memory))
    table.add_row(
        "sum", _gib(sum(r.disk for r in plan.storage)), _gib(sum(r.memory for r in plan.storage)), style="bold"
    )
    return table


def _gib(size: int) -> str:
    return "" if not size else f"{size / GIB:.1f}" if size >= 0.05 * GIB else "<0.1"


def _count(number: float) -> str:
    if not number:
        return ""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _hours(hours: float) -> str:
    return "" if not hours else f"{hours:,.1f}" if hours >= 0.1 else "<0.1"
