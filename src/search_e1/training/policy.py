"""A policy on disk and in memory: a plain Hugging Face directory plus the prompts it works under."""

import logging
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from search_e1.config import LoraConfig, PolicyConfig, Prompts
from search_e1.errors import ModelError
from search_e1.runs import day
from search_e1.runs.devices import device, no_bars
from search_e1.text.prompts import check_template, tells_date
from search_e1.training.loading import check_quantization, check_tokenizer, load_weights
from search_e1.training.precision import compute_dtype, limit_kernel_caches, multiplies_bfloat16
from search_e1.training.sources import Source, opened, problem_of

if TYPE_CHECKING:  # half a second that an agent in use does not need
    from peft import PeftModel

logger = logging.getLogger(__name__)
_MAMBA = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
"""Whose output projections PEFT takes no adapter for: their kernels read the weight itself."""


@dataclass(slots=True)
class Policy:
    """Weights, tokenizer and prompts that belong together."""

    model: PreTrainedModel
    tokenizer: Any
    prompts: Prompts
    dtype: torch.dtype = torch.float32
    """In which it computes; weights that are to be trained may be float32 all the same."""

    def save(self, directory: Path) -> None:
        """Write what ``load`` reads; anything that reads Hugging Face directories reads it too."""
        with no_bars():
            self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        self.prompts.save(directory)


@dataclass(frozen=True, slots=True)
class Reader:
    """What a policy reads with: all of it but the weights."""

    tokenizer: Any
    prompts: Prompts
    context_length: int


def load(model: str | Path, config: PolicyConfig, prompts: Prompts | None = None, *, master_weights: bool = False) -> Policy:
    """Load weights (safetensors only), tokenizer and prompts; ``config.model`` is not looked at, ``model`` is.

    ``master_weights``: in float32, to be trained; otherwise in the type that ``config.dtype`` stands for.

    Raises:
        ModelError: the directory is none, or what is in it does not load.
    """
    reader = load_reader(model, config, prompts)
    with opened(model) as source:
        weights: Any = load_weights(source, config.trust_remote_code)
    place = device(config.device)
    dtype = compute_dtype(config.dtype, weights.num_parameters(), multiplies_bfloat16(place))
    if place.type == "cpu" and dtype != torch.float32:
        limit_kernel_caches()
    weights.to(device=place, dtype=torch.float32 if master_weights else dtype)
    return Policy(weights, reader.tokenizer, reader.prompts, dtype)


def load_reader(model: str | Path, config: PolicyConfig, prompts: Prompts | None = None) -> Reader:
    """Load all of a policy but its weights.

    Raises:
        ModelError: as ``load``.
    """
    trust_remote_code = config.trust_remote_code
    with opened(model) as source:
        settings, tokenizer = _read(source, trust_remote_code)
        check_quantization(source.model, settings)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        check_tokenizer(source.model, tokenizer, settings)
        limit = context_length(settings)
        if prompts is None:
            prompts = next((Prompts.of_policy(place) for place in source.prompts if Prompts.saved_in(place)), Prompts())
        if prompts.date is None and tells_date(tokenizer):
            prompts = prompts.model_copy(update={"date": day.pinned() or _today(str(model))})
        check_template(tokenizer, prompts)
    return Reader(tokenizer, prompts, limit)


def _today(model: str) -> date:
    """The day for the prompts of a policy that is in no run."""
    if model not in _told:
        _told.add(model)
        logger.warning("%s: its chat template tells the date, today's here; prompts.date sets another", model)
    return date.today()


_told: set[str] = set()


def _read(source: Source, trust_remote_code: bool) -> tuple[PreTrainedConfig, Any]:
    key = source.gguf and (source.gguf, source.gguf.stat().st_mtime_ns)
    if key and key in _gguf:
        return _gguf[key]
    settings = AutoConfig.from_pretrained(source.weights, trust_remote_code=trust_remote_code, **source.options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.tokenizer, trust_remote_code=trust_remote_code, **source.tokenizer_options
        )
    except Exception as error:  # see ``opened``
        files = "tokenizer.json, tokenizer_config.json"
        problem = problem_of(error, source.tokenizer)
        raise ModelError(f"policy.model = {source.model!r}: its tokenizer ({files}) does not load: {problem}") from None
    if key:
        _gguf.clear()
        _gguf[key] = settings, tokenizer
    return settings, tokenizer


_gguf: dict[object, tuple[PreTrainedConfig, Any]] = {}
"""What was read last of a GGUF file: transformers takes 10 s to make a tokenizer of one."""


def context_length(config: PreTrainedConfig) -> int:
    """Most ids that a model of ``config`` takes: ``sys.maxsize`` where its architecture has no limit (Mamba, Bloom)."""
    text = config.get_text_config()
    # The first is an alias of most others (``n_positions``, ...); MPT and old configurations of Bloom have their own.
    found = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len", "seq_length"))
    return next((length for length in found if length and length > 0), sys.maxsize)


def accelerators(config: PolicyConfig, processes: int = 1) -> int:
    """Devices beside the CPU that a stage holds: one a process, if the policy lives on one."""
    return 0 if device(config.device).type == "cpu" else processes


def with_adapter(model: PreTrainedModel, lora: LoraConfig) -> "PeftModel":
    """``model`` with trainable adapters; its own weights are frozen."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    adapter = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        exclude_modules=["out_proj"] if model.config.model_type in _MAMBA else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapter)


def merge_adapter(model: "PeftModel") -> PreTrainedModel:
    """The plain model with the adapters merged into its weights, all of them trainable again."""
    merged = model.merge_and_unload()
    merged.requires_grad_(True)  # peft leaves it off, and the next GRPO round would train nothing
    return merged
