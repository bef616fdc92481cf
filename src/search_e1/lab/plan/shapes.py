"""The shape of a policy, read from its config.json and counted on transformers' modules, without network access."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from search_e1.config import NEW
from search_e1.errors import ModelError
from search_e1.lab.plan.constants import load_constants
from search_e1.runs.devices import no_bars
from search_e1.training.policy import context_length
from search_e1.training.sources import SMALL, base_of, is_gguf, opened
from search_e1.types import Record

_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "tie_word_embeddings", "vocab_size", "max_position_embeddings",
)  # fmt: skip
SHAPES = {name: dict(zip(_KEYS, row, strict=True)) for name, row in load_constants().models.items()}
"""Name in ``constants.toml`` -> arguments of ``AutoConfig.for_model``."""


class Shape(Record):
    """Numbers of weights by role, and sizes per token."""

    parameters: int  # tied embeddings once
    head: int
    embeddings: int  # embedding and head; once if they are tied
    active: int  # weights that multiply a token outside the head; only the experts that a token is routed to
    layers: int
    largest_layer: int
    hidden_size: int
    vocabulary: int
    context_length: int
    cached: int  # values per token in the key-value cache
    attention_width: int  # query heads times head size, summed over layers


def read_config(model: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of ``model``: a name in ``constants.toml`` or a Hub id that starts with one, a directory, a GGUF file,
    an adapter's base, or a config.json.

    Raises:
        ModelError: it is none of these, or cannot be read.
    """
    path = Path(model).expanduser()
    if model == NEW:
        raise ModelError(f"policy.model = {NEW!r}: the cold start creates it, so it has no shape yet; plan an existing model")
    try:
        if path.is_file() and not is_gguf(path):
            raw = json.loads(path.read_text(encoding="utf-8"))
            return AutoConfig.for_model(raw.pop("model_type"), **raw)
        if model == SMALL or path.exists():
            if base := base_of(model):
                return read_config(base, trust_remote_code=trust_remote_code)
            with opened(model) as source:
                return AutoConfig.from_pretrained(
                    source.weights, trust_remote_code=trust_remote_code, local_files_only=True, **source.options
                )
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"policy.model = {model!r}: not the config.json of a model ({reason})") from None
    name = model.rsplit("/", 1)[-1].lower()
    if known := next((known for known in SHAPES if f"{name}-".startswith(f"{known}-")), None):
        return AutoConfig.for_model(**SHAPES[known])
    raise ModelError(
        f"policy.model = {model!r}: neither on this machine nor a known shape; give the directory of the "
        f"model, its config.json, or one of {', '.join(SHAPES)} with --policy.model"
    )


def empty_model(config: PreTrainedConfig, dtype: torch.dtype, **options: Any) -> Any:
    """The causal language model of ``config`` on the meta device; raises ModelError if transformers cannot build one."""
    try:
        with torch.device("meta"), no_bars():
            return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"policy.model: a {config.model_type} is not a supported causal language model ({reason})") from None


def shape_of(config: PreTrainedConfig) -> Shape:
    """The shape of ``config``, counted on modules, so that it matches every architecture as transformers builds it."""
    model, text = empty_model(config, torch.float32), config.get_text_config()
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    share = text.num_experts_per_tok / experts if experts else 1.0
    matrices = [(name, w) for name, w in model.named_parameters() if w.dim() > 1 and w is not head and w is not embedding]
    layers = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=_size)
    outputs = {name: getattr(module, "out_features", 0) for name, module in model.named_modules()}
    query, cached = (
        sum(n for name, n in outputs.items() if name.rpartition(".")[2] in kinds)
        for kinds in (("q_proj",), ("k_proj", "v_proj"))
    )
    groups, width = getattr(text, "num_key_value_heads", None), getattr(text, "head_dim", None)
    if not cached and groups and text.num_attention_heads:  # queries, keys and values in one projection
        cached = 2 * len(layers) * groups * (width or text.hidden_size // text.num_attention_heads)
    return Shape(
        parameters=_size(model), head=head.numel(), embeddings=sum(w.numel() for w in {head, embedding}),
        active=round(sum(w.numel() * (share if ".experts." in name else 1) for name, w in matrices)),
        layers=len(layers), largest_layer=max(map(_size, layers)), hidden_size=text.hidden_size, vocabulary=len(head),
        context_length=context_length(config), attention_width=query or len(layers) * text.hidden_size,
        cached=cached or 2 * len(layers) * text.hidden_size,
    )  # fmt: skip


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
