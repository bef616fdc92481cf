"""The config that `search-e1 init` writes: for the user's documents and questions, sized for the machine."""

import json
import math
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from search_e1.config import Config
from search_e1.data.documents.ingest import PASSAGES as INGESTED
from search_e1.errors import ConfigError
from search_e1.lab.plan.constants import Constants, Gpu
from search_e1.lab.plan.plan import make_plan

SMALL_MODEL = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Written by scripts/fetch_smollm2.py; for machines without a GPU."""
_MODELS = ((70.0, "Qwen/Qwen2.5-3B-Instruct"), (20.0, "Qwen/Qwen2.5-1.5B-Instruct"), (0.0, "Qwen/Qwen2.5-0.5B-Instruct"))
"""Minimum GiB of a GPU -> its model."""
_COLDSTART_PASSES, _COLDSTART_LEAST = 4, 10
"""Passes over the demonstrations, and minimum steps."""
_GRPO_LEAST = 50
"""Fewer training questions leave GRPO out."""
_PASSAGES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The variable parts of the written config; paths and names are written unchanged."""

    file: str
    machine: str
    run: str
    model: str
    corpus: str
    train: str
    eval: str
    small: bool
    """The model has some hundred million weights and runs on a CPU."""
    questions_per_step: int
    questions: int | None = None
    """Number of training questions, if they can be counted."""
    lora: bool = False
    batch_size: int = 64
    max_tokens: int = 1408

    @property
    def coldstart_batch(self) -> int:
        return 8 if self.small else 32

    @property
    def coldstart_steps(self) -> int:
        """Enough for ``_COLDSTART_PASSES`` over the demonstrations, one per question; more would memorize their answers."""
        most = 60 if self.small else 40
        if self.questions is None:
            return most
        return min(most, max(_COLDSTART_LEAST, math.ceil(_COLDSTART_PASSES * self.questions / self.coldstart_batch)))

    @property
    def grpo_steps(self) -> int:
        """0 if the questions are so few that the cold start memorizes them: groups are then all right and teach nothing."""
        if self.questions is not None and self.questions < _GRPO_LEAST:
            return 0
        return 8 if self.small else 100

    def toml(self) -> str:
        loader = PackageLoader("search_e1.lab", "")
        environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True)  # noqa: S701 - TOML, not HTML
        environment.filters["q"] = lambda text: json.dumps(text, ensure_ascii=False)
        template = environment.get_template("recipe.toml.j2")
        names = (*self.__dataclass_fields__, "coldstart_batch", "coldstart_steps", "grpo_steps")
        text = template.render({name: getattr(self, name) for name in names})
        return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"

    def config(self) -> Config:
        return Config.model_validate(tomllib.loads(self.toml()))


def default_model(gpu: Gpu | None) -> str:
    return next(name for gib, name in _MODELS if gpu.memory_gib >= gib) if gpu else SMALL_MODEL


def fitted(recipe: Recipe, gpu: Gpu, constants: Constants) -> Recipe:
    """``recipe`` in the largest form that the planner accepts for ``gpu``.

    Raises:
        ConfigError: no form fits.
        ModelError: the model is not on this machine, and its shape is unknown.
    """
    problems: tuple[str, ...] = ()
    for form in _forms(recipe):
        problems = make_plan(form.config(), gpu, 1, constants).problems
        if not problems:
            return form
    raise ConfigError(f"{recipe.model} does not fit {gpu.name}: {problems[0]}")


def unmeasured(recipe: Recipe) -> Recipe:
    """``recipe`` for a model of unknown shape: with adapters."""
    return replace(recipe, lora=True, max_tokens=4096)


def _forms(recipe: Recipe) -> Iterator[Recipe]:
    """Forms in order of preference: all weights before adapters, long trajectories before short, large batches before small."""
    for lora, max_tokens, batch_size in ((False, 4096, 256), (True, 4096, 256), (True, 4096, 64), (True, 2560, 16)):
        yield replace(recipe, lora=lora, max_tokens=max_tokens, batch_size=batch_size)


def is_made(corpus: Path) -> bool:
    """Whether ``corpus`` holds passages, rather than being a folder of documents (which may include tables).

    Raises:
        ConfigError: ``corpus`` is a single document.
    """
    if corpus.is_file():
        if corpus.name.lower().endswith((*_PASSAGES, ".tsv", ".tsv.gz", ".csv", ".csv.gz", ".json")):
            return True
        raise ConfigError(f"{corpus}: a single document; give the folder that holds it, or a file of passages")
    files = [file.name.lower() for file in corpus.iterdir() if not file.name.startswith(".")]
    return INGESTED in files or (bool(files) and all(name.endswith(_PASSAGES) for name in files))
