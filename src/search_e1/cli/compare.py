"""The verb ``search-e1 compare``."""

import difflib
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from search_e1.errors import ConfigError, RunError
from search_e1.runs import MANIFEST, write_atomically
from search_e1.runs.safe import printable

console = Console(highlight=False, markup=False, emoji=False)
notices = Console(stderr=True, highlight=False, markup=False, emoji=False)
_PREFIX = "evaluation-"


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
            help="[NAME=]PLACE each, the first is the baseline. PLACE: an evaluation's directory, RUN:STAGE (runs/a:ofsd-1), "
            "or RUN for all evaluations of a run.",
            metavar="[NAME=]PLACE...",
        ),
    ],
    common: Annotated[bool, typer.Option("--common", help="Compare on the questions that all share.")] = False,
    allow_mixed: Annotated[
        bool, typer.Option("--allow-mixed", help="Compare although limits, prompts or retrieval differ.")
    ] = False,
    published: Annotated[bool, typer.Option("--published", help="Add published results at 3B parameters.")] = False,
    questions: Annotated[bool, typer.Option("--questions", help="List the questions won and lost.")] = False,
    format: Annotated[Format | None, typer.Option("--format", help="Default: by the ending of --out, else terminal.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write, instead of the terminal.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
) -> None:
    """Compare evaluations question by question: greedy EM, paired differences, McNemar's test, searches, tokens."""
    from search_e1.cli.display.comparison import show_comparison
    from search_e1.evaluation import compare as comparing
    from search_e1.evaluation.exports import FORMATS, SUFFIXES

    chosen = format or (Format(SUFFIXES.get(out.suffix, "terminal")) if out else Format.TERMINAL)
    if out and chosen is Format.TERMINAL:
        raise ConfigError(f"--out {out}: in which format? End its name in {', '.join(SUFFIXES)}, or give --format")
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


def places(words: Sequence[str]) -> dict[str, Path]:
    """Name -> directory of each evaluation in ``words``. Names are as short as is unambiguous.

    Raises:
        ConfigError: a name occurs twice.
        RunError: no such run, evaluation or stage; lists the alternatives.
    """
    found = [item for word in words for item in _places(word)]
    short = [name or path.name.removeprefix(_PREFIX) for name, path in found]
    names = [
        name if given or short.count(name) == 1 else f"{path.resolve().parent.name}/{name}"
        for name, (given, path) in zip(short, found, strict=True)
    ]
    for name, (_, path) in zip(names, found, strict=True):
        if names.count(name) > 1:
            raise ConfigError(f"two evaluations are called {name!r}; give this one another name: NAME={path}")
    return {name: path for name, (_, path) in zip(names, found, strict=True)}


def _places(word: str) -> list[tuple[str, Path]]:
    """The evaluations that one word refers to, each with the name given in it, if any."""
    name, equals, place = word.partition("=")
    if not equals or "/" in name:
        name, place = "", word
    path = Path(place)
    if (path / MANIFEST).is_file():
        return [(name, path)]
    if path.is_dir():
        evaluated, begun = _evaluations(path)
        if name and len(evaluated) > 1:
            raise ConfigError(
                f"{word}: {path} has {len(evaluated)} evaluations; name one: {name}={path}:{next(iter(evaluated))}"
            )
        if begun:
            notices.print(f"{path}: not finished, left out: {', '.join(begun)}", style="yellow", soft_wrap=True)
        return [(name, directory) for directory in evaluated.values()]
    run, colon, stage = place.rpartition(":")
    if not colon or not Path(run).is_dir():
        raise RunError(f"{place}: no such directory; give an evaluation's directory, RUN:STAGE, or RUN")
    evaluated, begun = _evaluations(Path(run))
    stage = stage.removeprefix(_PREFIX)
    if stage not in evaluated:
        close = difflib.get_close_matches(stage, evaluated, n=1)
        known = f"available: {', '.join(evaluated)}"
        hint = "it is not finished" if stage in begun else f"did you mean {close[0]!r}?" if close else known
        raise RunError(f"{run}: no evaluation of {stage!r} in it; {hint}")
    return [(name, evaluated[stage])]


def _evaluations(run: Path) -> tuple[dict[str, Path], list[str]]:
    """Policy -> its evaluation, in the order of the loop; and the policies whose evaluation is unfinished.

    Raises:
        RunError: it is not a run, or nothing in it is evaluated.
    """
    from search_e1.evaluation.report.files import open_run, policy_of

    opened = open_run(run)
    if not opened.evaluations:
        raise RunError(f"{run}: nothing in it is evaluated yet; run `search-e1 evaluate`, or wait")
    begun = [stage.removeprefix(_PREFIX) for stage in opened.begun if stage.startswith(_PREFIX)]
    return {policy_of(stage): stage.path for stage in opened.evaluations}, begun
