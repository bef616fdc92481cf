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

if TYPE_CHECKING:  # saves an agent half a second of import time
    from peft import PeftModel

logger = logging.getLogger(__name__)
_MAMBA = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
"""Model types whose output projections cannot have a PEFT adapter: their kernels read the weight directly."""


@dataclass(slots=True)
class Policy:
    """Weights, tokenizer and prompts that belong together."""

    model: PreTrainedModel
    tokenizer: Any
    prompts: Prompts
    dtype: torch.dtype = torch.float32
    """The compute dtype; master weights are float32 regardless."""

    def save(self, directory: Path) -> None:
        """Write a Hugging Face directory that ``load`` can read."""
        with no_bars():
            self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        self.prompts.save(directory)


@dataclass(frozen=True, slots=True)
class Reader:
    """A policy without its weights: what it takes to encode and decode text."""

    tokenizer: Any
    prompts: Prompts
    context_length: int


def load(model: str | Path, config: PolicyConfig, prompts: Prompts | None = None, *, master_weights: bool = False) -> Policy:
    """Load weights (safetensors only), tokenizer and prompts of ``model``; ``config.model`` is ignored.

    ``master_weights``: load in float32, for training; otherwise in the dtype of ``config.dtype``.

    Raises:
        ModelError: there is no such policy, or it does not load.
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
    """Load a policy without its weights.

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
    """Today, with one warning per model: the date in the prompts of a policy outside a run."""
    if model not in _warned:
        _warned.add(model)
        logger.warning("%s: its chat template contains the date; using today's, or set prompts.date", model)
    return date.today()


_warned: set[str] = set()


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
"""The latest GGUF file's config and tokenizer: transformers takes 10 s to build the tokenizer."""


def context_length(config: PreTrainedConfig) -> int:
    """The context length of a model in tokens; ``sys.maxsize`` if its architecture has no limit (Mamba, Bloom)."""
    text = config.get_text_config()
    # Most configs alias their own key (``n_positions``, ...) to the first; MPT and old Bloom configs do not.
    found = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len", "seq_length"))
    return next((length for length in found if length and length > 0), sys.maxsize)


def accelerators(config: PolicyConfig, processes: int = 1) -> int:
    """Accelerators that a stage uses: one per process, 0 on a CPU."""
    return 0 if device(config.device).type == "cpu" else processes


def with_adapter(model: PreTrainedModel, lora: LoraConfig) -> "PeftModel":
    """``model`` with trainable LoRA adapters and frozen base weights."""
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
    """The plain model with merged adapters; all weights require gradients again."""
    merged = model.merge_and_unload()
    merged.requires_grad_(True)  # PEFT leaves it off, and the next GRPO round would train nothing
    return merged
