"""Memory traces: real modules run on torch's fake tensors, whose bytes are summed while they are alive."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from search_e1.config import LoraConfig
from search_e1.lab.plan.shapes import empty_model
from search_e1.training.policy import with_adapter
from search_e1.training.trained import cast_adapter_inputs

_ATTENTION = "search_e1_traced"


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Any, **kwargs: Any) -> tuple:
    """Fused causal attention without a mask: transformers would allocate one, since it cannot inspect fake tensors."""
    kwargs.pop("softcap", None)  # uses another kernel with the same memory
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


AttentionInterface.register(_ATTENTION, _attention)


class Activations(NamedTuple):
    """Activation bytes of one pass, gradients included."""

    kept: int  # at the end of the forward pass
    peak: int


class TracedModel:
    """A policy on fake tensors, with adapters if ``lora`` is given."""

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, lora: LoraConfig | None, recompute: bool) -> None:
        """``recompute``: gradient checkpointing.

        Raises:
            ModelError: as ``empty_model``.
        """
        base = empty_model(config, dtype, attn_implementation=_ATTENTION)
        self.model: Any = with_adapter(base, lora) if lora else base
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            self.model.to_empty(device="cpu")
            base.tie_weights()
        if recompute:
            self.model.gradient_checkpointing_enable()
            if lora:
                self.model.enable_input_require_grads()
        self.decoder = base.get_decoder()
        self.weights = sum(p.nbytes for p in self.model.parameters())
        self.trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)

    def train(self, rows: int, width: int, *, autocast: bool, streamed: bool) -> Activations:
        """Forward and backward pass of the decoder over ``rows`` sequences of ``width`` tokens.

        ``streamed``: each gradient is freed as soon as it is complete, as under FSDP2; otherwise all gradients of earlier
        passes are present, including the head's.
        """
        self.model.train()
        cast_adapter_inputs(self.model, not autocast)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        with self._mode, _Counter(self.model) as counter:
            hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in trained if streamed]
            for p in trained:
                p.grad = None if streamed else torch.zeros_like(p)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
                hidden = self.decoder(torch.zeros(rows, width, dtype=torch.long), use_cache=False).last_hidden_state
            kept = counter.now
            hidden.backward(torch.ones_like(hidden))
            for p in trained:
                p.grad = None
            for hook in hooks:
                hook.remove()
        return Activations(kept, counter.peak)

    @torch.no_grad()
    def forward(self, rows: int, width: int) -> int:
        """Peak activation bytes of a pass without gradients."""
        self.model.eval()
        cast_adapter_inputs(self.model, True)
        with self._mode, _Counter(self.model) as counter:
            self.decoder(torch.zeros(rows, width, dtype=torch.long), use_cache=False)
        return counter.peak


class _Counter(TorchDispatchMode):
    """Tracks the total bytes of storages that operations create, until they are freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        # Operations also return views of weights, which take no memory of their own.
        self._seen = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None
