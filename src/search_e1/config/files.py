"""Reads a configuration from a TOML file and dotted flags, and describes all keys as a table."""

import datetime
import difflib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from search_e1.config.run import Config
from search_e1.errors import ConfigError

_SCALARS = (bool, int, float, datetime.date, datetime.time)
_OF_TEXTS = ("string_type", "path_type")
_SHOWN_FILES = 4


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the TOML file ``path``, overridden by dotted flags.

    ``overrides`` are command-line words: ``["--grpo.steps", "8", "--data.eval.nq=nq.jsonl"]``. A value is parsed as TOML if
    possible, else taken as text; also as text if the key accepts only text (``--run 2025-11-28``). Relative paths in the file
    are relative to the working directory.

    Raises:
        ConfigError: the file cannot be read, or a key (named) is unknown, missing or has an invalid value.
    """
    flags = list(_words(overrides))
    read = [(key, _toml_value(text)) for key, text in flags]
    texts = {tuple(key): text for key, text in flags}
    try:
        return _validated(path, read)
    except ValidationError as error:
        as_text = {(*key,) for problem in error.errors() for key, value in read if _needs_text(problem, key, value)}
        with suppress(ValidationError):
            if as_text:
                return _validated(path, [(key, texts[(*key,)] if (*key,) in as_text else value) for key, value in read])
        where = "command line" if any(_concerns(error, key) for key in texts) else path
        raise ConfigError(f"{where}: {_first_problem(error)}") from None


def with_overrides(path: str | Path, pairs: Iterable[tuple[list[str], Any]]) -> Config:
    """The configuration in the TOML file ``path`` with keys overridden in order. Raises like ``load``."""
    try:
        return _validated(path, pairs)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_problem(error)}") from None


def _validated(path: str | Path, pairs: Iterable[tuple[list[str], Any]]) -> Config:
    raw = read_toml(Path(path), "--config")
    for key, value in pairs:
        _set(raw, key, value)
    return Config.model_validate(raw)


def _needs_text(problem: Mapping[str, Any], key: Sequence[str], value: Any) -> bool:
    """Whether a flag's ``value`` is a TOML scalar that validation refused, so that its text may be meant."""
    return isinstance(value, _SCALARS) and tuple(map(str, problem["loc"][: len(key)])) == tuple(key)


def _concerns(error: ValidationError, key: tuple[str, ...]) -> bool:
    """Whether the first problem is in what was set as ``key``, or is a section that does not exist without it."""
    problem = error.errors()[0]
    at = tuple(map(str, problem["loc"]))
    return at[: len(key)] == key or (problem["type"] == "extra_forbidden" and key[: len(at)] == at)


def read_toml(path: Path, flag: str) -> dict[str, Any]:
    """The contents of a TOML file; error messages name ``flag``, the flag that it is given with.

    Raises:
        ConfigError: the file cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors write a byte-order mark
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {_files_near(path, flag)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; give the path of a TOML file with {flag}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not TOML: nested too deeply") from None
    except ValueError as error:  # invalid TOML or UTF-8, or a number with too many digits
        raise ConfigError(f"{path}: not TOML: {error}") from None


def _files_near(path: Path, flag: str) -> str:
    """A hint for the missing ``path``: a similar file, or the TOML files nearby."""
    there = sorted(str(file) for folder in {path.parent, Path("configs")} for file in folder.glob("*.toml"))
    close = difflib.get_close_matches(str(path), there, n=1) or [file for file in there if Path(file).stem == path.stem]
    if close:
        return f"did you mean {close[0]}?"
    if there:
        more = f" and {len(there) - _SHOWN_FILES} more" if len(there) > _SHOWN_FILES else ""
        return f"TOML files here: {', '.join(there[:_SHOWN_FILES])}{more}"
    return f"give the path of a TOML file with {flag}"


def parse_overrides(flags: Sequence[str]) -> list[tuple[list[str], Any]]:
    """``["--a.b", "1", "--c=x"]`` -> ``[(["a", "b"], 1), (["c"], "x")]``.

    Raises:
        ConfigError: a word is not a flag, or a flag has no value.
    """
    return [(key, _toml_value(text)) for key, text in _words(flags)]


def _words(flags: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    words = list(flags)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}; overrides are written --section.key value")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"--{name}: a value is missing; write --{name} VALUE")
            value = words.pop(0)
        yield name.split("."), value


def _toml_value(text: str) -> Any:
    try:
        read = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return read["value"] if len(read) == 1 else text  # a text of several lines can parse as several keys


def _set(tree: dict[str, Any], key: list[str], value: Any) -> None:
    for i, part in enumerate(key[:-1]):
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--{'.'.join(key)}: {'.'.join(key[: i + 1])} is a value, not a section")
    tree[key[-1]] = value


def _first_problem(error: ValidationError) -> str:
    """The first error as one line: the key, its value, and the remedy."""
    problem = error.errors()[0]
    parts = [str(part) for part in problem["loc"]]
    key = ".".join(parts)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "missing":
        return f"key {key!r} is missing{more}"
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(parts[-1], _keys_at(parts[:-1]), n=1)
        hint = f"did you mean {'.'.join([*parts[:-1], close[0]])!r}?" if close else f"known: {_keys_at(parts[:-1])}"
        return f"unknown key {key!r}; {hint}{more}"
    message = problem["msg"].removeprefix("Value error, ")
    quotes = "; write it in quotes" if isinstance(problem["input"], _SCALARS) and problem["type"] in _OF_TEXTS else ""
    return f"{key} = {_shorten(repr(problem['input']), 200)}: {message}{quotes}{more}" if key else f"{message}{more}"


def _keys_at(path: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Config
    for part in path:
        field = section.model_fields.get(part)
        section = (_nested(field.annotation) if field else None) or section
    return list(section.model_fields)


def migrate_fingerprint(there: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier version's ``Config.fingerprint``, converted to this version's.

    Keys added since get their defaults; keys no longer part of the fingerprint are dropped. A fingerprint that this version
    cannot read is returned unchanged.
    """
    try:
        return Config.model_validate({**there, "run": "."}).fingerprint()
    except ValidationError:
        return dict(there)


def default_of(path: Sequence[str]) -> Any:
    """The default of the key with this path, as a JSON value.

    Raises:
        LookupError: the key does not exist or has no default.
    """
    section: type[BaseModel] | None = Config
    for part in path[:-1]:
        section = _nested(section.model_fields[part].annotation) if section else None
    if section is None or section.model_fields[path[-1]].is_required():
        raise LookupError(path)
    return to_jsonable_python(section.model_fields[path[-1]].get_default(call_default_factory=True))


def describe() -> str:
    """Every key with its default and description, as Markdown: the text of `docs/configuration.md`."""
    lines = [
        "# Configuration",
        "",
        "Every key of a TOML file, and as a flag: `--section.key VALUE`. Made by `search-e1 config`.",
        "",
    ]
    return "\n".join(lines + _section("", Config)) + "\n"


def _section(prefix: str, section: type[BaseModel]) -> list[str]:
    about = section.__doc__ if section.__doc__ and prefix else ""
    lines = [f"## `[{prefix}]`" if prefix else "## Top level", ""]
    lines += [" ".join(about.split()), ""] if about else []
    lines += ["| key | default | what |", "|---|---|---|"]
    inner: list[tuple[str, type[BaseModel]]] = []
    for name, field in section.model_fields.items():
        nested = _nested(field.annotation)
        if nested is not None:
            inner.append((f"{prefix}.{name}".lstrip("."), nested))
            if field.default is not None:
                continue
        what = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {_shown_default(field)} | {what} |")
    for key, nested in inner:
        lines += ["", *_section(key, nested)]
    return lines


def _nested(annotation: Any) -> type[BaseModel] | None:
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next((t for t in candidates if isinstance(t, type) and issubclass(t, BaseModel)), None)


def _shown_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "none" if field.default is None else f"`{_shorten(json.dumps(field.default))}`"


def _shorten(text: str, most: int = 48) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
