"""The engine interface, an extension point: any object with these members can sample for rollouts.

A rollout samples through a session: it submits rows, collects finished ones step by step, and resubmits a row with its
observation while others are still being sampled. An engine that samples whole batches subclasses ``BatchEngine``, which
provides the session.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from search_e1.errors import ModelError
from search_e1.types import StopReason


@dataclass(frozen=True, slots=True)
class Generation:
    """The tokens sampled after one prompt.

    ``ids`` ends with an end token or the token that completed a stop string, unless cut by the token limit; it never contains
    padding. ``logprobs``, if the engine has them, are those of ``ids`` under the sampling distribution.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    stop: StopReason | None = None
    """The reason if the engine ends the trajectory here; ``ids`` are then meaningless."""
    words: str = ""
    """A server's message about ``stop``."""


def finite(logprobs: Sequence[float | None], whose: str, remedy: str) -> tuple[float, ...]:
    """``logprobs`` of sampled ids. vLLM samples from logits that are not finite without an error.

    Raises:
        ModelError: one is missing or not finite; names ``whose`` they are, and the ``remedy``.
    """
    known = tuple(logprob for logprob in logprobs if logprob is not None and math.isfinite(logprob))
    if len(known) < len(logprobs):
        raise ModelError(
            f"{whose}: logits that are not finite while sampling; {remedy}; if it is already, check that the policy's "
            "weights are finite"
        )
    return known


@dataclass(frozen=True, slots=True)
class Request:
    """A row to sample."""

    key: int
    """Identifies the row in its session. A finished row is resubmitted under its key with a longer prompt."""
    prompt: Sequence[int]
    max_new_tokens: int
    seed: int
    """Seed of this generation, independent of the batch it is sampled in."""
    begun: Generation = Generation(())
    """Tokens that an interrupted session already sampled; they count as new tokens. An engine that cannot continue them samples
    the generation again."""
    temperature: float | None = None
    """Overrides the session's temperature."""


class Interrupted(BaseException):
    """A step was abandoned because ``Session.interrupted`` is true; no row is lost. Not an error, so not an ``Exception``."""


class Session(Protocol):
    """Samples many rows together. A session whose generations cost money may have ``keep``: see ``remote``."""

    admission_interval: int
    """Steps between submissions of rows; more than 1 if admitting rows is expensive."""

    interrupted: Callable[[], bool]
    """Checked during long steps, which raise ``Interrupted`` when it is true."""

    def submit(self, request: Request) -> None:
        """Queue a row; it is sampled when there is room."""
        ...

    def step(self) -> list[tuple[int, Generation]]:
        """Sample one or more tokens; returns keys and generations of the rows that finished, possibly none.

        A generation ends at an end token of the model, at a token that completes a stop string, or at ``max_new_tokens``.
        """
        ...

    def release(self, key: int) -> None:
        """Drop a row that will not be resubmitted. A row being sampled may still be finished."""
        ...

    def begun(self) -> dict[int, Generation]:
        """The tokens sampled so far of unfinished rows; rows may be missing. Optional."""
        ...


class Engine(Protocol):
    """Samples from a policy, ids in, ids out."""

    tokenizer: Any
    context_length: int
    """Maximum ids of a prompt and its generation together."""

    def session(self, *, temperature: float, stop: Sequence[str], max_tokens: int) -> AbstractContextManager["Session"]:
        """A session, valid within the context.

        ``temperature`` 0 is greedy; otherwise the full distribution is sampled, without top-k or top-p. ``stop``: strings that
        end a generation, in addition to the model's end tokens. ``max_tokens``: maximum ids of a prompt and its generation.
        """
        ...


class BatchEngine(ABC):
    """An engine that samples whole batches: every row finishes before the next step."""

    tokenizer: Any
    context_length: int

    @abstractmethod
    def generate(self, requests: Sequence[Request], *, temperature: float, stop: Sequence[str]) -> list[Generation]:
        """One generation per request, in order. See ``Session.step`` and ``Engine.session``."""

    @contextmanager
    def session(self, *, temperature: float, stop: Sequence[str], max_tokens: int) -> Iterator["_Batches"]:
        """See ``Engine.session``."""
        yield _Batches(self, temperature, stop)


def never() -> bool:
    """A ``Session.interrupted`` that never interrupts."""
    return False


class _Batches:
    admission_interval = 1
    interrupted = staticmethod(never)

    def __init__(self, engine: BatchEngine, temperature: float, stop: Sequence[str]) -> None:
        self._engine, self._temperature, self._stop = engine, temperature, stop
        self._waiting: list[Request] = []

    def submit(self, request: Request) -> None:
        self._waiting.append(request)

    def step(self) -> list[tuple[int, Generation]]:
        waiting, self._waiting, finished = self._waiting, [], []
        own = {id(r): self._temperature if r.temperature is None else r.temperature for r in waiting}
        for temperature in dict.fromkeys(own.values()):
            requests = [request for request in waiting if own[id(request)] == temperature]
            generations = self._engine.generate(requests, temperature=temperature, stop=self._stop)
            finished += [(request.key, done) for request, done in zip(requests, generations, strict=True)]
        return finished

    def release(self, key: int) -> None:
        """See ``Session``."""
        self._waiting = [request for request in self._waiting if request.key != key]

    def begun(self) -> dict[int, Generation]:
        """Empty: batches are sampled whole."""
        return {}
