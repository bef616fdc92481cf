"""Splits a causal language model into the decoder, which computes hidden states, and the head, which maps them to logits."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from search_e1.errors import ModelError


class Head(NamedTuple):
    """``logits = cap(scale * (hidden @ weight.T + bias))``, with ``cap(z) = softcap * tanh(z / softcap)``."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None = None
    """[V]"""
    scale: float = 1.0
    """E.g. Cohere's ``logit_scale``."""
    softcap: float | None = None
    """Gemma's ``final_logit_softcapping``."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H], materialized: for small inputs, and to define the fused passes."""
        scaled = nn.functional.linear(hidden, self.weight, self.bias) * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def split_head(model: Any) -> tuple[nn.Module, Head]:
    """The decoder and the output head of a causal language model, with or without adapters.

    Scale and soft cap of the logits are read from the model's config and checked on a few ids.

    Raises:
        ModelError: the head has an adapter, or decoder and head do not reproduce the model's logits.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder, layer = model.get_decoder(), model.get_output_embeddings()
    if type(layer) is not nn.Linear:
        raise ModelError(
            f"the output head is a {type(layer).__module__}.{type(layer).__qualname__}, but only plain linear heads are "
            "supported, as teacher and student share it; take adapters off the head (lm_head), or merge them first"
        )
    with torch.no_grad():
        ids = torch.arange(1, 5, device=model.device)[None] % layer.weight.shape[0]
        training = model.training
        model.eval()
        whole, hidden = model(ids).logits.float(), decoder(input_ids=ids).last_hidden_state
        model.train(training)
        for scale, softcap in _transforms(model.config.get_text_config()):
            head = Head(layer.weight, layer.bias, scale, softcap)
            error = head.logits(hidden).float() - whole
            if not error.norm() > 1e-2 * whole.norm():  # `not >` passes NaN: non-finite weights are reported by the loss
                return decoder, head
    raise ModelError(
        f"a {type(model).__name__} computes its logits in an unsupported way (other than an output head, a scale and a soft "
        "cap); use another model"
    )


def _transforms(config: Any) -> Iterator[tuple[float, float | None]]:
    """Candidate scales with the soft cap, under the config names of transformers' model families; some divide by the scale."""
    softcap = getattr(config, "final_logit_softcapping", None) or None
    factors = [getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier", "output_multiplier")]
    scaling = getattr(config, "logits_scaling", None)
    factors += [scaling, 1 / scaling] if scaling else []
    for scale in dict.fromkeys([factor for factor in factors if factor] or [1.0]):
        yield scale, softcap
