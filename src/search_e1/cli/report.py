"""The verb ``search-e1 report``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from search_e1.errors import ConfigError

console = Console(highlight=False, markup=False, emoji=False)
_HOST = "127.0.0.1"


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories, finished or not; several are compared on one page.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="HTML file. Default: report.html in the first run.")] = None,
    most: Annotated[
        int, typer.Option(min=1, help="Approximate number of trajectories; beyond it, a fixed sample of questions.")
    ] = 5_000,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve a page on this machine that follows the runs, instead of writing a file.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --serve; 0 picks a free one.")] = 8010,
) -> None:
    """Write runs as one HTML file (figures, costs, trajectories, pairs, rounds), or serve it while they are in progress."""
    if serve:
        if out:
            raise ConfigError(f"--serve writes no file; leave out --out {out}")
        _serve(runs, most, port)
        return
    from search_e1.evaluation.report.page import write

    out = out or runs[0] / "report.html"
    shown = write(runs[0], out, most, others=runs[1:])
    left_out = f" (of {shown['trajectories'] + shown['left_out']})" if shown["left_out"] else ""
    console.print(
        f"{out}: {shown['policies']} policies, {shown['trajectories']} trajectories{left_out}, {shown['pairs']} pairs, "
        f"{shown['bytes'] / 1e6:.1f} MB",
        soft_wrap=True,
    )


def _serve(runs: list[Path], most: int, port: int) -> None:
    """
    Raises:
        ConfigError: the extra is missing, or the port is in use.
    """
    try:
        from search_e1.evaluation.report import live
        from search_e1.serving import listening
    except ModuleNotFoundError as error:
        raise ConfigError(f"--serve needs {error.name}; install it with `pip install 'search-e1[serve]'`") from error

    def ready(url: str) -> None:
        console.print(f"{url}/ follows {', '.join(map(str, runs))}; Ctrl-C stops it", soft_wrap=True)

    try:
        bound = listening.bind(_HOST, port)
    except ConfigError as error:
        reason = getattr(error.__cause__, "strerror", None) or error
        raise ConfigError(f"--port {port}: cannot listen there ({reason}); give another, or 0 for a free one") from error
    with bound:
        live.serve(runs, most, bound, ready)
    console.print("stopped")
