"""The verb ``search-e1 compare``."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from search_e1.errors import ConfigError, RunError
from search_e1.runs import write_atomically
from search_e1.runs.safe import printable

console = Console(highlight=False, markup=False, emoji=False)


class Format(StrEnum):
    TERMINAL = "terminal"
    MARKDOWN = "markdown"
    LATEX = "latex"
    CSV = "csv"
    JSON = "json"


def compare(
    evaluations: Annotated[
        list[str],
        typer.Argument(
            help="Evaluations; the first is the baseline. PLACE: an evaluation's directory, RUN:STAGE (runs/a:ofsd-1), or RUN "
            "for all evaluations of a run.",
            metavar="[NAME=]PLACE...",
        ),
    ],
    common: Annotated[bool, typer.Option("--common", help="Compare on the questions shared by all.")] = False,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Compare even if limits, prompts or retrieval differ.")
    ] = False,
    published: Annotated[bool, typer.Option("--published", help="Add published results at 3B parameters.")] = False,
    questions: Annotated[bool, typer.Option("--questions", help="List the questions won and lost.")] = False,
    format: Annotated[Format | None, typer.Option("--format", help="Default: by the suffix of --out, else terminal.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write, instead of the terminal.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
) -> None:
    """Compare evaluations question by question: greedy EM, paired differences, McNemar's test, searches, tokens."""
    from search_e1.cli.display.comparison import show_comparison
    from search_e1.evaluation import compare as comparing
    from search_e1.evaluation.exports import FORMATS, SUFFIXES
    from search_e1.evaluation.places import places

    chosen = format or (Format(SUFFIXES.get(out.suffix, "terminal")) if out else Format.TERMINAL)
    if out and chosen is Format.TERMINAL:
        raise ConfigError(f"--out {out}: unknown format; end its name in {', '.join(SUFFIXES)}, or give --format")
    loaded = [comparing.load(path, name) for name, path in places(evaluations).items()]
    if len(loaded) < 2:
        raise ConfigError(f"only one evaluation ({loaded[0].path}); give another to compare it with")
    comparison = comparing.compare(loaded, common=common, allow_mixed=allow_mixed, published=published, seed=seed)
    if chosen is Format.TERMINAL:
        show_comparison(console, comparison, questions=questions)
        return
    text = FORMATS[chosen](comparison, questions)
    if out is None:
        print(printable(text) if sys.stdout.isatty() else text, end="")
        return
    try:
        write_atomically(out, text)
    except OSError as error:
        raise RunError(f"{out}: {error.strerror or error}; give a file that can be written with --out") from error
    console.print(f"{out}", soft_wrap=True)
