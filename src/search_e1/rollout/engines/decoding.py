"""Decoding on a GPU: several tokens per row between host synchronizations, with one CUDA graph replay per token.

A step reads its inputs (ids, positions, tokens left) from device memory, runs the model, draws ids, and writes them where the
next step reads them. Graphs are recorded per number of rows (rounded up by ``_buckets``), attention extent and drawing mode; a
graph is never replayed for more rows or longer rows than it was recorded for. Graphs reference the weights by address, so they
sample from weights that are updated in place.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from search_e1.rollout.engines.graphs import CaptureError, Recorder
from search_e1.rollout.engines.paged import PagedCache
from search_e1.rollout.engines.ragged import RaggedCache
from search_e1.rollout.engines.sampling import Ends, Mode, draw_on_device

STEPS = 8
"""Tokens per row between host synchronizations."""
_EXTENT_STEP = 512
"""The attention extent is a multiple of this, if attention reads all rows equally far."""
_NUM_STATES = 4
"""Inputs per row besides its random numbers: id, position, tokens left, temperature."""


class Next(NamedTuple):
    """A row to continue sampling."""

    id: int
    """Its last id, the next model input."""
    position: int
    left: int
    """Maximum ids to sample, at least 1."""
    temperature: float
    numbers: Sequence[float]
    """Random numbers, one per step."""


class _Key(NamedTuple):
    rows: int
    extent: int
    mode: Mode


@dataclass(slots=True)
class _Recorded:
    replay: Callable[[], object]
    logits: torch.Tensor | None
    """Logits of the last replay; ``None`` after they were compared with the plain step's."""


class DecodeLoop:
    """Samples the rows in a cache's first slots.

    The last slot of the cache is reserved: ended rows and rows that pad a bucket write there until the host synchronizes.
    """

    def __init__(self, model: PreTrainedModel, cache: RaggedCache, rows: int, recorder: Recorder) -> None:
        """``rows``: maximum rows sampled together."""
        self.cache, self.rows, self._recorder = cache, rows, recorder
        self._recorded: dict[_Key, _Recorded] = {}
        self._moved = cache.moved
        device = model.device
        zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        self._ids, self._positions, self._left = zeros, zeros.clone(), zeros.clone()
        self._temperatures = torch.ones(rows, device=device)
        self._numbers = torch.zeros(STEPS, rows, dtype=torch.float64, device=device)
        self._sampled = torch.zeros(2, STEPS, rows, dtype=torch.float64, device=device)
        """Ids and log-probabilities."""
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._own = torch.arange(rows, device=device)
        self._pauses = torch.zeros(model.config.get_text_config(decoder=True).vocab_size, dtype=torch.bool, device=device)
        self._pausing: set[int] | None = set()

    @property
    def bytes(self) -> int:
        """Device memory of the cache and the recorded graphs."""
        return self.cache.bytes + self._recorder.bytes

    def open(self, ends: Ends) -> None:
        """Set the ends of rows.

        A row pauses at an id that certainly ends it. If sampling beyond the end cannot be undone, as with convolutions, it
        pauses at every id that may end it, until the host synchronizes.
        """
        self._pausing = ends.candidates if self.cache.convolves else ends.certain
        if self._pausing is None:
            self._pauses.fill_(True)
        else:
            known = sorted(id for id in self._pausing if id is not None and id < len(self._pauses))
            self._pauses.zero_()
            self._pauses[torch.tensor(known, dtype=torch.int64, device=self._pauses.device)] = True

    def run(self, rows: Sequence[Next]) -> list[list[tuple[int, float]]]:
        """Up to ``STEPS`` ids of each row with their log-probabilities, NaN where logits were not finite.

        The caller searches them for the end of the row, and drops the ids after it.

        Raises:
            CaptureError: a step cannot be recorded, or its logits differ from the plain step's; nothing was sampled.
        """
        steps = min(STEPS, max(row.left for row in rows))
        key = self._key(rows, steps)
        recorded = self._recorded.get(key) or self._recorded.setdefault(key, self._record(key))
        self._upload(rows)
        if recorded.logits is None:
            for _ in range(steps):
                recorded.replay()
        else:
            self._compare(recorded, rows, steps)
        ids, logprobs = self._sampled[:, :steps, : len(rows)].transpose(1, 2).tolist()  # the only sync with the device
        return [self._until_pause(row, *pair) for row, *pair in zip(rows, ids, logprobs, strict=True)]

    def _until_pause(self, row: Next, ids: list[float], logprobs: list[float]) -> list[tuple[int, float]]:
        taken: list[tuple[int, float]] = []
        for id, logprob in zip(map(int, ids[: row.left]), logprobs, strict=False):
            taken.append((id, logprob))
            if self._pausing is None or id in self._pausing:
                break
        return taken

    # Recording.

    def _key(self, rows: Sequence[Next], steps: int) -> _Key:
        longest = max(row.position + min(row.left, steps) for row in rows)
        self.cache.reserve(longest)
        if self._moved != self.cache.moved:
            self._recorded, self._moved = {}, self.cache.moved  # they point to memory that the cache no longer uses
        extent = self.cache.capacity
        if not isinstance(self.cache, PagedCache):
            extent = min(extent, -(-longest // _EXTENT_STEP) * _EXTENT_STEP)
        greedy = {row.temperature == 0 for row in rows}
        mode: Mode = "mixed" if len(greedy) == 2 else "greedy" if True in greedy else "sampled"
        return _Key(next(n for n in _buckets(self.rows) if n >= len(rows)), extent, mode)

    def _record(self, key: _Key) -> _Recorded:
        for state in (self._ids, self._positions, self._left, self._at):
            state.zero_()  # a step samples no row while it is recorded
        return _Recorded(*self._recorder.capture(lambda: self._step(key)))

    def _step(self, key: _Key) -> torch.Tensor:
        ids, positions, left = (state[: key.rows] for state in (self._ids, self._positions, self._left))
        active = left > 0
        slots = torch.where(active, self._own[: key.rows], self.cache.slots - 1)
        logits = self.cache.step(ids, positions, slots, key.extent)
        if logits.shape[1] > len(self._pauses):
            raise CaptureError(f"{logits.shape[1]} logits for a vocabulary of {len(self._pauses)}")
        numbers = self._numbers.index_select(0, self._at)[0, : key.rows]
        drawn, logprobs = draw_on_device(logits, self._temperatures[: key.rows], numbers, key.mode)
        self._sampled[:, :, : key.rows].index_copy_(1, self._at, torch.stack((drawn.double(), logprobs.double()))[:, None])
        ids.copy_(torch.where(active, drawn, ids))
        positions.add_(active)
        left.copy_(torch.where(active & ~self._pauses[drawn], left - 1, 0))
        self._at.add_(1)
        return logits

    # Replaying.

    def _upload(self, rows: Sequence[Next]) -> None:
        values = np.zeros((_NUM_STATES + STEPS, self.rows))
        values[3] = 1.0
        for i, row in enumerate(rows):
            values[:, i] = (row.id, row.position, row.left, row.temperature, *row.numbers)
        on_device = torch.from_numpy(values).to(self._ids.device)  # one transfer; integers are exact in float64
        for state, numbers in zip((self._ids, self._positions, self._left, self._temperatures), on_device, strict=False):
            state.copy_(numbers)
        self._numbers.copy_(on_device[_NUM_STATES:])
        self._at.zero_()

    def _compare(self, recorded: _Recorded, rows: Sequence[Next], steps: int) -> None:
        """Replay for the first time; after each step, the logits of active rows must match those of the plain step."""
        assert recorded.logits is not None
        near, begun = tolerance(recorded.logits.dtype), self.cache.states()
        for step in range(steps):
            active = [i for i, left in enumerate(self._left[: len(rows)].tolist()) if left]
            if not active:
                break
            ids = self._sampled[0, step - 1].tolist() if step else [row.id for row in rows]
            places, states = [rows[i].position + step for i in active], self.cache.states()
            expected = RaggedCache.forward(self.cache, active, places, [[int(ids[i])] for i in active]).float()
            self.cache.restore(states)
            recorded.replay()
            differ = (recorded.logits[active].float() - expected).norm(dim=-1)
            differ /= (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
            # The median within the usual tolerance; the maximum of hundreds of rows may be larger.
            if not bool((differ.median() <= near) & (differ.max() <= 5 * near)):
                self.cache.restore(begun)
                raise CaptureError(f"its logits differ from the plain step's{f' at step {step + 1}' if step else ''}")
        recorded.logits = None  # its memory is reused by the next graph


def tolerance(dtype: torch.dtype) -> float:
    """Maximum difference of logits computed in another order, relative to their spread."""
    return 1e-3 if dtype == torch.float32 else 0.05


def weights_of(model: PreTrainedModel) -> tuple[object, ...]:
    """Addresses of weights and settings of adapters: while these are unchanged, a recorded step matches the model."""
    from peft.tuners.lora import LoraLayer  # imported lazily: an agent on a CPU does not need PEFT

    tensors = chain(model.parameters(), model.buffers())
    adapters = (
        (module.disable_adapters, module.merged, tuple(module.active_adapters), tuple(module.scaling.items()))
        for module in model.modules()
        if isinstance(module, LoraLayer)
    )
    return (*((tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in tensors), *adapters)


def _buckets(most: int) -> Iterator[int]:
    """Row counts that steps are recorded for. Padding rows cost little: they read one position."""
    yield from (n for n in (1, 4, 16) if n < most)
    yield from range(64, most, 64)
    yield most
