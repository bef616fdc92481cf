"""The key-value cache of rows that come, wait, go on and leave, each with its own length."""

from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from search_e1.training.policy import context_length

_ROUND = 64
"""Capacity grows in steps of this many positions."""
_LAYERS = {"full_attention", "sliding_attention", "conv"}


class RaggedCache(Cache):
    """A slot for each row; in it, what a position's token left behind lies at that position, without padding.

    Attention layers keep keys and values as [slots, capacity, heads, width], short convolutions their last inputs as
    [slots, channels, kernel]. A forward pass concerns the rows of some slots, each with new tokens at its own positions,
    padded on the right: what padding leaves lies behind a row's end, where the mask hides it until it is overwritten.
    Slots side by side are read in place, others are gathered.
    """

    def __init__(self, model: PreTrainedModel, slots: int) -> None:
        super().__init__(layers=[])
        self._model = model
        config = model.config.get_text_config(decoder=True)
        types, kwargs = get_layer_types_and_kwargs(config)
        if not set(types) <= _LAYERS or config._attn_implementation not in ("sdpa", "eager"):
            raise NotImplementedError(f"layers {sorted(set(types))} with {config._attn_implementation} attention")
        self._types = types
        self._windows = {k["sliding_window"] for k, t in zip(kwargs, types, strict=True) if t == "sliding_attention"}
        self._additive = config._attn_implementation == "eager"
        self._longest = context_length(config)
        self.slots = slots
        self._capacity = 0
        self._attention: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._convolution: dict[int, torch.Tensor] = {}
        self._rows = self._positions = self._counts = torch.empty(0)
        self._at: slice | torch.Tensor = slice(0)
        self._extent = 0

    def forward(self, slots: Sequence[int], num_cached: Sequence[int], ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits, [rows, vocabulary], after the last of the (padded) ``ids`` of the rows in ``slots``.

        ``num_cached`` tells how many tokens of each row are in the cache already.
        """
        pending_ids = self._tensor(list(zip_longest(*ids, fillvalue=0))).T
        width = pending_ids.shape[1]
        self._positions = self._tensor(num_cached)[:, None] + torch.arange(width, device=pending_ids.device)
        self._extent = max(num_cached) + width
        self._rows = self._tensor(slots)[:, None]
        beside = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        self._at = slice(slots[0], slots[0] + len(slots)) if beside else self._rows[:, 0]
        self._counts = self._tensor(list(map(len, ids)))
        self._reserve(self._extent)
        output = self._model(
            input_ids=pending_ids,
            attention_mask=self._masks(),
            position_ids=self._positions.clamp(max=self._longest - 1),  # padding may reach beyond
            past_key_values=self,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def move(self, to: Sequence[int], of: Sequence[int], length: int) -> None:
        """Copy the first ``length`` positions of slots ``of`` over those of slots ``to``."""
        target, source = self._tensor(to), self._tensor(of)
        for kept in chain.from_iterable(self._attention.values()):
            rows = kept.flatten(1)[:, : length * kept[0, 0].numel()]  # one stretch of each slot: copied faster
            rows.index_copy_(0, target, rows.index_select(0, source))
        for state in self._convolution.values():
            state.index_copy_(0, target, state.index_select(0, source))

    def clear(self, slots: Sequence[int]) -> None:
        """Make slots ready for rows that begin. (Keys and values need nothing: the mask hides them.)"""
        for state in self._convolution.values():
            state[slots] = 0

    def bytes_per_position(self) -> int:
        """Of one row's keys and values, once something was computed."""
        return sum(
            2 * keys.element_size() * keys.shape[2] * max(keys.shape[3], values.shape[3])
            for keys, values in self._attention.values()
        )

    def _tensor(self, numbers: Sequence[Any]) -> torch.Tensor:
        return torch.from_numpy(np.array(numbers)).to(self._model.device)  # torch reads lists five times slower

    def _masks(self) -> Any:
        """As transformers' models take them ready made: one for all layers, or one for each type of layers."""
        places = torch.arange(self._extent, device=self._positions.device)
        seen = places <= self._positions[:, None, :, None]  # [rows, 1, width, extent]
        masks: dict[str, torch.Tensor | None] = {"full_attention": seen, "conv": None}
        for window in self._windows:
            masks["sliding_attention"] = seen & (places > self._positions[:, None, :, None] - window)
        if self._additive:
            masks = {name: self._as_addend(mask) for name, mask in masks.items()}
        needed = set(self._types)
        return masks[needed.pop()] if len(needed) == 1 else {name: masks[name] for name in needed}

    def _as_addend(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        dtype = self._model.dtype
        return mask if mask is None else torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)

    def _reserve(self, length: int) -> None:
        if length <= self._capacity:
            return
        self._capacity = -(-max(length, min(2 * self._capacity, 4096)) // _ROUND) * _ROUND
        for layer, (keys, values) in list(self._attention.items()):
            self._attention[layer] = self._grown(keys), self._grown(values)

    def _grown(self, old: torch.Tensor) -> torch.Tensor:
        new = old.new_zeros(self.slots, self._capacity, *old.shape[2:])
        new[:, : old.shape[1]] = old
        return new

    # What models call.

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [rows, heads, new, width] come in; those of all positions so far go out."""
        if layer_idx not in self._attention:
            self._attention[layer_idx] = self._room(key_states), self._room(value_states)
        keys, values = self._attention[layer_idx]
        keys[self._rows, self._positions] = key_states.transpose(1, 2)
        values[self._rows, self._positions] = value_states.transpose(1, 2)
        return self._whole(keys), self._whole(values)

    def _whole(self, kept: torch.Tensor) -> torch.Tensor:
        kept = kept[:, : self._extent]
        at = self._at
        return (kept[at] if isinstance(at, slice) else kept.index_select(0, at)).transpose(1, 2)

    def _room(self, states: torch.Tensor) -> torch.Tensor:
        _, heads, _, width = states.shape
        return states.new_zeros(self.slots, self._capacity, heads, width)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The rows' last inputs, [rows, channels, kernel], to be written in place when one token is added.

        ``None`` where there are none in one place: the model goes by ``update_conv_state`` then.
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
        """New inputs [rows, channels, new] come in; they go out behind the earlier ones that the kernel reaches."""
        if conv_kernel_size is None or state_idx:
            raise NotImplementedError("a convolution of another kind")
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
