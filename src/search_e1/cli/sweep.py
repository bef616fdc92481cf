"""The verb ``search-e1 sweep``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from search_e1.errors import ConfigError, RunError
from search_e1.runs import write_atomically
from search_e1.runs.safe import printable
from search_e1.runs.stopping import on_signals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from search_e1.lab.sweep.running import Outcome
    from search_e1.lab.sweep.spec import Run, Sweep

console = Console(highlight=False, markup=False, emoji=False)


def sweep(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="TOML file: seeds, reference, common, variants, grid.", metavar="FILE")],
    config: Annotated[
        Path, typer.Option("--config", help="TOML file that all variants start from; keys as --section.key VALUE.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Directory. Default: runs/ and the file's name.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs side by side. Default: one a core, or one where there is a GPU.")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Run nothing; compare what is finished.")] = False,
    stage: Annotated[
        str, typer.Option("--stage", help="Policies to show: last, base, grpo-1, ofsd-1, ... Files hold all.")
    ] = "last",
) -> None:
    """Run variants of a config under several seeds, side by side, and compare them. To go on, run it again."""
    from search_e1.cli.display.sweep import watch
    from search_e1.lab.sweep import running, spec
    from search_e1.runs.locks import held

    read = spec.read(file, config, out or Path("runs") / file.stem, context.args)
    with held(read.directory):
        if report:
            outcomes: Sequence[Outcome] = ()
        else:
            beside = jobs or _jobs(read)
            with on_signals() as stop, watch(console, len(read.runs)) as told:
                outcomes = running.work(
                    read.runs, read.directory, beside, stop, told, other_versions=context.obj["other_versions"]
                )
        done = [run for run in read.runs if running.is_finished(run)]
        if done:
            _compare(read, done, stage)
    _end(read, outcomes, done)


def _jobs(sweep: "Sweep") -> int:
    """How many runs the machine does side by side: one where they would share an accelerator."""
    from search_e1.runs.devices import device

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if device(sweep.runs[0].config.policy.device).type == "cpu" else 1


def _compare(sweep: "Sweep", done: "Sequence[Run]", stage: str) -> None:
    from search_e1.cli.display.sweep import show_comparison
    from search_e1.lab.sweep import comparison, plot, results

    found = [evaluation for run in done for evaluation in results.evaluations(run)]
    compared = comparison.compared(found, sweep.reference)
    results.write_parquet(results.rows(found), sweep.directory / results.RESULTS)
    results.write_parquet(results.question_rows(found), sweep.directory / results.QUESTIONS)
    results.write_parquet(compared.records(), sweep.directory / comparison.FILE)
    write_atomically(sweep.directory / plot.FILE, plot.svg(compared))
    if not compared.at(stage):
        known = dict.fromkeys(row.stage for row in compared.rows)
        raise ConfigError(f"--stage {stage}: no finished run has it; there is {', '.join(known)}")
    show_comparison(console, compared, stage)
    names = ", ".join((results.RESULTS, results.QUESTIONS, comparison.FILE, plot.FILE))
    console.print(f"\n{sweep.directory}: {names}", soft_wrap=True)


def _end(sweep: "Sweep", outcomes: "Sequence[Outcome]", done: "Sequence[Run]") -> None:
    """Says which runs are missing, and why."""
    from search_e1.lab.sweep.running import Ending

    missing = len(sweep.runs) - len(done)
    for outcome in outcomes:
        if outcome.ending in (Ending.FAILED, Ending.STOPPED):
            told = f"{outcome.run.name}: {outcome.said} ({outcome.log})"
            console.print(Text(printable(told), style="red"), soft_wrap=True)
    if missing:
        console.print(
            f"{missing} of {len(sweep.runs)} runs are not finished; run the same command again to go on with them"
        )
        if not outcomes and not done:
            raise RunError(f"{sweep.directory}: nothing finished to report; run it without --report")
        raise typer.Exit(1)
