"""A key-value cache for rows of different lengths that join, wait, continue and leave."""

from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any
from weakref import ref

import numpy as np
import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from search_e1.training.policy import context_length

_CAPACITY_STEP = 64
"""Capacity grows in steps of this many positions."""
_LAYERS = {"full_attention", "sliding_attention", "conv"}


class RaggedCache(Cache):
    """One slot per row; the state of a token is stored at its position in the slot, without padding.

    Attention layers store keys and values as [slots, capacity, heads, width], short convolutions their last inputs as
    [slots, channels, kernel]. A forward pass runs the rows of some slots, each with new tokens at its own positions, padded on
    the right. Padding is written after a row's end, where the mask hides it until it is overwritten. Contiguous slots are read
    in place, others are gathered.
    """

    padded = True
    """Whether the new tokens of all rows are padded to the longest."""
    border = 0
    """Position from which attention takes another path; a trial of the cache on a model should cross it."""

    def __init__(self, model: PreTrainedModel, slots: int, capacity: int = 0) -> None:
        """``capacity``: initial positions per slot; grows on demand."""
        super().__init__(layers=[])
        self._weak_model = ref(model)  # a cache kept for an engine's next session must not keep the model alive
        config = model.config.get_text_config(decoder=True)
        types, kwargs = get_layer_types_and_kwargs(config)
        if not set(types) <= _LAYERS or config._attn_implementation not in ("sdpa", "eager"):
            raise NotImplementedError(f"layers {sorted(set(types))} with {config._attn_implementation} attention")
        self._types, self._layer_kwargs = types, kwargs
        self._windows = {k["sliding_window"] for k, t in zip(kwargs, types, strict=True) if t == "sliding_attention"}
        self._additive = config._attn_implementation == "eager"
        self._longest = context_length(config)
        self.slots = slots
        self.capacity = self._rounded(capacity)
        self.moved = 0
        """How often keys and values were reallocated."""
        self._attention: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._convolution: dict[int, torch.Tensor] = {}
        self._rows = self._positions = self._counts = torch.empty(0)
        self._at: slice | torch.Tensor = slice(0)
        self._read: slice | torch.Tensor = slice(0)
        self._extent = 0

    def forward(self, slots: Sequence[int], num_cached: Sequence[int], ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits [rows, vocabulary] after the last of the (padded) ``ids`` of the rows in ``slots``.

        ``num_cached``: how many tokens of each row are already in the cache.
        """
        pending_ids = self._tensor(list(zip_longest(*ids, fillvalue=0))).T
        width = pending_ids.shape[1]
        self._positions = self._tensor(num_cached)[:, None] + torch.arange(width, device=pending_ids.device)
        self._extent = max(num_cached) + width
        self._rows = self._tensor(slots)[:, None]
        contiguous = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        self._at = self._read = slice(slots[0], slots[0] + len(slots)) if contiguous else self._rows[:, 0]
        self._counts = self._tensor(list(map(len, ids)))
        self.reserve(self._extent)
        return self._logits(pending_ids, self._masks())[:, -1]

    def step(self, ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, extent: int) -> torch.Tensor:
        """Logits [rows, vocabulary] after one token per row; all varying inputs are on the device, as a CUDA graph needs.

        Row i reads slot i and writes to ``slots[i]``: its own slot, or one that is never read. ``extent``: how many positions
        attention reads, at most ``capacity``.
        """
        self._place(positions, slots, extent)
        return self._logits(ids[:, None], self._masks())[:, -1]

    def _place(self, positions: torch.Tensor, slots: torch.Tensor, extent: int) -> None:
        self._positions, self._rows, self._extent = positions[:, None], slots[:, None], extent
        self._at, self._counts = slots, torch.ones_like(positions)
        self._read = slice(len(slots))  # in place; the output of a row that writes elsewhere is ignored

    def _logits(self, ids: torch.Tensor, masks: Any, keep: int | torch.Tensor = 1) -> torch.Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=masks,
            position_ids=self._positions.clamp(max=self._longest - 1),  # padding may exceed the context
            past_key_values=self,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = output.logits
        return logits

    @property
    def _model(self) -> PreTrainedModel:
        model = self._weak_model()
        assert model is not None, "whoever samples holds it"
        return model

    def move(self, to: Sequence[int], of: Sequence[int], length: int) -> None:
        """Copy the first ``length`` positions of slots ``of`` to slots ``to``."""
        target, source = self._tensor(to), self._tensor(of)
        for stored in chain.from_iterable(self._attention.values()):
            rows = stored.flatten(1)[:, : length * stored[0, 0].numel()]  # one contiguous range per slot copies faster
            rows.index_copy_(0, target, rows.index_select(0, source))
        for state in self._convolution.values():
            state.index_copy_(0, target, state.index_select(0, source))

    def clear(self, slots: Sequence[int]) -> None:
        """Reset slots for new rows. Keys and values need no reset: the mask hides them."""
        for state in self._convolution.values():
            state[slots] = 0

    @property
    def convolves(self) -> bool:
        """Whether layers have convolution states, which a token changes irreversibly; keys and values are overwritten later."""
        return "conv" in self._types

    def states(self) -> dict[int, torch.Tensor]:
        """A copy of the convolution states, for ``restore``."""
        return {layer: state.clone() for layer, state in self._convolution.items()}

    def restore(self, states: dict[int, torch.Tensor]) -> None:
        """Restore the convolution states; keys and values need no restoring."""
        for layer, state in states.items():
            self._convolution[layer].copy_(state)

    @property
    def bytes(self) -> int:
        """Total memory of the cache."""
        return sum(stored.nbytes for stored in (*chain.from_iterable(self._attention.values()), *self._convolution.values()))

    def bytes_per_position(self) -> int:
        """Memory of one position's keys and values; 0 before the first forward pass."""
        return sum(
            2 * keys.element_size() * keys.shape[2] * max(keys.shape[3], values.shape[3])
            for keys, values in self._attention.values()
        )

    def _tensor(self, numbers: Sequence[Any]) -> torch.Tensor:
        return torch.from_numpy(np.array(numbers)).to(self._model.device)  # torch reads lists five times slower

    def _masks(self) -> Any:
        """Masks in the form that transformers' models accept: one for all layers, or one per layer type."""
        positions = torch.arange(self._extent, device=self._positions.device)
        seen = positions <= self._positions[:, None, :, None]  # [rows, 1, width, extent]
        masks: dict[str, torch.Tensor | None] = {"full_attention": seen, "conv": None}
        for window in self._windows:
            masks["sliding_attention"] = seen & (positions > self._positions[:, None, :, None] - window)
        if self._additive:
            masks = {name: self._as_addend(mask) for name, mask in masks.items()}
        needed = set(self._types)
        return masks[needed.pop()] if len(needed) == 1 else {name: masks[name] for name in needed}

    def _as_addend(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        dtype = self._model.dtype
        return mask if mask is None else torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)

    def reserve(self, length: int) -> None:
        """Grow the slots to at least ``length`` positions."""
        if length <= self.capacity:
            return
        self.capacity = self._rounded(max(length, min(2 * self.capacity, 4096)))
        self.moved += bool(self._attention)
        for layer, (keys, values) in list(self._attention.items()):
            self._attention[layer] = self._grown(keys), self._grown(values)

    def _rounded(self, length: int) -> int:
        return -(-length // _CAPACITY_STEP) * _CAPACITY_STEP

    def _grown(self, old: torch.Tensor) -> torch.Tensor:
        new = old.new_zeros(self.slots, self.capacity, *old.shape[2:])
        new[:, : old.shape[1]] = old
        return new

    # The interface that models call.

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values [rows, heads, new, width]; returns those of all positions so far."""
        if layer_idx not in self._attention:
            self._attention[layer_idx] = self._new_buffer(key_states), self._new_buffer(value_states)
        keys, values = self._attention[layer_idx]
        keys[self._rows, self._positions] = key_states.transpose(1, 2)
        values[self._rows, self._positions] = value_states.transpose(1, 2)
        return self._visible(keys), self._visible(values)

    def _visible(self, stored: torch.Tensor) -> torch.Tensor:
        stored = stored[:, : self._extent]
        at = self._read
        return (stored[at] if isinstance(at, slice) else stored.index_select(0, at)).transpose(1, 2)

    def _new_buffer(self, states: torch.Tensor) -> torch.Tensor:
        _, heads, _, width = states.shape
        return states.new_zeros(self.slots, self.capacity, heads, width)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The rows' last inputs, [rows, channels, kernel], for the model to update in place when one token is added.

        ``None`` if the slots are not contiguous; the model then calls ``update_conv_state``.
        """
        state = self._convolution.get(layer_idx)
        return None if state is None or not isinstance(self._at, slice) else state[self._at]

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Store new inputs [rows, channels, new]; returns them appended to the stored inputs [rows, channels, kernel]."""
        if conv_kernel_size is None or state_idx:
            raise NotImplementedError("an unsupported kind of convolution")
        rows, channels, _width = conv_states.shape
        if layer_idx not in self._convolution:
            self._convolution[layer_idx] = conv_states.new_zeros(self.slots, channels, conv_kernel_size)
        state = self._convolution[layer_idx]
        whole = torch.cat((state[self._at], conv_states), -1)
        last = self._counts[:, None] + torch.arange(conv_kernel_size, device=whole.device)
        state[self._at] = whole.gather(2, last[:, None].expand(rows, channels, -1))
        return whole

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError("a recurrent state")

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self._convolution)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self._extent - self._positions.shape[1])
