"""The planner's constants: ``constants.toml``, and a file of measurements that replaces some of them."""

import tomllib
from pathlib import Path
from typing import Any

from pydantic import PositiveFloat, ValidationError

from search_e1.config import read_toml
from search_e1.errors import ConfigError
from search_e1.types import Record

GIB = 2**30


class Gpu(Record):
    """As in ``constants.toml``."""

    name: str
    memory_gib: PositiveFloat
    tflops: PositiveFloat = 1
    tflops_float32: PositiveFloat = 1
    gb_per_second: PositiveFloat = 1


class Constants(Record):
    """The sections of ``constants.toml``, where each key is explained."""

    hours: dict[str, PositiveFloat]
    memory: dict[str, PositiveFloat]
    lengths: dict[str, PositiveFloat]
    data: dict[str, int]
    gpus: dict[str, Gpu]
    models: dict[str, tuple[Any, ...]]

    def gpu(self, name: str) -> Gpu:
        """The first GPU whose name begins like ``name``; raises ConfigError if there is none."""
        for gpu in self.gpus.values():
            if f"{gpu.name}-".startswith(f"{name.lower()}-"):
                return gpu
        raise ConfigError(f"--gpu {name}: unknown (known: {', '.join(self.gpus)}; others by [gpus] in --constants FILE)")


def load_constants(path: Path | None = None) -> Constants:
    """The package's constants, with those in the TOML file ``path`` in their place.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or has an impossible value.
    """
    raw = tomllib.loads((Path(__file__).parent / "constants.toml").read_text(encoding="utf-8"))
    for section, values in (read_toml(path, "--constants") if path else {}).items():
        known = raw.get(section, {})
        if section not in ("gpus", "models") and (unknown := set(values) - set(known)):
            raise ConfigError(f"{path}: unknown {section}.{min(unknown)}; known: {', '.join(known or raw)}")
        raw[section] = known | values
    raw["gpus"] = {name: {"name": name, **sheet} for name, sheet in raw["gpus"].items()}
    try:
        return Constants.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
