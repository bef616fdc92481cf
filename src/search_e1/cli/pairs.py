"""The verbs of ``search-e1 pairs``, except ``mine``, which is a stage (``cli.stages``)."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from search_e1.errors import ConfigError, DataError

if TYPE_CHECKING:
    from search_e1.types import Pair

console = Console(highlight=False, markup=False, emoji=False)
PAIRS = (
    "train.jsonl",
    "held_out.jsonl",
)  # as in `selfdistill.files`, whose import would slow down `--help`


class _Group(TyperGroup):
    """Makes ``pairs mine.toml`` an abbreviation of ``pairs mine mine.toml``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *self.get_help_option_names(ctx)):
            args = ["mine", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    help="Mine pairs from a pool (`pairs mine.toml`, or `pairs mine mine.toml`), or show them.",
)


@app.command()
def show(
    place: Annotated[
        Path, typer.Argument(metavar="RUN_OR_ARTIFACT", help="A run (its newest pairs), or a directory of pairs.")
    ],
    question: Annotated[str | None, typer.Option("--question", help="Show the pairs of the question with this id.")] = None,
    number: Annotated[
        int | None, typer.Option("--number", help="Show the pair with this number, from 1; held-out pairs come last.")
    ] = None,
) -> None:
    """Print a pair: reference and student side by side."""
    from search_e1.cli.display.pairs import show_pair

    if question is not None and number is not None:
        raise ConfigError("give --question or --number, not both")
    directory = _newest(place)
    pairs = _read(directory)
    if question is not None:
        chosen = [i for i, (pair, _) in enumerate(pairs) if pair.question.id == question]
        if not chosen:
            ids = list(dict.fromkeys(pair.question.id for pair, _ in pairs))
            raise DataError(
                f"{directory}: no pair of question {question!r}; its {len(ids)} questions are {', '.join(map(repr, ids[:3]))}"
                + (", ..." if len(ids) > 3 else "")
            )
    else:
        number = 1 if number is None else number
        if not 1 <= number <= len(pairs):
            raise DataError(f"{directory}: no pair {number}; give a --number from 1 to {len(pairs)}")
        chosen = [number - 1]
    for i in chosen:
        pair, part = pairs[i]
        show_pair(console, pair, f"pair {i + 1} of {len(pairs)} in {directory.name}, {part}")


def _newest(place: Path) -> Path:
    """``place`` itself if it holds pairs, else the pairs of the last round of the run in it.

    Raises:
        DataError: ``place`` is neither.
    """
    if all((place / name).is_file() for name in PAIRS):
        return place
    stages = [path for path in place.glob("pairs-*") if path.name.removeprefix("pairs-").isdigit()]
    if not stages:
        raise DataError(
            f"{place}: neither a run with pairs nor a directory of pairs; make them with `search-e1 pairs --config FILE`"
        )
    return max(stages, key=lambda path: int(path.name.removeprefix("pairs-")))


def _read(directory: Path) -> "list[tuple[Pair, str]]":
    """All pairs, each with its use.

    Raises:
        DataError: there are none, or a file cannot be read.
    """
    from search_e1.selfdistill import files

    parts = zip(PAIRS, ("to distill on", "held out"), strict=True)
    pairs = [(pair, part) for name, part in parts for pair in files.read(directory / name)]
    if not pairs:
        raise DataError(f"{directory}: no pairs in it; its manifest.json has the pool's figures")
    return pairs
