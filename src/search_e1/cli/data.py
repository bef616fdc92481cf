"""The verbs of ``search-e1 data``."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from search_e1.cli.audit import audit
from search_e1.cli.ingest import ingest
from search_e1.cli.questions import questions
from search_e1.errors import ConfigError
from search_e1.runs.safe import printable

if TYPE_CHECKING:
    from search_e1.data.parts import Again
    from search_e1.data.prepare import Prepared

app = typer.Typer(no_args_is_help=True, help="Prepare and audit the files of a run.")
console = Console(highlight=False, markup=False, emoji=False)


class Duplicates(StrEnum):
    KEEP = "keep"
    DROP = "drop"
    REFUSE = "refuse"


@app.callback()
def _data() -> None:
    """Prepare and audit the files of a run."""


app.command()(audit)
app.command()(ingest)
app.command()(questions)


@app.command()
def prepare(
    out: Annotated[Path, typer.Option("--out", help="Directory for the new files.")],
    train: Annotated[
        list[str] | None,
        typer.Option("--train", help="Training questions: BENCHMARK[:SPLIT], all[:SPLIT] or [NAME=]FILE. Repeatable."),
    ] = None,
    eval: Annotated[
        list[str] | None,
        typer.Option("--eval", help="Evaluation questions: BENCHMARK[:SPLIT], all[:SPLIT] or [NAME=]FILE."),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Directory with the benchmarks' files, instead of the Hub: nq/test.jsonl or nq.test.jsonl[.gz].",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the Hub's collection. Default: the newest.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option("--column", help="FIELD=COLUMN of your files, e.g. question=Frage, answers=labels.text, id=."),
    ] = None,
    separator: Annotated[str | None, typer.Option(help="Separator of several answers in one cell, e.g. '|'.")] = None,
    duplicates: Annotated[Duplicates, typer.Option(help="What to do with duplicate questions.")] = Duplicates.KEEP,
    keep_unanswerable: Annotated[
        bool,
        typer.Option(
            "--keep-unanswerable", help="Keep questions without an answer, and those that MuSiQue marks as unanswerable."
        ),
    ] = False,
    drop_leaks: Annotated[bool, typer.Option("--drop-leaks", help="Remove evaluation questions from training.")] = False,
    dev_share: Annotated[float | None, typer.Option(help="Share of your own training file set aside for evaluation.")] = None,
    max: Annotated[int | None, typer.Option("--max", min=1, help="Maximum number of questions per file.")] = None,
    max_train: Annotated[int | None, typer.Option(min=1, help="The same, for training files.")] = None,
    max_eval: Annotated[int | None, typer.Option(min=1, help="The same, for evaluation files.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of subsets and of --dev-share.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier call.")] = False,
) -> None:
    """Read benchmarks or your own questions, check them, and write the files that a config names.

    Without --train and --eval: the published setup, NQ + HotpotQA for training and the seven benchmarks for evaluation.
    """
    from search_e1.data import benchmarks
    from search_e1.data import prepare as preparing
    from search_e1.data.user_files import Columns

    preparing.check_out(out, overwrite=overwrite)
    if dev_share is not None and not 0 < dev_share < 1:
        raise ConfigError(f"--dev-share {dev_share}: give a share between 0 and 1")
    if directory is not None and not directory.is_dir():
        raise ConfigError(f"--from {directory}: no such directory")
    published = not (train or eval)
    request = preparing.Request(
        train=benchmarks.TRAINING_MIX if published else tuple(train or ()),
        eval=("all",) if published else tuple(eval or ()),
        directory=directory,
        revision=revision,
        columns=Columns.parse(column or (), separator),
        duplicates=duplicates.value,
        keep_unanswerable=keep_unanswerable,
        drop_leaks=drop_leaks,
        dev_share=dev_share,
        max_train=max_train or max,
        max_eval=max_eval or max,
        seed=seed,
    )
    prepared = preparing.prepare(request)
    preparing.write(prepared, request, out, overwrite=overwrite)
    _show(prepared, duplicates, drop_leaks=drop_leaks)
    console.print("\nFor a config:\n")
    print(preparing.config_snippet(prepared, out), end="")


def _show(prepared: "Prepared", duplicates: Duplicates, *, drop_leaks: bool) -> None:
    """Print the files, then warnings, duplicates and leaks. Fits 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("file", "for", "read", "repeated", "leaked", "written", "answers/q"):
        table.add_column(heading, justify="left" if heading in ("file", "for") else "right", overflow="fold")
    for part in prepared.parts:
        answers = sum(len(row.question.answers) for row in part.rows) / len(part.rows)
        counts = (len(part.loaded.questions), len(part.repeated), part.leaked, len(part.rows))
        table.add_row(Text(part.file), part.role, *map(str, counts), f"{answers:.2f}")
    console.print(table)
    for warning in prepared.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))
    repeated = [part for part in prepared.parts if part.repeated]
    if repeated:
        done = "dropped" if duplicates is Duplicates.DROP else "kept; --duplicates drop keeps the first"
        console.print(Text(f"\nDuplicate questions ({done}):", style="yellow"))
    for part in repeated:
        console.print(Text(f"  {part.file}: {len(part.repeated)}"))
        _examples(part.repeated)
    if prepared.leaks:
        done = "dropped from training" if drop_leaks else "still in training; --drop-leaks removes them"
        console.print(Text(f"\nTraining questions that are also evaluation questions ({done}):", style="yellow"))
    for leak in prepared.leaks:
        console.print(Text(f"  {leak.train} and {leak.eval}: {leak.count}"))
        _examples(leak.examples)


def _examples(examples: "Sequence[Again]") -> None:
    for again in examples[:2]:
        question = printable(" ".join(again.question.split()))
        (file, _, line), (first_file, _, first) = again.where.rpartition(":"), again.first.rpartition(":")
        first = first if file == first_file else f"{first} of {Path(first_file).name}"
        places = f"  (line {line} = line {first})"
        room = console.width - len(places) - 4
        shown = question if len(question) <= room else f"{question[: room - 1]}\N{HORIZONTAL ELLIPSIS}"
        console.print(Text(f"    {shown}{places}", style="dim"), overflow="ellipsis", no_wrap=True)
