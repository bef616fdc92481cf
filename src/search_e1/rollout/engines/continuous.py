"""Continuous batching: finished rows leave the batch, rows with a new observation join it, and nothing is computed twice.

Rows hold slots of a ``RaggedCache``: first the active rows, which are sampled together, then rows waiting for an observation,
then free slots. A slot keeps its row's earlier turns until the row is released. Siblings copy their prompt's cache, and the
common prefix of all prompts (the instruction) is computed once per session.
"""

import gc
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from transformers import PreTrainedModel

from search_e1.errors import ModelError
from search_e1.rollout.engines.base import Generation, Interrupted, Request, never
from search_e1.rollout.engines.decoding import STEPS, DecodeLoop, Next
from search_e1.rollout.engines.graphs import CaptureError
from search_e1.rollout.engines.ragged import RaggedCache
from search_e1.rollout.engines.sampling import Ends, Numbers, draw

logger = logging.getLogger(__name__)
_Tokens = Sequence[tuple[int, float]]
"""Sampled ids and their log-probabilities."""
_PREFILL, _CPU_PREFILL = 8192, 1024
"""Maximum tokens, padding included, of one forward pass over prompts or observations. A signal has to wait for one pass, and on
a CPU larger passes are no faster."""
_MIN_PREFIX = 16
"""A common prefix of prompts is computed separately if it has at least this many tokens."""


@dataclass(slots=True, eq=False)
class _Row:
    key: int
    slot: int | None = None
    stored: int = 0
    """The slot that currently holds its cache; differs from ``slot`` until ``_settle`` moves it."""
    num_cached: int = 0
    """How many of ``ids`` are in the cache."""
    ids: list[int] = field(default_factory=list)
    """Prompt and sampled tokens."""
    prompt: int = 0
    """Length of the prompt within ``ids``."""
    end: int = 0
    """Length of ``ids`` after ``max_new_tokens``."""
    source: Numbers = field(init=False)
    temperature: float | None = None
    logprobs: list[float] = field(default_factory=list)
    unfinished: bool = True

    def begin(self, request: Request) -> None:
        """Continue with the request's prompt; starts over if it does not extend the cached ids."""
        prompt = list(request.prompt)
        if self.ids[: self.num_cached] != prompt[: self.num_cached] or self.num_cached >= len(prompt):
            self.num_cached = 0
        self.ids, self.prompt, self.end = (
            [*prompt, *request.begun.ids],
            len(prompt),
            len(prompt) + request.max_new_tokens,
        )
        self.source, self.logprobs, self.unfinished = Numbers(request.seed), list(request.begun.logprobs or ()), True
        self.temperature = request.temperature
        for _ in request.begun.ids:
            self.source.random()

    @property
    def pending_ids(self) -> list[int]:
        """The ids to prefill: all uncached ones, except the last."""
        return self.ids[self.num_cached : -1]


class ContinuousSession:
    """A ``Session`` over a transformers model."""

    interrupted = staticmethod(never)
    admission_interval = STEPS
    answers_wait = False
    """Whether steps are long enough to overlap with the retriever: observations are then inserted a step later. Optional."""

    def __init__(
        self,
        model: PreTrainedModel,
        ends: Ends,
        *,
        temperature: float,
        rows: int,
        decoder: Callable[[int], DecodeLoop] | None = None,
    ) -> None:
        """``rows``: number of slots. ``decoder``: opens a loop for that many rows that samples several tokens per step."""
        self._model, self._ends, self._temperature, self._decoder = model, ends, temperature, decoder
        self._prefill_tokens = _CPU_PREFILL if model.device.type == "cpu" else _PREFILL
        self._rows: dict[int, _Row] = {}
        self._waiting: list[_Row] = []
        self._steps = 0
        self._empty(rows)

    def _empty(self, rows: int) -> None:
        self.rows = rows
        self._held: list[_Row | None] = [None] * rows  # by slot
        self._active = 0
        self._prefix: list[int] | None = None  # unknown until the first prompts arrive
        self.loop = self._decoder(rows) if self._decoder else None
        self._cache = self.loop.cache if self.loop else RaggedCache(self._model, rows + 1)  # slot `rows` holds the prefix
        if self.loop:
            self.loop.open(self._ends)
            self.admission_interval, self.answers_wait = 1, True

    def submit(self, request: Request) -> None:
        """See ``Session``."""
        row = self._rows.get(request.key) or self._rows.setdefault(request.key, _Row(request.key))
        row.begin(request)
        self._waiting.append(row)

    def release(self, key: int) -> None:
        """See ``Session``."""
        row = self._rows.pop(key)
        if row.unfinished and row in self._waiting:
            self._waiting.remove(row)
        elif row.unfinished:
            self._leave(row)
        if row.slot is not None:
            self._held[row.slot] = None

    def begun(self) -> dict[int, Generation]:
        """See ``Session``."""
        return {
            row.key: Generation(tuple(row.ids[row.prompt :]), tuple(row.logprobs))
            for row in self._rows.values()
            if row.unfinished and len(row.ids) > row.prompt
        }

    def step(self) -> list[tuple[int, Generation]]:
        """See ``Session``: admit waiting rows, then sample the active ones.

        Raises:
            ModelError: not even a single row fits in memory.
        """
        try:
            self._settle()  # only now, when released rows need not be moved
            if self._waiting and (not self._active or self._steps % self.admission_interval == 0):
                self._join()
            self._steps += 1
            return self._sample() if self._active else []
        except torch.OutOfMemoryError as error:
            if self.rows == 1:
                raise ModelError(
                    "not even one trajectory fits into memory; lower rollout.max_tokens, or use a smaller policy"
                ) from error
        self._shrink()
        return []

    # Active rows.

    def _sample(self) -> list[tuple[int, Generation]]:
        rows = [row for row in self._held[: self._active] if row]
        sampled = (self.loop and self._sample_ahead(self.loop, rows)) or self._sample_one(rows)
        finished = [row for row, tokens in zip(rows, sampled, strict=True) if self._take(row, tokens)]
        for row in reversed(finished):
            self._leave(row)
        return [(row.key, Generation(tuple(row.ids[row.prompt :]), tuple(row.logprobs))) for row in finished]

    def _take(self, row: _Row, tokens: _Tokens) -> bool:
        """Append sampled tokens to a row up to its end; returns whether it has ended."""
        ends = self._ends
        for id, logprob in tokens:
            if math.isnan(logprob):
                raise FloatingPointError("logits that are not finite")
            row.num_cached += 1
            row.ids.append(id)
            row.logprobs.append(logprob)
            last = (ends.candidates is None or id in ends.candidates) and ends.at(row.ids, row.prompt)
            if last or len(row.ids) >= row.end:
                row.unfinished = False
                break
        return not row.unfinished

    def _sample_one(self, rows: Sequence[_Row]) -> Sequence[_Tokens]:
        pending_ids = [row.ids[-1:] for row in rows]
        logits = RaggedCache.forward(self._cache, range(len(rows)), [row.num_cached for row in rows], pending_ids)
        return [[token] for token in zip(*self._draw(logits, rows), strict=True)]

    def _sample_ahead(self, loop: DecodeLoop, rows: Sequence[_Row]) -> Sequence[_Tokens]:
        """Tokens of several steps; empty if the loop does not work, which disables it."""
        own = [self._temperature if row.temperature is None else row.temperature for row in rows]
        todo = [
            Next(row.ids[-1], row.num_cached, row.end - len(row.ids), temperature, row.source.peek(STEPS))
            for row, temperature in zip(rows, own, strict=True)
        ]
        try:
            sampled = loop.run(todo)
        except CaptureError as error:
            logger.warning("decoding without CUDA graphs, which is slower: %s", error)
            self.loop = self._decoder = None
            self.admission_interval, self.answers_wait = STEPS, False
            return []
        for row, tokens in zip(rows, sampled, strict=True):
            for _ in tokens:
                row.source.random()
        return sampled

    def _draw(self, logits: torch.Tensor, rows: Sequence[_Row]) -> tuple[Sequence[int], Sequence[float]]:
        """Draw an id per row, grouped by temperature; see ``draw``."""
        own = [self._temperature if row.temperature is None else row.temperature for row in rows]
        if len(set(own)) == 1:
            return draw(logits, own[0], [row.source for row in rows])
        ids, logprobs = [0] * len(rows), [0.0] * len(rows)
        for temperature in dict.fromkeys(own):
            places = [i for i, wanted in enumerate(own) if wanted == temperature]
            drawn = draw(logits[places], temperature, [rows[i].source for i in places])
            for i, id, logprob in zip(places, *drawn, strict=True):
                ids[i], logprobs[i] = id, logprob
        return ids, logprobs

    def _leave(self, row: _Row) -> None:
        """Remove a row from the active ones; the last active row takes its place."""
        self._active -= 1
        self._put(row, self._active)

    # Rows that join.

    def _join(self) -> None:
        joining: list[_Row] = []
        later: list[_Row] = []
        free = [slot for slot in range(self._active, self.rows) if self._held[slot] is None]
        for row in self._waiting:
            if row.slot is None and free:
                row.slot = row.stored = free.pop(0)
                self._held[row.slot] = row
            (later if row.slot is None else joining).append(row)
        self._waiting = later
        leaders: dict[tuple[int, ...], _Row] = {}
        followers = [row for row in joining if not row.num_cached and leaders.setdefault(tuple(row.ids), row) is not row]
        followed = {row.key for row in followers}
        to_prefill = [row for row in joining if row.key not in followed]
        self._begin(list(leaders.values()))
        self._gather(joining)
        self._settle()
        self._prefill(sorted(to_prefill, key=lambda row: len(row.ids) - row.num_cached, reverse=True))
        self._copy([leaders[tuple(row.ids)] for row in followers], followers)
        self._active += len(joining)

    def _begin(self, rows: Sequence[_Row]) -> None:
        """Copy the cached common prefix to new rows with distinct prompts."""
        self._cache.clear([row.stored for row in rows])
        if self._prefix is None and len(rows) > 1:
            common = _common([row.ids[:-1] for row in rows])
            self._prefix = common if len(common) >= _MIN_PREFIX else []
            if self._prefix:
                self._cache.forward([self.rows], [0], [self._prefix])
        prefix = _Row(-1, stored=self.rows, ids=self._prefix or [], num_cached=len(self._prefix or []))
        sharing = [row for row in rows if row.ids[: prefix.num_cached] == prefix.ids and len(row.ids) > prefix.num_cached > 0]
        self._copy([prefix] * len(sharing), sharing)

    def _copy(self, sources: Sequence[_Row], rows: Sequence[_Row]) -> None:
        """Copy the cache of each of ``sources`` to the corresponding row."""
        if rows:
            length = max(model.num_cached for model in sources)
            self._cache.move([row.stored for row in rows], [model.stored for model in sources], length)
        for row, model in zip(rows, sources, strict=True):
            row.num_cached = model.num_cached

    def _prefill(self, rows: Sequence[_Row]) -> None:
        """Fill the cache up to the last id of each row; ``rows`` are sorted by prefill, longest first."""
        at, limit = 0, self._prefill_tokens
        while at < len(rows) and rows[at].pending_ids:
            width = total = min(len(rows[at].pending_ids), limit)
            end = at + 1
            while end < len(rows) and (new := len(rows[end].pending_ids)):
                total += width if self._cache.padded else new
                # Padding a row to twice its length costs more than another pass.
                if total > limit or (self._cache.padded and new * 2 <= width):
                    break
                end += 1
            part = rows[at:end]
            if self.interrupted():
                raise Interrupted
            pieces = [row.pending_ids[:width] for row in part]  # a row longer than a pass is alone in it
            self._cache.forward([row.stored for row in part], [row.num_cached for row in part], pieces)
            for row, piece in zip(part, pieces, strict=True):
                row.num_cached += len(piece)
            at = at if rows[at].pending_ids else end

    # Slots.

    def _gather(self, rows: Sequence[_Row]) -> None:
        """Assign ``rows`` the slots after the active ones; rows already there stay."""
        places = range(self._active, self._active + len(rows))
        elsewhere = [row for row in rows if row.slot not in places]
        held = {row.slot for row in rows}
        for row, place in zip(elsewhere, [place for place in places if place not in held], strict=True):
            self._put(row, place)

    def _put(self, row: _Row, slot: int) -> None:
        """Swap the slots of ``row`` and the holder of ``slot``, if any; ``_settle`` moves their cache."""
        assert row.slot is not None
        other = self._held[row.slot] = self._held[slot]
        if other:
            other.slot = row.slot
        self._held[slot], row.slot = row, slot

    def _settle(self) -> None:
        moved = [row for row in self._held if row and row.slot != row.stored]
        if cached := [row for row in moved if row.num_cached]:
            length = max(row.num_cached for row in cached)
            self._cache.move([row.slot or 0 for row in cached], [row.stored for row in cached], length)
        for row in moved:
            row.stored = row.slot or 0

    def _shrink(self) -> None:
        """Continue with half the rows. Sampled tokens are kept; the cache is recomputed."""
        warnings.warn(
            f"out of memory: {self.rows // 2} trajectories are sampled together instead of {self.rows}; "
            "lower rollout.batch_size",
            stacklevel=2,
        )
        del self._cache
        self.loop = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for row in self._rows.values():
            row.slot, row.num_cached = None, 0
        self._waiting = [row for row in self._rows.values() if row.unfinished]
        self._empty(self.rows // 2)


def _common(lists: Sequence[list[int]]) -> list[int]:
    """The common prefix: that of the smallest and the largest list in lexicographic order."""
    first, last = min(lists), max(lists)
    return [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]
