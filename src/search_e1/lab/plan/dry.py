"""Passes of a policy without contents: the real modules on tensors that have a shape and no memory.

Every operation of the forward and backward passes is carried out by the libraries that a run uses, so that what is alive
together is counted for any architecture, with adapters, checkpointing or mixed precision, instead of being guessed.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from search_e1.config import LoraConfig
from search_e1.lab.plan.shapes import empty_model
from search_e1.training.policy import with_adapter

_ATTENTION = "search_e1_dry"
_mask: ContextVar[Tensor | None] = ContextVar("mask", default=None)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Fused attention with a mask or without, as it was decided outside: on such tensors transformers cannot look
    whether there is any padding, and would always make one."""
    kwargs.pop("softcap", None)  # no other kernel, and the same memory
    return sdpa_attention_forward(module, query, key, value, _mask.get(), **kwargs)


AttentionInterface.register(_ATTENTION, _attention)


class Training(NamedTuple):
    """Bytes beyond weights and optimiser states, of one micro-batch."""

    kept: int
    """Alive when the forward pass ends: what the backward pass needs, and gradients that were there before."""
    peak: int
    """Most that was alive at once, gradients included."""


class DryModel:
    """A policy to be trained or sampled from, with its adapters."""

    def __init__(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        lora: LoraConfig | None = None,
        *,
        checkpointing: bool = False,
    ) -> None:
        """
        Raises:
            ModelError: see ``empty_model``.
        """
        model = empty_model(config, dtype, attn_implementation=_ATTENTION)
        self.model: Any = with_adapter(model, lora) if lora else model
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            _materialize(self.model)
        if checkpointing:
            self.model.gradient_checkpointing_enable()
            if lora:
                self.model.enable_input_require_grads()

    @property
    def weights(self) -> int:
        """Bytes, adapters included."""
        return sum(_bytes(p) for p in self.model.parameters())

    @property
    def trained(self) -> int:
        """Bytes of the weights that are trained."""
        return sum(_bytes(p) for p in self.model.parameters() if p.requires_grad)

    def train(
        self,
        rows: int,
        width: int,
        *,
        masked: bool,
        packed: bool = False,
        autocast: bool = False,
        accumulated: bool = False,
        streamed: bool = False,
    ) -> Training:
        """Forward and backward pass of the decoder over ``rows`` sequences of ``width`` tokens.

        ``masked``: attention takes a mask, as it does where rows are padded or packed. ``accumulated``: gradients of earlier
        micro-batches are there. ``streamed``: a gradient is given away as soon as it is there, as where gradients are divided
        among ranks. What the output head and the loss take is not in it, but the head's gradient is.
        """
        self.model.train()
        base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        decoder, head = base.get_decoder(), base.get_output_embeddings()
        with self._alive() as alive, self._layout(rows, width, masked, packed) as ids:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            hooks = [p.register_post_accumulate_grad_hook(_give_away) for p in trained] if streamed else []
            early = trained if accumulated else [p for p in head.parameters() if p.requires_grad and not streamed]
            for p in early:
                p.grad = torch.zeros_like(p)
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
            # The loss makes the head's gradient before the backward pass; in the forward pass it is not there yet.
            kept = alive.now - (0 if accumulated else sum(map(_bytes, early)))
            hidden.backward(torch.ones_like(hidden))
            del hidden
            for p in trained:
                p.grad = None
            for hook in hooks:
                hook.remove()
        return Training(kept, alive.peak)

    @torch.no_grad()
    def read(self, rows: int, width: int, *, masked: bool) -> int:
        """Most bytes alive in a pass without gradients."""
        self.model.eval()
        base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        with self._alive() as alive, self._layout(rows, width, masked, False) as ids:
            out = base.get_decoder()(input_ids=ids, use_cache=False)
            del out
        return alive.peak

    @contextmanager
    def _alive(self) -> Iterator["_Alive"]:
        # Views of weights come out of operations too, and are no memory of their own.
        with self._mode, _Alive(self.model) as alive:
            yield alive

    @contextmanager
    def _layout(self, rows: int, width: int, masked: bool, packed: bool) -> Iterator[Tensor]:
        if packed:
            rows, width = 1, rows * width
        token = _mask.set(torch.ones(rows, 1, width, width, dtype=torch.bool) if masked else None)
        try:
            yield torch.zeros(rows, width, dtype=torch.long)
        finally:
            _mask.reset(token)


class _Alive(TorchDispatchMode):
    """Adds up the storages that operations make, until they are given back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._seen = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _materialize(model: nn.Module) -> None:
    """Every tensor of ``model``, from meta to one that operations take for real; what was one tensor stays one."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
                    made[id(tensor)] = (
                        nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                    )
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def _give_away(weight: Tensor) -> None:
    weight.grad = None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
