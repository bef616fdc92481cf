"""The sweep file: which variants of a config, under which seeds, and the one that the others are compared with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from search_e1.config import Config, Section, laid_over, parse_overrides, read_toml
from search_e1.config.base import NonNegative
from search_e1.errors import ConfigError
from search_e1.runs.safe import is_name

RUNS = "runs"
Pairs = list[tuple[list[str], Any]]
"""Keys of a config as paths, and their values."""


class SweepFile(Section):
    """What stands in the TOML file."""

    seeds: tuple[NonNegative, ...] = Field(default=(0,), min_length=1)
    """Each variant is run once with each."""
    reference: str | None = None
    """The variant that the others are compared with. Without it the first."""
    common: dict[str, Any] = {}
    """Keys of the config that are the same for all variants."""
    variants: dict[str, dict[str, Any]] = {}
    """Name -> keys of the config."""
    grid: dict[str, Any] = {}
    """Key of the config -> list of values. Every variant is run at every point of the grid."""


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
    """Runs, all seeds of a variant together, in the order of the file."""

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

    The keys of a variant lie over ``flags`` of the command line, these over ``common``, and that over the config.

    Raises:
        ConfigError: a file cannot be read, or a key in it is unknown, missing or has an impossible value; names the variant.
    """
    try:
        file = SweepFile.model_validate(read_toml(path, "search-e1 sweep FILE"))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        known = f"; known: {', '.join(SweepFile.model_fields)}" if problem["type"] == "extra_forbidden" else ""
        raise ConfigError(f"{path}: {key}: {problem['msg'].lower()}{known}") from error
    if len(set(file.seeds)) < len(file.seeds):
        raise ConfigError(f"{path}: seeds: one comes twice; give each once")
    variants = _variants(file, path)
    reference = file.reference or next(iter(variants))
    if reference not in variants:
        raise ConfigError(f"{path}: reference = {reference!r}: no such variant; there is {', '.join(variants)}")
    shared = [*_pairs(file.common, path, "common"), *parse_overrides(flags)]
    runs = [
        Run(name, seed, _config(config, [*shared, *pairs], name, seed, directory))
        for name, pairs in variants.items()
        for seed in file.seeds
    ]
    _all_different(runs, path)
    return Sweep(directory, reference, tuple(runs))


def _variants(file: SweepFile, path: Path) -> dict[str, Pairs]:
    """Name -> its keys, the grid multiplied in."""
    named = {name: _pairs(keys, path, f"variants.{name}") for name, keys in file.variants.items()}
    points = _points(_pairs(file.grid, path, "grid"), path) if file.grid else {"": []}
    both = {
        "+".join(filter(None, (name, point))): [*keys, *more]
        for name, keys in (named or {"": []}).items()
        for point, more in points.items()
    }
    found = {name or "base": keys for name, keys in both.items()}
    for name in found:
        if not is_name(name):
            raise ConfigError(
                f"{path}: variant {name!r}: cannot be the name of a directory; use letters, digits, '.', '+', '-' and '_'"
            )
    return found


def _points(axes: Pairs, path: Path) -> dict[str, Pairs]:
    """Name -> keys, for each point of the grid: ``steps-10+divergence-js``."""
    for key, values in axes:
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: grid.{'.'.join(key)} = {values!r}: give a list of values")
    ends = [key[-1] for key, _ in axes]
    labels = [key[-1] if ends.count(key[-1]) == 1 else ".".join(key) for key, _ in axes]
    return {
        "+".join(f"{label}-{str(value).lower()}" for label, value in zip(labels, point, strict=True)): [
            (key, value) for (key, _), value in zip(axes, point, strict=True)
        ]
        for point in product(*(values for _, values in axes))
    }


def _pairs(table: Mapping[str, Any], path: Path, where: str) -> Pairs:
    pairs = list(_leaves(table, []))
    for key, _ in pairs:
        if key in (["seed"], ["run"]):
            raise ConfigError(f"{path}: {where}.{key[0]}: the sweep sets it; give `seeds`, and --out for the directory")
    return pairs


def _leaves(table: Mapping[str, Any], prefix: list[str]) -> Iterator[tuple[list[str], Any]]:
    for name, value in table.items():
        key = [*prefix, *name.split(".")]
        if isinstance(value, Mapping):
            yield from _leaves(value, key)
        else:
            yield key, value


def _config(config: Path, pairs: Pairs, name: str, seed: int, directory: Path) -> Config:
    place = directory / RUNS / name / str(seed)
    try:
        return laid_over(config, [*_of_seed(pairs, seed), (["seed"], seed), (["run"], str(place))])
    except ConfigError as error:
        raise ConfigError(f"variant {name!r}: {error}") from error


def _of_seed(pairs: Pairs, seed: int) -> Pairs:
    """``{seed}`` in texts stands for the run's own: each run goes on from what another sweep made under its seed."""
    return [(key, value.replace("{seed}", str(seed)) if isinstance(value, str) else value) for key, value in pairs]


def _all_different(runs: Sequence[Run], path: Path) -> None:
    known: dict[str, str] = {}
    for run in runs:
        same = known.setdefault(str(run.config.binding()), run.variant)
        if same != run.variant:
            raise ConfigError(f"{path}: variants {same!r} and {run.variant!r} are the same config; take one out")
