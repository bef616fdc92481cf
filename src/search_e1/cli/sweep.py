"""The verb ``search-e1 sweep``."""

import os
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from search_e1.errors import ConfigError, RunError
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
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs in parallel. Default: one per core, or one on a GPU.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Run nothing; compare the finished runs.")] = False,
    stage: Annotated[
        str, typer.Option("--stage", help="Policies to show: last, base, grpo-1, ofsd-1, ... Files hold all.")
    ] = "last",
) -> None:
    """Run variants of a config under several seeds in parallel, and compare them. To resume, run it again."""
    from search_e1.cli.display.sweep import show_progress
    from search_e1.lab.sweep import running, spec
    from search_e1.runs.locks import held

    read = spec.read(file, config, out or Path("runs") / file.stem, context.args)
    with nullcontext() if report else held(read.directory):  # a report may look at a running sweep
        outcomes: Sequence[Outcome] = ()
        if not report:
            versions = context.obj["other_versions"]
            with on_signals() as stop, show_progress(console, len(read.runs)) as on_change:
                outcomes = running.run_all(
                    read.runs, read.directory, jobs or _default_jobs(read), stop, on_change, other_versions=versions
                )
        done = [run for run in read.runs if running.is_finished(run)]
        if done:
            _compare(read, done, stage)
    _exit(read, outcomes, done)


def _default_jobs(sweep: "Sweep") -> int:
    """One per core; a single one if runs would share an accelerator."""
    from search_e1.runs.devices import device

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if device(sweep.runs[0].config.policy.device).type == "cpu" else 1


def _compare(sweep: "Sweep", done: "Sequence[Run]", stage: str) -> None:
    from search_e1.cli.display.sweep import show_comparison
    from search_e1.lab.sweep import comparison, plot, results

    found = [result for run in done for result in results.read_results(run)]
    compared = comparison.compare_variants(found, sweep.reference)
    files = {
        results.RESULTS: results.policy_rows(found),
        results.QUESTIONS: results.question_rows(found),
        comparison.FILE: compared.records(),
    }
    for name, rows in files.items():
        results.write_parquet(rows, sweep.directory / name)
    if not compared.at(stage):
        known = dict.fromkeys(row.stage for row in compared.rows)
        raise ConfigError(f"--stage {stage}: no finished run has it; known: {', '.join(known)}")
    show_comparison(console, compared, stage)
    names = [*files, plot.FILE] if find_spec("matplotlib") else list(files)
    if plot.FILE in names:
        plot.draw(compared, sweep.directory / plot.FILE)
    else:
        console.print("no plot: pip install 'search-e1[plots]'", style="yellow")
    console.print(f"\n{sweep.directory}: {', '.join(names)}", soft_wrap=True)


def _exit(sweep: "Sweep", outcomes: "Sequence[Outcome]", done: "Sequence[Run]") -> None:
    """Print which runs are unfinished and why; exit with status 1 if any are."""
    from search_e1.lab.sweep.running import Ending

    for outcome in outcomes:
        if outcome.ending in (Ending.FAILED, Ending.STOPPED):
            line = f"{outcome.run.name}: {outcome.message} ({outcome.log})"
            console.print(Text(printable(line), style="red"), soft_wrap=True)
    if missing := len(sweep.runs) - len(done):
        console.print(f"{missing} of {len(sweep.runs)} runs are not finished; run the same command again to resume them")
        if not outcomes and not done:
            raise RunError(f"{sweep.directory}: nothing finished to report; run it without --report")
        raise typer.Exit(1)
