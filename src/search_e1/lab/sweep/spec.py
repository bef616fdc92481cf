"""The sweep file: variants of a config, seeds, and the variant that the others are compared with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from search_e1.config import Config, Section, parse_overrides, read_toml, with_overrides
from search_e1.config.base import NonNegative
from search_e1.errors import ConfigError
from search_e1.runs.safe import is_name

RUNS = "runs"
Pairs = list[tuple[list[str], Any]]
"""Config keys, as paths, with their values."""


class SweepFile(Section):
    """The content of the TOML file."""

    seeds: tuple[NonNegative, ...] = Field(default=(0,), min_length=1)
    """Each variant is run once per seed."""
    reference: str | None = None
    """The variant that the others are compared with; by default the first."""
    common: dict[str, Any] = {}
    """Config keys shared by all variants."""
    variants: dict[str, dict[str, Any]] = {}
    """Variant name -> config keys."""
    grid: dict[str, Any] = {}
    """Config key -> list of values. Every variant is run at every point of the grid."""


@dataclass(frozen=True, slots=True)
class Run:
    """One variant under one seed."""

    variant: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return f"{self.variant}/{self.seed}"


@dataclass(frozen=True, slots=True)
class Sweep:
    """The runs in file order, with all seeds of a variant together."""

    directory: Path
    reference: str
    runs: tuple[Run, ...]

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(run.variant for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(run.seed for run in self.runs))


def read(path: Path, config: Path, directory: Path, flags: Sequence[str] = ()) -> Sweep:
    """The sweep in the TOML file ``path`` over ``config``, with its runs in ``directory``.

    A variant's keys override ``flags`` of the command line, which override ``common``, which overrides the config.

    Raises:
        ConfigError: a file cannot be read, or a key is unknown, missing or invalid; the message names the variant.
    """
    try:
        file = SweepFile.model_validate(read_toml(path, "search-e1 sweep FILE"))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        known = f"; known: {', '.join(SweepFile.model_fields)}" if problem["type"] == "extra_forbidden" else ""
        raise ConfigError(f"{path}: {key}: {problem['msg'].lower()}{known}") from None
    if len(set(file.seeds)) < len(file.seeds):
        raise ConfigError(f"{path}: seeds: a value is repeated; give each once")
    variants = _variants(file, path)
    reference = file.reference or next(iter(variants))
    if reference not in variants:
        raise ConfigError(f"{path}: reference = {reference!r}: no such variant; known: {', '.join(variants)}")
    given = parse_overrides(flags)
    _refuse_own(given, "--")
    shared = [*_pairs(file.common, path, "common"), *given]
    runs = [
        Run(name, seed, _config(config, [*shared, *pairs], name, seed, directory))
        for name, pairs in variants.items()
        for seed in file.seeds
    ]
    _refuse_equal_variants(runs, path)
    return Sweep(directory, reference, tuple(runs))


def _variants(file: SweepFile, path: Path) -> dict[str, Pairs]:
    """Name -> keys, for each variant at each point of the grid."""
    variants = {name: _pairs(keys, path, f"variants.{name}") for name, keys in file.variants.items()} or {"": []}
    points = _points(_pairs(file.grid, path, "grid"), path)
    variants_at_points = {
        "+".join(filter(None, (name, point))) or "base": [*keys, *more]
        for (name, keys), (point, more) in product(variants.items(), points.items())
    }
    for name in variants_at_points:
        if not is_name(name):
            raise ConfigError(
                f"{path}: variant {name!r}: cannot be the name of a directory; use letters, digits, '.', '+', '-' and '_'"
            )
    return variants_at_points


def _points(axes: Pairs, path: Path) -> dict[str, Pairs]:
    """Name -> keys, for each point of the grid: ``steps-10+divergence-js``."""
    for key, values in axes:
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: grid.{'.'.join(key)} = {values!r}: give a list of values")
    keys, ends = [key for key, _ in axes], [key[-1] for key, _ in axes]
    labels = [key[-1] if ends.count(key[-1]) == 1 else ".".join(key) for key in keys]
    return {
        "+".join(f"{label}-{str(value).lower()}" for label, value in zip(labels, values, strict=True)): list(
            zip(keys, values, strict=True)
        )
        for values in product(*(values for _, values in axes))
    }


def _pairs(table: Mapping[str, Any], path: Path, where: str) -> Pairs:
    pairs = list(_leaves(table, []))
    _refuse_own(pairs, f"{path}: {where}.")
    return pairs


def _refuse_own(pairs: Pairs, where: str) -> None:
    for key, _ in pairs:
        if key in (["seed"], ["run"]):
            raise ConfigError(f"{where}{key[0]}: the sweep sets it; give `seeds` in the file, and --out for the directory")


def _leaves(table: Mapping[str, Any], prefix: list[str]) -> Iterator[tuple[list[str], Any]]:
    for name, value in table.items():
        key = [*prefix, *name.split(".")]
        if isinstance(value, Mapping):
            yield from _leaves(value, key)
        else:
            yield key, value


def _config(config: Path, pairs: Pairs, name: str, seed: int, directory: Path) -> Config:
    own = [(["seed"], seed), (["run"], str(directory / RUNS / name / str(seed)))]
    # `{seed}` in a string becomes the run's seed, so that a run can start from another sweep's policy with the same seed.
    filled = [(k, value.replace("{seed}", str(seed)) if isinstance(value, str) else value) for k, value in pairs]
    try:
        return with_overrides(config, [*filled, *own])
    except ConfigError as error:
        raise ConfigError(f"variant {name!r}: {error}") from None


def _refuse_equal_variants(runs: Sequence[Run], path: Path) -> None:
    known: dict[str, str] = {}
    for run in runs:
        same = known.setdefault(str(run.config.fingerprint()), run.variant)
        if same != run.variant:
            raise ConfigError(f"{path}: variants {same!r} and {run.variant!r} are the same config; remove one")
