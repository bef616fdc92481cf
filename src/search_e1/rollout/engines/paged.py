"""A ``RaggedCache`` that flash attention reads in place: only each row's actual length, and once per group of heads.

torch's ``varlen_attn`` takes a pool of pages and a table of each row's pages; a slot is a run of consecutive pages. The kernel
needs CUDA, half precision, compute capability 8.0 and a head size that is a multiple of 8 and at most 256. This is not checked
here: the engine tries the cache on the model, and falls back if the kernel refuses.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from search_e1.rollout.engines.ragged import RaggedCache

PAGE = 256
"""Positions per page; the kernel requires a multiple of this."""
_NAME = "search_e1_paged"
_MAX_PROBED_WINDOW = 4096
"""The trial does not cross wider sliding windows, because that would take too much memory."""
_EXTRAS = ("softcap", "s_aux", "position_bias")
"""Arguments of transformers' attention functions that the kernel does not support."""


@dataclass(frozen=True, slots=True)
class _Reach:
    """The positions that the new tokens of a pass attend to."""

    starts: torch.Tensor
    """[rows + 1], int32: cumulative counts of the rows' new tokens."""
    width: int
    """Maximum new tokens of a row."""
    lengths: torch.Tensor
    """[rows], int32: length of each row, new tokens included."""
    pages: torch.Tensor
    """[rows, pages of a slot], int32."""


class PagedCache(RaggedCache):
    """See the module. Rows are packed without padding, unless the model has convolutions, which would leak between rows."""

    def __init__(self, model: PreTrainedModel, slots: int, capacity: int = 0) -> None:
        super().__init__(model, slots, capacity)
        if self._additive:
            raise NotImplementedError("eager attention")
        windows = [k.get("sliding_window") for k in self._layer_kwargs]
        self._window_of = {layer: -1 if window is None else window - 1 for layer, window in enumerate(windows)}
        self.padded = self.convolves
        self.border = min(max([PAGE, *(width for width in self._windows if width <= _MAX_PROBED_WINDOW)]), self._longest - 3)
        self._reach: _Reach | None = None
        self._layer = 0

    def forward(self, slots: Sequence[int], num_cached: Sequence[int], ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """See ``RaggedCache``."""
        widths = list(map(len, ids))
        if self.padded and len(set(widths)) > 1:
            return super().forward(slots, num_cached, ids)
        self.reserve(max(n + width for n, width in zip(num_cached, widths, strict=True)))
        place, cached, counts = self._tensor(slots), self._tensor(num_cached), self._tensor(widths)
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        shape = (len(slots), -1) if self.padded else (1, -1)
        row = torch.repeat_interleave(torch.arange(len(slots), device=counts.device), counts, output_size=sum(widths))
        offset = torch.arange(sum(widths), device=counts.device) - starts[row]
        self._rows, self._positions = place[row].view(shape), (cached[row] + offset).view(shape)
        self._at, self._counts, self._extent = place, counts, self.capacity
        reach = _Reach(starts.int(), max(widths), (cached + counts).int(), self._pages(place))
        pending_ids = self._tensor(list(chain.from_iterable(ids))).view(shape)
        with self._read_by_pages(reach):
            if self.padded:
                return self._logits(pending_ids, self._no_masks())[:, -1]
            return self._logits(pending_ids, self._no_masks(), starts[1:] - 1)[0]

    def step(self, ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, extent: int) -> torch.Tensor:
        """See ``RaggedCache``; attention reads each row's own length, regardless of ``extent``."""
        self._place(positions, slots, extent)
        starts = torch.arange(len(slots) + 1, dtype=torch.int32, device=slots.device)
        with self._read_by_pages(_Reach(starts, 1, (positions + 1).int(), self._pages(slots))):
            return self._logits(ids[:, None], self._no_masks())[:, -1]

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Attention of the layer updated last: queries [rows, heads, new, width] to outputs [rows, new, heads, width].

        ``keys`` and ``values`` are those of all slots.
        """
        from torch.nn.attention.varlen import varlen_attn  # missing in some torch versions: the engine then falls back

        reach = self._reach
        assert reach is not None
        window = self._window_of[self._layer]
        # A single new token attends to everything: without causality, the kernel reads keys and values once per group of heads.
        right = -1 if reach.width == 1 and window < 0 else 0
        rows, heads, new, width = query.shape
        output = varlen_attn(
            query.transpose(1, 2).reshape(rows * new, heads, width),
            keys.view(-1, PAGE, *keys.shape[2:]),
            values.view(-1, PAGE, *values.shape[2:]),
            reach.starts,
            reach.starts,  # of the keys: required, but ignored with a page table
            reach.width,
            self.capacity,
            scale=scale,
            window_size=(window, right),
            enable_gqa=True,
            seqused_k=reach.lengths,
            block_table=reach.pages,
            num_splits=1,  # with more, a row's summation order would depend on the longest row in the batch
        )
        assert isinstance(output, torch.Tensor)
        return output.view(rows, new, heads, -1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``RaggedCache``; returns all slots while pages are read."""
        self._layer = layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _visible(self, stored: torch.Tensor) -> torch.Tensor:
        return super()._visible(stored) if self._reach is None else stored

    def _rounded(self, length: int) -> int:
        return -(-length // PAGE) * PAGE

    def _pages(self, slots: torch.Tensor) -> torch.Tensor:
        each = self.capacity // PAGE
        return (slots[:, None] * each + torch.arange(each, device=slots.device)).int()

    def _no_masks(self) -> Any:
        return None if len(set(self._types)) == 1 else dict.fromkeys(self._types)

    @contextmanager
    def _read_by_pages(self, reach: _Reach) -> Iterator[None]:
        config: Any = self._model.config.get_text_config(decoder=True)
        before, self._reach = config._attn_implementation, reach
        config._attn_implementation = _NAME
        token = _reading.set(self)
        try:
            yield
        finally:
            _reading.reset(token)
            config._attn_implementation, self._reach = before, None


_reading: ContextVar[PagedCache] = ContextVar("_reading")  # not every model passes extra arguments down to its attention


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls."""
    if extras := [name for name in _EXTRAS if kwargs.get(name) is not None]:
        raise NotImplementedError(f"attention with {extras[0]}")
    return _reading.get().attend(query, key, value, scaling), None


AttentionInterface.register(_NAME, _attention)
