"""The engine over a transformers model in memory, for instance the one being trained."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import psutil
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from search_e1.errors import ModelError
from search_e1.rollout.engines.base import BatchEngine, Generation, Request, Session
from search_e1.rollout.engines.continuous import ContinuousSession
from search_e1.rollout.engines.decoding import DecodeLoop, tolerance, weights_of
from search_e1.rollout.engines.graphs import CudaGraphs, Recorder
from search_e1.rollout.engines.paged import PagedCache
from search_e1.rollout.engines.ragged import RaggedCache
from search_e1.rollout.engines.sampling import Ends, Numbers, draw
from search_e1.training.policy import context_length

logger = logging.getLogger(__name__)
_CACHE_SHARE = 0.6
"""Maximum share of free memory for the cache. The rest is for forward passes."""
_KEEP_SHARE = 0.25
"""Maximum share of free memory for a GPU's cache and its graphs to be kept for the model's next session."""


class TorchEngine:
    """Samples from a transformers model, with continuous batching (``ContinuousSession``) if its layers allow.

    A trial on the model decides. Models with recurrent states or custom kernels are sampled in whole batches by transformers'
    ``generate`` (``PlainEngine``).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        batch_size: int = 64,
    ) -> None:
        """``batch_size``: maximum rows in memory together; fewer if their cache does not fit."""
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.context_length = context_length(model.config)

    @contextmanager
    def session(self, *, temperature: float, stop: Sequence[str], max_tokens: int) -> Iterator[Session]:
        """See ``Engine.session``. The model's own sampling defaults are ignored."""
        with _sampling_mode(self.model):
            size = _bytes_per_position(self.model)
            if size is None:
                plain = PlainEngine(self.model, self.tokenizer, batch_size=self.batch_size)
                with plain.session(temperature=temperature, stop=stop, max_tokens=max_tokens) as batches:
                    yield batches
                return
            ends, recorder = Ends(self.model, self.tokenizer, stop), _recorder(self.model.device)
            if recorder and self.model not in _refused:
                with self._on_gpu(recorder, ends, size, temperature, max_tokens) as session:
                    yield session
                return
            rows = max(1, min(self.batch_size, int(_CACHE_SHARE * _free_memory(self.model.device) / (size * max_tokens)) - 1))
            session = ContinuousSession(self.model, ends, temperature=temperature, rows=rows)
            yield session
            if session.rows < rows:  # out of memory; it would happen again
                self.batch_size = session.rows

    @contextmanager
    def _on_gpu(
        self, recorder: Recorder, ends: Ends, size: int, temperature: float, max_tokens: int
    ) -> Iterator[ContinuousSession]:
        """A session that replays CUDA graphs; graphs and cache are kept for the next session if memory allows."""
        model, weights, wanted = self.model, weights_of(self.model), self.batch_size
        kept = _kept.pop(model, None)
        loops = [kept.loop] if kept and kept.serves(weights, wanted, max_tokens) else []
        if kept and kept.weights != weights:
            _unstable.add(model)
        del kept
        free = _free_memory(model.device)
        keep, rows = bool(loops), max(1, min(wanted, int(_CACHE_SHARE * free / (size * max_tokens)) - 2))
        if loops:
            rows = loops[0].rows

        def decoder(rows: int) -> DecodeLoop:
            return loops.pop() if loops else DecodeLoop(model, _cache_of(model)(model, rows + 2, max_tokens), rows, recorder)

        session = ContinuousSession(model, ends, temperature=temperature, rows=rows, decoder=decoder)
        yield session
        if session.rows < rows:
            self.batch_size = session.rows
        if session.loop is None:
            _refused.add(model)
        elif model not in _unstable and (keep or session.loop.bytes <= _KEEP_SHARE * free):
            _kept[model] = _Kept(session.loop, weights, self.batch_size)


@dataclass(frozen=True, slots=True)
class _Kept:
    loop: DecodeLoop
    weights: tuple[object, ...]
    batch_size: int

    def serves(self, weights: tuple[object, ...], batch_size: int, max_tokens: int) -> bool:
        """Whether the kept loop suits a session with these settings."""
        return (self.weights, self.batch_size) == (weights, batch_size) and max_tokens <= self.loop.cache.capacity


_kept: WeakKeyDictionary[PreTrainedModel, _Kept] = WeakKeyDictionary()
"""Decode loops kept between sessions, by model. In-place weight updates do not invalidate them."""
_unstable: WeakSet[PreTrainedModel] = WeakSet()
"""Models whose weights move between sessions, e.g. sharded ones: nothing is kept for them."""
_refused: WeakSet[PreTrainedModel] = WeakSet()
"""Models whose steps cannot be replayed as CUDA graphs."""


def _recorder(device: torch.device) -> Recorder | None:
    return CudaGraphs(device) if device.type == "cuda" else None


class PlainEngine(BatchEngine):
    """Samples from any transformers model with ``generate``: whole batches, every prompt recomputed from the start."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        batch_size: int = 64,
    ) -> None:
        """See ``TorchEngine``."""
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.context_length = context_length(model.config)
        self._pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)  # masked

    def generate(self, requests: Sequence[Request], *, temperature: float, stop: Sequence[str]) -> list[Generation]:
        """See ``BatchEngine``. The model's own sampling defaults are ignored."""
        ends = Ends(self.model, self.tokenizer, stop)
        with _sampling_mode(self.model):
            # Sorted by length for less padding; longest first, so that running out of memory happens at once.
            order = sorted(requests, key=lambda request: -len(request.prompt))
            done: dict[int, Generation] = {}
            for at in range(0, len(order), self.batch_size):
                done |= self._batch(order[at : at + self.batch_size], temperature, ends)
        return [done[request.key] for request in requests]

    def _batch(self, requests: Sequence[Request], temperature: float, ends: Ends) -> dict[int, Generation]:
        width, device = max(len(request.prompt) for request in requests), self.model.device
        pads = [width - len(request.prompt) for request in requests]
        ids = [[self._pad_id] * pad + list(r.prompt) for pad, r in zip(pads, requests, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in pads]
        drawn = _Drawn(requests, width, temperature, ends)
        model: Any = self.model  # `generate` is from GenerationMixin, which PreTrainedModel's type lacks
        model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=GenerationConfig(
                max_new_tokens=max(request.max_new_tokens for request in requests), pad_token_id=self._pad_id
            ),
            logits_processor=LogitsProcessorList([drawn]),
            stopping_criteria=StoppingCriteriaList([drawn.criterion]),
        )
        rows = zip(requests, drawn.ids, drawn.logprobs, strict=True)
        return {request.key: Generation(tuple(ids), tuple(logprobs)) for request, ids, logprobs in rows}


class _Drawn(LogitsProcessor):
    """Draws each id itself, leaving ``generate`` no choice, and ends rows.

    ``generate`` could return all logits instead, but at a vocabulary of 151,936 that is 19 GB for 64 rows of 500 tokens.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        width: int,
        temperature: float,
        ends: Ends,
    ) -> None:
        self.ids: list[list[int]] = [[] for _ in requests]
        self.logprobs: list[list[float]] = [[] for _ in requests]
        self.criterion = _Done(self)
        self.done = [False] * len(requests)
        self._requests = requests
        self._sources = [Numbers(request.seed) for request in requests]
        self._temperature, self._ends = temperature, ends

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ids, logprobs = draw(scores, self._temperature, self._sources)
        for row, (id, logprob) in enumerate(zip(ids, logprobs, strict=True)):
            if not self.done[row]:
                self.ids[row].append(id)
                self.logprobs[row].append(logprob)
                full = len(self.ids[row]) >= self._requests[row].max_new_tokens
                self.done[row] = full or self._ends.at(self.ids[row])
        chosen = torch.full_like(scores, -torch.inf)
        return chosen.scatter_(1, torch.tensor(ids, device=scores.device)[:, None], 0.0)


class _Done(StoppingCriteria):
    def __init__(self, drawn: _Drawn) -> None:
        self._drawn = drawn

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(self._drawn.done, device=input_ids.device)


@contextmanager
def _sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switch the model to sampling within the context: in training mode, dropout would sample from another policy."""
    was_training, defaults = model.training, model.generation_config
    model.eval()
    # A model's own defaults (Qwen's have top-k, top-p and a repetition penalty) fill unset options, and would silently change
    # the sampling distribution that training assumes.
    model.generation_config = GenerationConfig(eos_token_id=getattr(defaults, "eos_token_id", None))
    try:
        with torch.no_grad():
            yield
    except FloatingPointError as error:
        dtype = str(model.dtype).removeprefix("torch.")
        raise ModelError(
            f"{error} while sampling with policy.dtype = {dtype!r}; set it to bfloat16 or float32; if it is, check that "
            "the policy's weights are finite"
        ) from error
    finally:
        model.train(was_training)
        model.generation_config = defaults


_tried: dict[tuple[object, ...], int | None] = {}


def _bytes_per_position(model: PreTrainedModel, kind: type[RaggedCache] = RaggedCache) -> int | None:
    """Cache memory per token of a row; ``None`` if the model does not work with this cache. Tried once per kind of model."""
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    key = type(model), model.config.to_json_string(), kind, model.dtype, model.device.type, attention
    if key not in _tried:
        try:
            _tried[key] = _try(model, kind)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, TypeError, ValueError, LookupError, AttributeError, RuntimeError, ImportError) as error:
            _tried[key] = None
            if kind is PagedCache:
                reason = str(error).partition("\n")[0].partition(". ")[0]
                logger.warning("sampling without flash attention, which is slower: %s", reason)
    return _tried[key]


def _cache_of(model: PreTrainedModel) -> type[RaggedCache]:
    return PagedCache if _bytes_per_position(model, PagedCache) else RaggedCache


def _try(model: PreTrainedModel, kind: type[RaggedCache]) -> int:
    """Check that two rows of different lengths that swap slots and continue have the same logits as each alone.

    One row crosses the cache's border in its prompt, the other while continuing.

    Returns:
        ``bytes_per_position`` of the cache.

    Raises:
        NotImplementedError: the logits differ.
    """
    cache = kind(model, 3)
    before, draw = max(0, cache.border - 4), Random(0)
    a, b, more = (draw.choices(range(1, 14), k=length) for length in (before + 5, before + 3, 3))
    cache.forward([1, 2], [0, 0], [a, b])
    cache.move([1, 2], [2, 1], len(a))
    cache.forward([1], [len(b)], [more])
    together = cache.forward([1, 2], [len(b) + len(more), len(a)], [[12], [13]]).float()
    whole = (torch.tensor([ids], device=model.device) for ids in ([*b, *more, 12], [*a, 13]))
    alone = torch.cat([model(input_ids=ids, logits_to_keep=1).logits[:, -1] for ids in whole]).float()
    spread = (alone - alone.mean(-1, keepdim=True)).norm()
    if not (together - alone).norm() <= tolerance(model.dtype) * spread:
        raise NotImplementedError("rows sampled together differ from rows sampled alone")
    return cache.bytes_per_position()


def _free_memory(device: torch.device) -> int:
    """Free memory in bytes, including torch's unused cache, except memory of CUDA graphs."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
