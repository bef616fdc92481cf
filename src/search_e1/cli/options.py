"""Options shared by several verbs: an index and its encoder, and one option per field of a settings model."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError

from search_e1.errors import ConfigError
from search_e1.retrieval.convention import EncoderSettings

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
