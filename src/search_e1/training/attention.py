"""Attention over packed rows at the cost of the separate rows: torch's variable-length flash attention.

Transformers separates packed rows by a mask over all pairs of positions, which is quadratic in the length of the pack. Here
the kernel gets the row boundaries instead: ``Rows`` holds them, and transformers passes them to the attention function of
each layer under its own argument names.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

logger = logging.getLogger(__name__)

PACKED = "search_e1_packed"
"""Name of this attention in transformers. No mask function is registered under it, so models build no mask."""
_LAYERS = {"full_attention", "sliding_attention"}
_HALVES = (torch.bfloat16, torch.float16)
_CAPABILITY = (8, 0)  # the lowest that flash attention supports
_UNKNOWN = ("softcap", "s_aux", "position_bias")
"""Arguments of attention variants that the kernel does not support."""


def takes_borders(decoder: nn.Module) -> bool:
    """Whether the layers of ``decoder`` use the boundaries of packed rows."""
    return getattr(getattr(decoder, "config", None), "_attn_implementation", None) == PACKED


def borders(cu_seq: Tensor, longest: int) -> dict[str, Any]:
    """The decoder's forward arguments that hold the boundaries of packed rows."""
    return dict(cu_seq_lens_q=cu_seq, cu_seq_lens_k=cu_seq, max_length_q=longest, max_length_k=longest)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: ``query`` is [1, heads, total, width] (packed) or [rows, heads, row
    length, width].

    Raises:
        NotImplementedError: the layer needs more than plain causal attention.
    """
    rows, _, length, _ = query.shape
    unknown = [name for name in _UNKNOWN if others.get(name) is not None]
    unknown += ["dropout"] * (dropout > 0) + ["a custom mask"] * (attention_mask is not None)
    unknown += ["access to later positions"] * (others.get("is_causal") is False or not getattr(module, "is_causal", True))
    if unknown:
        raise NotImplementedError(f"attention with {unknown[0]}")
    if key.shape[2] != length:
        raise NotImplementedError("attention over a cache; TrainedPolicy.sampled lends the model for that")
    if cu_seq_lens_q is None or max_length_q is None:  # right-padded rows all have the same length
        cu_seq_lens_q = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    # Rotary embeddings of float32 weights return float32, and autocast does not cover this kernel.
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    q, k, v = (states.transpose(1, 2).flatten(0, 1).to(dtype) for states in (query, key, value))
    attended = varlen.varlen_attn(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
        scale=scaling, window_size=(sliding_window - 1 if sliding_window else -1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(attended, Tensor)
    return attended.unflatten(0, (rows, length)), None


AttentionInterface.register(PACKED, _attention)


def obstacle(model: Any, dtype: torch.dtype) -> str | None:
    """Why ``model``, computing in ``dtype``, cannot use packed attention; ``None`` if ``batch.pack`` has to try it."""
    if dtype not in _HALVES:
        return f"it computes in {str(dtype).removeprefix('torch.')}"
    if model.device.type != "cuda":
        return f"there is no such kernel for {model.device.type}"
    if torch.cuda.get_device_capability(model.device) < _CAPABILITY:
        return "the GPU is too old for flash attention"
    return None


def attend_by_borders(model: PreTrainedModel) -> int:
    """Switch the layers of ``model`` to packed attention; returns the width of its widest sliding window, or 0.

    Raises:
        NotImplementedError: layers of another kind, or with an attention that cannot be replaced.
    """
    types, options = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    if others := set(types) - _LAYERS:
        raise NotImplementedError(f"layers of kind {min(others)}")
    if not model._can_set_attn_implementation():
        raise NotImplementedError("a custom attention")
    model.set_attn_implementation(PACKED)
    return max(option.get("sliding_window") or 0 for option in options)


def implementations(config: PreTrainedConfig) -> dict[str, Any]:
    """The attention of a model and of each of its sub-models, in the format of ``set_attn_implementation``."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    return {"": config._attn_implementation} | {name: implementations(part) for name, part in parts.items() if part}


def attend(model: PreTrainedModel, implementation: dict[str, Any]) -> None:
    """Switch ``model`` to another attention of transformers."""
    if implementations(model.config) != implementation:  # transformers may warn about sub-models even if nothing changes
        model.set_attn_implementation(implementation)


@contextmanager
def attending(model: PreTrainedModel, implementation: dict[str, Any]) -> Iterator[None]:
    """``attend`` within the context only."""
    before = implementations(model.config)
    try:
        attend(model, implementation)
        yield
    finally:
        attend(model, before)
