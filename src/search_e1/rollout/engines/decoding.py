"""Decoding on a GPU: several tokens of each row between two looks of the host, each step one replay of a recorded graph.

A step reads what it is about (ids, positions, what is left to sample) from memory on the device, runs the model, draws, and
writes the ids back to where the next step reads them. It is recorded for a number of rows (the next of ``_buckets``), for how
far attention reads, and for how ids are drawn; it is never replayed for more rows or a longer row than it was recorded for.
Weights are read where they lie, so that a step samples from weights that were updated in place.
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
"""Tokens of a row between two looks of the host."""
_EXTENT = 512
"""How far attention reads, where it reads all rows equally far, is a multiple of this."""
_GIVEN = 4
"""Numbers of a row besides its random ones."""


class Next(NamedTuple):
    """A row that is to be sampled on."""

    id: int
    """Its last id, the next that goes through the model."""
    position: int
    left: int
    """Most ids to sample, at least 1."""
    temperature: float
    numbers: Sequence[float]
    """One for each step."""


class _Key(NamedTuple):
    rows: int
    extent: int
    mode: Mode


@dataclass(slots=True)
class _Recorded:
    replay: Callable[[], object]
    logits: torch.Tensor | None
    """Of the last replay; ``None`` once they were compared with the plain step's."""


class DecodeLoop:
    """Samples the rows in a cache's first slots. The last slot of the cache is this loop's own.

    There, rows that have ended and those that fill up a bucket write until the host looks.
    """

    def __init__(self, model: PreTrainedModel, cache: RaggedCache, rows: int, recorder: Recorder) -> None:
        """``rows``: most that are sampled together."""
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
        """Of its cache and of the recorded steps."""
        return self.cache.bytes + self._recorder.bytes

    def open(self, ends: Ends) -> None:
        """Begin to sample rows that end as ``ends`` says.

        A row pauses at an id that ends it for certain. If what is sampled beyond a row's end cannot be undone, as with
        convolutions, it pauses at each that may end it, until the host has looked.
        """
        self._pausing = ends.candidates if self.cache.convolves else ends.certain
        if self._pausing is None:
            self._pauses.fill_(True)
        else:
            known = sorted(id for id in self._pausing if id is not None and id < len(self._pauses))
            self._pauses.zero_()
            self._pauses[torch.tensor(known, dtype=torch.int64, device=self._pauses.device)] = True

    def run(self, rows: Sequence[Next]) -> list[list[tuple[int, float]]]:
        """Up to ``STEPS`` ids of each row, and their log-probabilities, NaN where logits were not finite.

        The caller looks for the end of a row among them, and drops what follows: nothing of it counts.

        Raises:
            CaptureError: a step cannot be recorded, or does not compute what the plain one does; nothing was sampled.
        """
        steps = min(STEPS, max(row.left for row in rows))
        key = self._key(rows, steps)
        recorded = self._recorded.get(key) or self._recorded.setdefault(key, self._record(key))
        self._give(rows)
        if recorded.logits is None:
            for _ in range(steps):
                recorded.replay()
        else:
            self._compare(recorded, rows, steps)
        ids, logprobs = self._sampled[:, :steps, : len(rows)].transpose(1, 2).tolist()  # the one wait for the device
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
            self._recorded, self._moved = {}, self.cache.moved  # they point at memory that is no longer the cache's
        extent = self.cache.capacity
        if not isinstance(self.cache, PagedCache):
            extent = min(extent, -(-longest // _EXTENT) * _EXTENT)
        greedy = {row.temperature == 0 for row in rows}
        mode: Mode = "mixed" if len(greedy) == 2 else "greedy" if True in greedy else "sampled"
        return _Key(next(n for n in _buckets(self.rows) if n >= len(rows)), extent, mode)

    def _record(self, key: _Key) -> _Recorded:
        for state in (self._ids, self._positions, self._left, self._at):
            state.zero_()  # while it is recorded, a step samples no row
        return _Recorded(*self._recorder.capture(lambda: self._step(key)))

    def _step(self, key: _Key) -> torch.Tensor:
        ids, positions, left = (state[: key.rows] for state in (self._ids, self._positions, self._left))
        going = left > 0
        slots = torch.where(going, self._own[: key.rows], self.cache.slots - 1)
        logits = self.cache.step(ids, positions, slots, key.extent)
        if logits.shape[1] > len(self._pauses):
            raise CaptureError(f"{logits.shape[1]} logits for a vocabulary of {len(self._pauses)}")
        numbers = self._numbers.index_select(0, self._at)[0, : key.rows]
        drawn, logprobs = draw_on_device(logits, self._temperatures[: key.rows], numbers, key.mode)
        self._sampled[:, :, : key.rows].index_copy_(1, self._at, torch.stack((drawn.double(), logprobs.double()))[:, None])
        ids.copy_(torch.where(going, drawn, ids))
        positions.add_(going)
        left.copy_(torch.where(going & ~self._pauses[drawn], left - 1, 0))
        self._at.add_(1)
        return logits

    # Replaying.

    def _give(self, rows: Sequence[Next]) -> None:
        given = np.zeros((_GIVEN + STEPS, self.rows))
        given[3] = 1.0
        for i, row in enumerate(rows):
            given[:, i] = (row.id, row.position, row.left, row.temperature, *row.numbers)
        there = torch.from_numpy(given).to(self._ids.device)  # one transfer; whole numbers are exact
        for state, numbers in zip((self._ids, self._positions, self._left, self._temperatures), there, strict=False):
            state.copy_(numbers)
        self._numbers.copy_(there[_GIVEN:])
        self._at.zero_()

    def _compare(self, recorded: _Recorded, rows: Sequence[Next], steps: int) -> None:
        """Replay for the first time; after each step the logits of rows that went on must be those of the plain step."""
        assert recorded.logits is not None
        near, begun = tolerance(recorded.logits.dtype), self.cache.states()
        for step in range(steps):
            going = [i for i, left in enumerate(self._left[: len(rows)].tolist()) if left]
            if not going:
                break
            ids = self._sampled[0, step - 1].tolist() if step else [row.id for row in rows]
            places, states = [rows[i].position + step for i in going], self.cache.states()
            expected = RaggedCache.forward(self.cache, going, places, [[int(ids[i])] for i in going]).float()
            self.cache.restore(states)
            recorded.replay()
            differ = (recorded.logits[going].float() - expected).norm(dim=-1)
            differ /= (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
            # Half of the rows as near as any two ways to compute them; the farthest of hundreds may be farther.
            if not bool((differ.median() <= near) & (differ.max() <= 5 * near)):
                self.cache.restore(begun)
                raise CaptureError(f"its logits differ from the plain step's{f' at step {step + 1}' if step else ''}")
        recorded.logits = None  # its memory serves the next graph


def tolerance(dtype: torch.dtype) -> float:
    """How far logits that were computed in another order may be apart, as a share of their spread."""
    return 1e-3 if dtype == torch.float32 else 0.05


def weights_of(model: PreTrainedModel) -> tuple[object, ...]:
    """Where weights lie and how adapters are applied: while this is the same, a recorded step computes what the model does."""
    from peft.tuners.lora import LoraLayer  # nothing of it is loaded by what only asks an agent on a CPU

    tensors = chain(model.parameters(), model.buffers())
    adapters = (
        (module.disable_adapters, module.merged, tuple(module.active_adapters), tuple(module.scaling.items()))
        for module in model.modules()
        if isinstance(module, LoraLayer)
    )
    return (*((tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in tensors), *adapters)


def _buckets(most: int) -> Iterator[int]:
    """Numbers of rows that steps are recorded for. Rows that fill up cost little: they read one position."""
    yield from (n for n in (1, 4, 16) if n < most)
    yield from range(64, most, 64)
    yield most
