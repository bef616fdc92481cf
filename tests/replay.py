"""What CUDA graphs and flash attention do, on a CPU: a recorder that repeats operations on the memory that they had, and
torch's ``varlen_attn`` with the conditions that its CUDA source checks."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from search_e1.rollout.engines.graphs import NoHostReads, Step


class Tape:
    """A ``Recorder``. Replaying repeats each operation on the tensors of the recording, Python not included: what was a number
    in Python stays what it was, and what moved to other memory is read and written where it lay."""

    bytes = 0

    def __init__(self) -> None:
        self.captures, self.replays = 0, 0

    def capture(self, step: Step) -> tuple[Callable[[], object], torch.Tensor]:
        """See ``Recorder``."""
        self.captures += 1
        step()
        with _Recording() as recording:
            result = step()

        def replay() -> None:
            self.replays += 1
            recording.repeat()

        return replay, result


class _Recording(NoHostReads):
    def __init__(self) -> None:
        super().__init__("cpu")
        self._done: list[tuple[Any, Any, Any, list[tuple[int, torch.Tensor]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        given = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        leaves = enumerate(tree_leaves(result))
        made = [(i, leaf) for i, leaf in leaves if isinstance(leaf, torch.Tensor) and _memory(leaf) not in given]
        if made or func._schema.is_mutable:  # a view has nothing to repeat
            self._done.append((func, args, kwargs or {}, made))
        return result

    def repeat(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, made in self._done:
                again = func(*args, **kwargs)
                leaves = [again] if isinstance(again, torch.Tensor) else tree_leaves(again)
                for i, old in made:
                    old.copy_(leaves[i])


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """torch's, over pages. Without what the engine never asks of it."""
    assert seqused_k is not None
    assert block_table is not None
    assert cu_seq_k is not None
    assert (num_splits, enable_gqa) == (1, True)
    rows, heads, width = len(seqused_k), query.shape[1], query.shape[2]
    for numbers, shape in (
        (cu_seq_q, (rows + 1,)), (cu_seq_k, (rows + 1,)), (seqused_k, (rows,)), (block_table, (rows, block_table.shape[1]))
    ):  # fmt: skip
        assert (numbers.dtype, numbers.shape, numbers.is_contiguous()) == (torch.int32, shape, True)
    assert (key.shape, key.shape[3], key.shape[1] % 256) == (value.shape, width, 0)
    assert (width % 8, width <= 256, heads % key.shape[2]) == (0, True, 0)
    assert query.dtype == key.dtype == value.dtype
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert max_k <= block_table.shape[1] * key.shape[1]
    token = torch.arange(len(query))
    row = torch.searchsorted(cu_seq_q[1:].contiguous(), token.int(), right=True)
    position = seqused_k[row] - (cu_seq_q[row + 1] - token)
    places = torch.arange(block_table.shape[1] * key.shape[1])
    seen = places < seqused_k[row][:, None]
    left, right = window_size
    if right >= 0:
        seen = seen & (places <= position[:, None] + right)
    if left >= 0:
        seen = seen & (places >= position[:, None] - left)
    keys, values = (
        pool[block_table.long()].flatten(1, 2)[row].repeat_interleave(heads // pool.shape[2], 2).transpose(1, 2)
        for pool in (key, value)
    )
    mask = seen[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(query[:, :, None], keys, values, mask, scale=scale)[:, :, 0]
