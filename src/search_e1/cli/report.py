"""The verb ``search-e1 report``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console(highlight=False, markup=False, emoji=False)


def report(
    run: Annotated[Path, typer.Argument(help="Run directory, finished or not.")],
    out: Annotated[Path | None, typer.Option("--out", help="HTML file. Default: report.html in the run.")] = None,
    most: Annotated[
        int, typer.Option(min=1, help="About this many trajectories; of more, a fixed sample of questions.")
    ] = 5_000,
) -> None:
    """Write a run as one HTML file: figures, costs, trajectories, pairs, rounds."""
    from search_e1.evaluation.report.page import write

    out = out or run / "report.html"
    shown = write(run, out, most)
    left_out = f" (of {shown['trajectories'] + shown['left_out']})" if shown["left_out"] else ""
    console.print(
        f"{out}: {shown['policies']} policies, {shown['trajectories']} trajectories{left_out}, {shown['pairs']} pairs, "
        f"{shown['bytes'] / 1e6:.1f} MB",
        soft_wrap=True,
    )
