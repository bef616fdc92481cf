"""The verb ``search-e1 init``: writes the first config, and prints the next commands."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console
from rich.text import Text

from search_e1.cli.options import check_output
from search_e1.errors import ConfigError, ModelError, RunError

if TYPE_CHECKING:
    from search_e1.lab.plan.constants import Constants, Gpu

console = Console(highlight=False, markup=False, emoji=False)
THIS, NONE = "this", "none"
_FETCH = Path("scripts/fetch_smollm2.py")
_SHARE = 0.2  # of the user's questions, set aside for evaluation
_MOST_A_STEP = {True: 8, False: 32}
"""Small model or not -> maximum questions per GRPO step."""


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The config to write.")] = Path("mine.toml"),
    documents: Annotated[
        str | None, typer.Option("--documents", help="Folder of documents, or passages (JSON lines, Parquet, TSV).")
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option("--questions", help=f"File of questions and answers; `{NONE}`: make them from the documents."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option("--column", help="FIELD=COLUMN of the questions' file, as `data prepare` takes it. Repeatable."),
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help=f"GPU to rent: h100, 4090, ...; `{THIS}`: this machine.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Directory, Hub id or GGUF file. Default: one that fits the machine.")
    ] = None,
) -> None:
    """Write a config for your documents, questions and machine, and print the next commands. Asks for missing options."""
    from search_e1.lab.plan.constants import load_constants
    from search_e1.lab.recipe import SMALL_MODEL, Recipe, default_model, fitted, unmeasured

    if file.exists():
        raise RunError(f"{file} exists; give another name: search-e1 init other.toml")
    check_output(file, "FILE")
    constants = load_constants()
    documents = documents or _ask("Where are your documents? A folder, or a file of passages", "--documents")
    if not Path(documents).exists():
        raise ConfigError(f"{documents}: no such folder or file; give --documents")
    if Path(documents).is_dir() and not any(found.is_file() for found in Path(documents).rglob("*")):
        raise ConfigError(f"{documents}: an empty folder; give one with documents")
    questions = questions or _ask(
        "A file of questions and answers? (none: they are made from the documents)", "--questions", NONE
    )
    if questions != NONE and not Path(questions).is_file():
        raise ConfigError(f"{questions}: no such file; give --questions, or --questions {NONE}")
    gpu = gpu or _ask("A GPU to rent (h100, a100, 4090, ...), or this machine as it is", "--gpu", THIS)
    card = _this_gpu(constants) if gpu == THIS else constants.gpu(gpu)
    data = _data(documents, questions, column or [], file.stem)
    recipe = Recipe(
        file=str(file),
        machine=card.name if card else "a machine without a GPU",
        run=f"runs/{file.stem}",
        model=model or default_model(card),
        corpus=data.corpus,
        train=data.train,
        eval=data.eval,
        small=card is None,
        questions_per_step=min(_MOST_A_STEP[card is None], data.number or _MOST_A_STEP[card is None]),
        questions=data.number,
    )
    if card:
        try:
            with Console(stderr=True).status(f"planning what fits {card.name}, which takes some seconds"):
                recipe = fitted(recipe, card, constants)
        except ModelError as error:
            recipe = unmeasured(recipe)
            console.print(Text(f"whether it fits {card.name} is not known: {error}", style="yellow"), soft_wrap=True)
    recipe.config()  # validates the config before it is written
    file.write_text(recipe.toml(), encoding="utf-8")
    console.print(Text(f"{file}: {recipe.model} on {recipe.machine}"), soft_wrap=True)
    fetch = [f"python {_FETCH}"] if recipe.model == SMALL_MODEL and not Path(SMALL_MODEL).exists() else []
    if fetch and not _FETCH.exists():
        note = f"{_FETCH} is in search-e1's repository: run it there, or name a model with --model"
        console.print(Text(note), style="yellow", soft_wrap=True)
    written = shlex.quote(str(file))
    plan = [f"search-e1 plan {written} --gpu {gpu}"] if gpu != THIS else []
    last = [f"search-e1 doctor {written}", f"search-e1 train {written}", f"search-e1 serve {shlex.quote(recipe.run)}/agent"]
    console.print("\nNext:\n")
    for command in (*fetch, *data.commands, *plan, *last):
        console.print(Text(f"    {command}"), soft_wrap=True)


class _Data(NamedTuple):
    """The data of the config, and the commands that make it."""

    corpus: str
    train: str
    eval: str
    number: int | None
    """Number of training questions, if they can be counted."""
    commands: list[str]


def _data(documents: str, questions: str, columns: list[str], stem: str) -> _Data:
    from search_e1.data import user_files
    from search_e1.lab.recipe import is_made

    commands, corpus, directory = [], documents, f"{stem}-questions"
    out = shlex.quote(directory)
    if not is_made(Path(documents)):
        corpus = f"{stem}-corpus"
        commands.append(f"search-e1 data ingest {shlex.quote(documents)} --out {shlex.quote(corpus)}")
    if questions == NONE:
        commands.append(f"search-e1 data questions --corpus {shlex.quote(corpus)} --out {out} --by rule")
        return _Data(corpus, f"{directory}/train.jsonl", f"{directory}/eval.jsonl", None, commands)
    name = user_files.benchmark_name(Path(questions))
    count = len(user_files.load(Path(questions), name, user_files.Columns.parse(columns)).questions)
    flags = "".join(f" --column {shlex.quote(column)}" for column in columns)
    commands.append(f"search-e1 data prepare --train {shlex.quote(questions)}{flags} --dev-share {_SHARE} --out {out}")
    count = max(1, int((1 - _SHARE) * count))
    return _Data(corpus, f"{directory}/{name}.train.jsonl", f"{directory}/{name}.dev.jsonl", count, commands)


def _ask(text: str, flag: str, default: str | None = None) -> str:
    """Ask a question at the terminal; without a terminal, returns ``default``.

    Raises:
        ConfigError: there is neither a terminal nor a default.
    """
    if not sys.stdin.isatty():
        if default is None:
            raise ConfigError(f"{flag} is missing, and there is no terminal to ask for it; give it")
        return default
    return str(typer.prompt(text, default=default))


def _this_gpu(constants: "Constants") -> "Gpu | None":
    """This machine's GPU, with the planner's data for the GPU closest in memory; ``None`` without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    like = min(constants.gpus.values(), key=lambda gpu: abs(gpu.memory_gib - gib))
    return like.model_copy(update={"name": torch.cuda.get_device_name(0), "memory_gib": gib})
