"""The shape of a policy: its numbers of weights by what they do, read from its config.json alone."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from search_e1.errors import ModelError
from search_e1.runs.devices import no_bars
from search_e1.training import policy as policies
from search_e1.types import Record


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv: int, *, tied: bool = True, vocabulary: int = 151_936
):
    return dict(
        model_type="qwen2", vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=tied,
        max_position_embeddings=32_768,
    )  # fmt: skip


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool = True) -> dict[str, Any]:
    return dict(
        model_type="qwen3", vocab_size=151_936, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8, head_dim=128,
        tie_word_embeddings=tied, max_position_embeddings=40_960,
    )  # fmt: skip


def _llama(hidden: int, intermediate: int, layers: int, heads: int, head_dim: int, *, tied: bool) -> dict[str, Any]:
    return dict(
        model_type="llama", vocab_size=128_256, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8, head_dim=head_dim,
        tie_word_embeddings=tied, max_position_embeddings=131_072,
    )  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {  # of the published checkpoints' config.json
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2),
    "qwen2.5-3b": _qwen2(2048, 11_008, 36, 16, 2),
    "qwen2.5-7b": _qwen2(3584, 18_944, 28, 28, 4, tied=False, vocabulary=152_064),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32, tied=False),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 64, tied=True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 128, tied=True),
    "llama-3.1-8b": _llama(4096, 14_336, 32, 32, 128, tied=False),
}
"""Shapes that need no file. A Hub id whose name begins with one of them has its shape: ``Qwen/Qwen2.5-3B-Instruct``."""


class Shape(Record):
    """How many numbers a policy has, and what each token costs."""

    parameters: int
    """All weights; where the output head is the embedding, that counts once."""
    embedding: int
    head: int
    """Of the output head: vocabulary times width."""
    tied: bool
    active: int
    """Weights that multiply each token outside the head: of experts, those that a token passes."""
    layers: int
    largest_layer: int
    """Weights of the largest decoder layer."""
    hidden_size: int
    vocabulary: int
    context_length: int
    cached: int
    """Numbers that a token leaves in the key-value cache."""
    attention_width: int
    """Query heads times their width, summed over the layers with attention."""


def read_config(model: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of ``model``: a name of ``SHAPES``, a Hub id that begins like one, a model's directory, or the
    path of a ``config.json``. The network is not used.

    Raises:
        ModelError: it is none of these, or its config cannot be read.
    """
    path = Path(model).expanduser()
    if model != policies.SMALL and not path.exists():
        name = model.rsplit("/", 1)[-1].lower()
        # The longest first: qwen2.5-1.5b would else not be told from a shorter name that it begins with.
        for known in sorted(SHAPES, key=len, reverse=True):
            if name == known or name.startswith(f"{known}-"):
                shape = dict(SHAPES[known])
                return AutoConfig.for_model(shape.pop("model_type"), **shape)
        raise ModelError(
            f"policy.model = {model!r}: neither here nor a shape that is known without the network; give the directory of "
            f"the model, its config.json, or one of {', '.join(SHAPES)} with --policy.model"
        )
    if path.is_file():
        return _from_file(path)
    source = policies.resolve(model)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"policy.model = {model!r}: {str(error).strip().splitlines()[0]}") from error


def _from_file(path: Path) -> PreTrainedConfig:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return AutoConfig.for_model(raw.pop("model_type"), **raw)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"policy.model = {str(path)!r}: not the config.json of a model ({error})") from error


def empty_model(config: PreTrainedConfig, dtype: torch.dtype, **options: Any) -> Any:
    """The causal language model of ``config`` on the meta device: modules and sizes, no memory.

    Raises:
        ModelError: transformers knows no such causal language model.
    """
    try:
        with torch.device("meta"), no_bars():
            return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        kind = getattr(config, "model_type", "?")
        raise ModelError(
            f"policy.model: a {kind} is no causal language model here ({str(error).splitlines()[0]})"
        ) from error


def shape_of(config: PreTrainedConfig) -> Shape:
    """Counted on the modules themselves, so that every architecture counts as transformers builds it."""
    model, text = empty_model(config, torch.float32), config.get_text_config()
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    share = text.num_experts_per_tok / experts if experts else 1.0
    active = sum(
        weight.numel() * (share if ".experts." in name else 1)
        for name, weight in model.named_parameters()
        if weight.dim() > 1 and weight is not head and weight is not embedding
    )
    modules = [(name.rsplit(".", 1)[-1], module) for name, module in model.named_modules()]
    kept = [module.out_features for name, module in modules if name in ("k_proj", "v_proj")]
    asking = [module.out_features for name, module in modules if name == "q_proj"]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    fallback = text.num_hidden_layers * head_dim
    return Shape(
        parameters=sum(weight.numel() for weight in model.parameters()),
        embedding=embedding.numel(),
        head=head.numel(),
        tied=head is embedding,
        active=round(active),
        layers=text.num_hidden_layers,
        largest_layer=max(_size(layer) for layer in _layers(model)),
        hidden_size=text.hidden_size,
        vocabulary=len(head),
        context_length=text.max_position_embeddings,
        cached=sum(kept) or 2 * fallback * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        attention_width=sum(asking) or fallback * text.num_attention_heads,
    )


def _layers(model: Any) -> list[nn.Module]:
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda layers: sum(map(_size, layers)), default=[model])


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
