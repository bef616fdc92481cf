"""A first config for one's own documents and questions, sized for the machine: what `search-e1 init` writes."""

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
"""What scripts/fetch_smollm2.py writes; for machines without a GPU."""
_MODELS = ((70.0, "Qwen/Qwen2.5-3B-Instruct"), (20.0, "Qwen/Qwen2.5-1.5B-Instruct"), (0.0, "Qwen/Qwen2.5-0.5B-Instruct"))
"""GiB of a GPU, and the model for it and larger ones."""
_COLDSTART_PASSES, _COLDSTART_LEAST = 4, 10
"""Passes over the demonstrations, and least steps."""

_PASSAGES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What differs between the configs that are written; paths and names are written as they are here."""

    file: str
    machine: str
    run: str
    model: str
    corpus: str
    train: str
    eval: str
    small: bool
    """For a model of some hundred million weights on a CPU."""
    questions_per_step: int
    questions: int | None = None
    """Training questions, where they can be counted."""
    lora: bool = False
    batch_size: int = 64
    max_tokens: int = 1408

    @property
    def coldstart_batch(self) -> int:
        return 8 if self.small else 32

    @property
    def coldstart_steps(self) -> int:
        """Enough for the passes over the demonstrations, one per question: more would learn few answers by heart."""
        most = 60 if self.small else 40
        if self.questions is None:
            return most
        return min(most, max(_COLDSTART_LEAST, math.ceil(_COLDSTART_PASSES * self.questions / self.coldstart_batch)))

    def toml(self) -> str:
        loader = PackageLoader("search_e1.lab", "")
        environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True)  # noqa: S701 - TOML, not HTML
        environment.filters["q"] = lambda text: json.dumps(text, ensure_ascii=False)
        template = environment.get_template("recipe.toml.j2")
        names = (*self.__dataclass_fields__, "coldstart_batch", "coldstart_steps")
        text = template.render({name: getattr(self, name) for name in names})
        return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"

    def config(self) -> Config:
        return Config.model_validate(tomllib.loads(self.toml()))


def default_model(gpu: Gpu | None) -> str:
    return next(name for gib, name in _MODELS if gpu.memory_gib >= gib) if gpu else SMALL_MODEL


def fitted(recipe: Recipe, gpu: Gpu, constants: Constants) -> Recipe:
    """``recipe`` in the largest form that the planner accepts for ``gpu``.

    Raises:
        ConfigError: no form of it fits.
        ModelError: a model that is not here, and whose shape is not known.
    """
    problems: tuple[str, ...] = ()
    for form in _forms(recipe):
        problems = make_plan(form.config(), gpu, 1, constants).problems
        if not problems:
            return form
    raise ConfigError(f"{recipe.model} does not fit {gpu.name}: {problems[0]}")


def unmeasured(recipe: Recipe) -> Recipe:
    """``recipe`` for a model whose shape is not known: adapters."""
    return replace(recipe, lora=True, max_tokens=4096)


def _forms(recipe: Recipe) -> Iterator[Recipe]:
    """All weights before adapters, long trajectories before short ones, many side by side before few."""
    for lora, max_tokens, batch_size in ((False, 4096, 256), (True, 4096, 256), (True, 4096, 64), (True, 2560, 16)):
        yield replace(recipe, lora=lora, max_tokens=max_tokens, batch_size=batch_size)


def is_made(corpus: Path) -> bool:
    """Whether ``corpus`` is passages already, not a folder of documents, which may hold tables too.

    Raises:
        ConfigError: a file that is neither.
    """
    if corpus.is_file():
        if corpus.name.lower().endswith((*_PASSAGES, ".tsv", ".tsv.gz", ".csv", ".csv.gz", ".json")):
            return True
        raise ConfigError(f"{corpus}: a single document; give the folder that holds it, or a file of passages")
    files = [file.name.lower() for file in corpus.iterdir() if not file.name.startswith(".")]
    return INGESTED in files or (bool(files) and all(name.endswith(_PASSAGES) for name in files))
