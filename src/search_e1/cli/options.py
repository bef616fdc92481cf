"""Options shared by several verbs: a corpus, an index and its encoder, and one option per field of a settings model."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError

from search_e1.errors import ConfigError
from search_e1.retrieval.convention import EncoderSettings

if TYPE_CHECKING:
    from search_e1.data.corpus import Corpus

IndexOption = Annotated[
    list[Path], typer.Option("--index", help="Directory of an index. Given twice, their rankings are fused.")
]
EncoderOption = Annotated[
    str | None,
    typer.Option("--encoder", help="Current directory of the encoder that a dense index was built with."),
]
DeviceOption = Annotated[str, typer.Option("--device", help="Device of the encoder: auto, cpu, cuda, cuda:1, ...")]
ParametersOption = Annotated[
    str | None, typer.Option("--parameters", help="FAISS search parameters, e.g. nprobe=128,k_factor_rf=40.")
]

ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        help="FIELD=COLUMN of the corpus, e.g. text=body; id= makes ids from file and line. Repeatable.",
    ),
]
PrefixOption = Annotated[
    bool, typer.Option("--prefix-ids", help="Prefix each id with the name of its corpus, for corpora with equal ids.")
]
SkipOption = Annotated[bool, typer.Option("--skip-bad-lines", help="Leave out invalid records, and report how many.")]
PassageBytesOption = Annotated[int, typer.Option("--max-passage-bytes", min=1, help="A longer passage is an invalid record.")]

_UNITS: dict[str, tuple[str, float]] = {
    "max_body_bytes": ("max_body_mib", 2**20),
    "cache_bytes": ("cache_mib", 2**20),
    "memory_bytes": ("memory_mib", 2**20),
    "batch_wait": ("batch_wait_ms", 0.001),
}
"""Field -> option in another unit, and the size of that unit in the field's."""

Command = TypeVar("Command", bound=Callable[..., None])


def with_options(model: type[BaseModel], *, without: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """Decorator that adds an option per field of ``model`` to a command, passed to it as keyword arguments."""

    def add(command: Command) -> Command:
        signature = inspect.signature(command)
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        for field, info in model.model_fields.items():
            if field in without:
                continue
            name, unit = _UNITS.get(field, (field, 1))
            bound = next((getattr(m, "ge", None) for m in info.metadata if hasattr(m, "ge")), None)
            kind = next((str | None for a in get_args(info.annotation) if get_origin(a) is Literal), info.annotation)
            default = type(info.default)(info.default / unit) if unit != 1 else info.default
            help = (info.description or "").replace("`", "").replace("\n", " ")
            option = typer.Option(help=help, min=bound, show_default=default is not None)
            annotation = Annotated[kind, option]  # type: ignore[valid-type]
            parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        return command

    return add


def open_corpus(
    places: Sequence[str],
    column: Sequence[str] | None = None,
    prefix_ids: bool = False,
    skip_bad_lines: bool = False,
    max_passage_bytes: int = 2**20,
) -> "Corpus":
    """The corpus that ``--corpus`` and its options name.

    Raises:
        ConfigError: an option is invalid.
    """
    from search_e1.data.corpus import Corpus
    from search_e1.data.formats.passages import CorpusColumns

    columns = CorpusColumns.parse(column or ())
    return Corpus(*places, columns=columns, prefix_ids=prefix_ids, skip_bad_lines=skip_bad_lines, most_bytes=max_passage_bytes)


def check_output(path: Path | None, flag: str) -> None:
    """Check, before any work, that a file can be written at ``path``.

    Raises:
        ConfigError: its directory does not exist.
    """
    if path and not path.absolute().parent.is_dir():
        raise ConfigError(f"{flag} {path}: no directory {path.parent}; make it first, or give another file")


def settings_of(model: type[BaseModel], options: dict[str, Any]) -> Any:
    """``model`` from the options that ``with_options`` added.

    Raises:
        ConfigError: a value is invalid.
    """
    values = {}
    for field in model.model_fields:
        name, unit = _UNITS.get(field, (field, 1))
        if options.get(name) is not None:
            values[field] = options[name] * unit if unit != 1 else options[name]
    try:
        return model(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{name} {problem['input']!r}: {problem['msg']}") from error


def encoder_settings(model: str | None, **options: Any) -> EncoderSettings | None:
    """Settings of the encoder ``model``; options that are None come from its files.

    Raises:
        ConfigError: a value is invalid.
    """
    return None if model is None else settings_of(EncoderSettings, {"model": model, **options})
