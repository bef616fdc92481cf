"""The configuration: one frozen section per stage, from TOML and dotted flags; unknown keys are refused.

What the engines know how to configure is not declared again: ``[grpo.trainer]`` goes to ``trl.GRPOConfig`` and
``[distill.trainer]``, ``[warmstart.trainer]`` to ``transformers.TrainingArguments`` as they are.
"""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from search_e1.errors import ConfigError
from search_e1.prompts import Prompts

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PolicyConfig(Section):
    model: str
    """Directory of a Hugging Face causal language model, a Hub id, or `small`: the policy that comes with the package."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights while they are sampled from and trained."""
    device: str = "auto"
    """`auto` (an accelerator if there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    trust_remote_code: bool = False
    """Run Python code that the model directory or the Hub brings along."""


class DataConfig(Section):
    corpus: Path | None = None
    """Passages, JSON lines (plain or .gz) with `id` and `contents`. Needed unless `retrieval.index` or `.url` is given."""
    train: tuple[Path, ...] = Field(min_length=1)
    """Question files, JSON lines (plain or .gz) with `id`, `question`, `golden_answers`, perhaps `metadata`."""
    eval: dict[str, Path] = Field(min_length=1)
    """Benchmark name -> question file."""
    max_train: Positive | None = None
    """Use a random subset of this many training questions (the same for a seed)."""
    max_eval: Positive | None = None
    """Use a random subset of this many questions of each benchmark."""


class RetrievalConfig(Section):
    index: Path | None = None
    """Directory of an index made by `search-e1 index build`. Without it one is built of `data.corpus` in the run directory."""
    url: str | None = None
    """A server that speaks Search-R1's `/retrieve`, e.g. `http://127.0.0.1:8000`. Used instead of an index."""
    timeout: Annotated[float, Field(gt=0)] = 30.0
    """Seconds for one request to `url`."""
    attempts: Positive = 4
    """Tries of one request to `url` before the stage stops."""

    @model_validator(mode="after")
    def _one_source(self) -> "RetrievalConfig":
        if self.index and self.url:
            raise ValueError("give index or url, not both")
        return self


class RolloutConfig(Section):
    """The Search-R1 protocol's limits. They hold in training and in evaluation."""

    max_searches: NonNegative = 4
    """Turns that are answered; then follows one last generation in which a search is no longer served."""
    topk: Positive = 3
    """Passages for a query."""
    max_action_tokens: Positive = 500
    """Most tokens of one generation."""
    max_observation_tokens: Positive = 500
    """Most tokens of one observation; passages are cut, the closing tag never."""
    max_tokens: Positive = 4096
    """Most tokens of prompt and response together; a policy with a shorter context lowers it."""
    batch_size: Positive = 64
    """Trajectories that are sampled together."""


class LoraConfig(Section):
    """Low-rank adapters on all linear layers but the head."""

    rank: Positive = 16
    alpha: Positive = 32
    dropout: Share = 0.0


class GrpoConfig(Section):
    steps: NonNegative = 200
    """Optimiser steps a round. 0 leaves GRPO out."""
    questions_per_step: Positive = 64
    group_size: Annotated[int, Field(ge=2)] = 5
    """Trajectories sampled for a question."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    temperature: Annotated[float, Field(gt=0)] = 1.0
    lora: LoraConfig | None = None
    """Train adapters and merge them at the end of the stage; without it all weights are trained."""
    trainer: dict[str, Any] = {}
    """Further arguments of `trl.GRPOConfig` (`beta`, `epsilon`, `per_device_train_batch_size`, ...)."""


class PoolConfig(Section):
    """Trajectories that pairs are mined from, sampled from the policy after GRPO."""

    questions: Positive | None = None
    """Sample for this many training questions (all, if not given)."""
    group_size: Annotated[int, Field(ge=2)] = 8
    temperature: Annotated[float, Field(gt=0)] = 1.0


class PairsConfig(Section):
    students: Positive = 1
    """Most pairs of one question; they share the reference."""


class LeadConfig(Section):
    """How much better the policy is when it sees the reference: measured before every distillation, and its gate."""

    pairs: Positive = 64
    """Pairs that are held out from distillation and measured on."""
    max_share: Share = 0.25
    """At most this share of all pairs is held out."""
    samples: Positive = 2
    """Trajectories sampled for each pair, each prompt and each kind of start."""
    minimum: float = 0.02
    """Lead in EM (privileged minus plain, from the question on) below which distillation is refused."""
    enforce: bool = True
    """Refuse to distil without a lead. Turned off, the lead is measured and reported only."""


class DistillConfig(Section):
    epochs: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    batch_size: Positive = 16
    """Pairs an optimiser step."""
    lora: LoraConfig = LoraConfig()
    tau: Annotated[float, Field(gt=0)] | None = 10.0
    """Clip of the pointwise divergence. `null`-like: leave it out with `--distill.clip none`."""
    clip: Literal["entry", "token", "none"] = "entry"
    """Clip each vocabulary entry's term before the sum (as published), each token's sum, or nothing."""
    teacher_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Below 1 sharpens the teacher."""
    chunk_size: Positive = 256
    """Positions whose logits are in memory together."""
    trainer: dict[str, Any] = {}
    """Further arguments of `transformers.TrainingArguments`."""


class EvaluationConfig(Section):
    samples: NonNegative = 1
    """Trajectories sampled for each question, beside the greedy one, for `em_sampled`. 0 leaves them out."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the sampled trajectories."""


class Config(Section):
    """Everything a run depends on."""

    run: Path
    """Directory of the run."""
    seed: NonNegative = 0
    rounds: Positive = 2
    """Rounds of GRPO and OFSD."""
    policy: PolicyConfig
    prompts: Prompts | None = None
    """Templates. Without them the policy's own (`search_e1.json` in its directory), else Search-R1's."""
    data: DataConfig
    retrieval: RetrievalConfig = RetrievalConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GrpoConfig = GrpoConfig()
    pool: PoolConfig = PoolConfig()
    pairs: PairsConfig = PairsConfig()
    lead: LeadConfig = LeadConfig()
    distill: DistillConfig = DistillConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _has_passages(self) -> "Config":
        if not (self.data.corpus or self.retrieval.index or self.retrieval.url):
            raise ValueError("no passages: give data.corpus, retrieval.index or retrieval.url")
        return self


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the TOML file ``path``, with dotted flags laid over it.

    ``overrides`` is what stands on a command line: ``["--grpo.steps", "8", "--data.eval.nq=nq.jsonl"]``. Values are read
    as TOML where they are TOML, and as text otherwise. Relative paths in the file are relative to the working directory.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, missing or has an impossible value; names it.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; give the path of a TOML file with --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    for key, value in parse_overrides(overrides):
        _set(raw, key, value)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first_problem(error)}") from error


def parse_overrides(flags: Sequence[str]) -> list[tuple[list[str], Any]]:
    """``["--a.b", "1", "--c=x"]`` -> ``[(["a", "b"], 1), (["c"], "x")]``.

    Raises:
        ConfigError: a word that is no flag, or a flag without a value.
    """
    pairs: list[tuple[list[str], Any]] = []
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
        pairs.append((name.split("."), _toml_value(value)))
    return pairs


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(tree: dict[str, Any], key: list[str], value: Any) -> None:
    for i, part in enumerate(key[:-1]):
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--{'.'.join(key)}: {'.'.join(key[: i + 1])} is a value, not a section")
    tree[key[-1]] = value


def _first_problem(error: ValidationError) -> str:
    """The first error in one line: the key, what was found, how to mend it."""
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
    return f"{key} = {problem['input']!r}: {message}{more}" if key else f"{message}{more}"


def _keys_at(path: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Config
    for part in path:
        types = [section.model_fields[part].annotation, *getattr(section.model_fields[part].annotation, "__args__", ())]
        section = next(t for t in types if isinstance(t, type) and issubclass(t, BaseModel))
    return list(section.model_fields)
