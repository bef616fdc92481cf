"""The planner's constants: ``constants.toml``; over it ``measured.toml``, values measured on a GPU and written by
``benchmarks/gpu_report.py`` (may be absent); and over both a user's file."""

import tomllib
from pathlib import Path
from typing import Any

from pydantic import PositiveFloat, ValidationError

from search_e1.config import read_toml
from search_e1.errors import ConfigError
from search_e1.types import Record

GIB = 2**30
_HERE, _MEASURED = Path(__file__).parent, "measured.toml"


class Gpu(Record):
    """A GPU's specification; see ``constants.toml``."""

    name: str
    memory_gib: PositiveFloat
    tflops: PositiveFloat = 1
    tflops_float32: PositiveFloat = 1
    gb_per_second: PositiveFloat = 1


class Measured(Record):
    """Where measured constants of ``[hours]`` come from, and how well they fit the measurements."""

    device: str
    """The GPU's name according to its driver."""
    origin: str
    """Command and versions."""
    hours_error: PositiveFloat
    """Largest relative error of the predicted seconds, over all measured updates and decoding steps."""
    memory_error: PositiveFloat | None = None
    """Largest relative error of the predicted peak memory of a GPU."""


class Constants(Record):
    """The sections of ``constants.toml``, which explains each key."""

    measured: Measured | None = None
    hours: dict[str, PositiveFloat]
    memory: dict[str, PositiveFloat]
    lengths: dict[str, PositiveFloat]
    data: dict[str, int]
    gpus: dict[str, Gpu]
    models: dict[str, tuple[Any, ...]]

    def gpu(self, name: str) -> Gpu:
        """The first GPU whose name starts with ``name``; raises ConfigError if there is none."""
        for gpu in self.gpus.values():
            if f"{gpu.name}-".startswith(f"{name.lower()}-"):
                return gpu
        raise ConfigError(f"--gpu {name}: unknown (known: {', '.join(self.gpus)}; others by [gpus] in --constants FILE)")


def load_constants(path: Path | None = None) -> Constants:
    """The package's constants, overridden by those in the TOML file ``path``.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or has an impossible value.
    """
    raw = tomllib.loads((_HERE / "constants.toml").read_text(encoding="utf-8"))
    if (_HERE / _MEASURED).is_file():
        _replace(raw, tomllib.loads((_HERE / _MEASURED).read_text(encoding="utf-8")), _HERE / _MEASURED)
    if path:
        given = read_toml(path, "--constants")
        if given.get("hours"):
            raw.pop("measured", None)  # its error is measured for other constants
        _replace(raw, given, path)
    raw["gpus"] = {name: {"name": name, **sheet} for name, sheet in raw["gpus"].items()}
    try:
        return Constants.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def _replace(raw: dict[str, Any], given: dict[str, Any], path: Path) -> None:
    for section, values in given.items():
        known = raw.get(section, {})
        if section not in ("gpus", "models", "measured") and (unknown := set(values) - set(known)):
            raise ConfigError(f"{path}: unknown {section}.{min(unknown)}; known: {', '.join(known or raw)}")
        raw[section] = known | values
