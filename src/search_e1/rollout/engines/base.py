"""The protocol of engines, an extension point: anything with these members samples for rollouts.

A rollout samples through a session: it submits rows, collects finished ones step by step, and submits a row again with its
observation while others are still being sampled. An engine that samples whole batches subclasses ``BatchEngine``, which
provides the session.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from search_e1.types import StopReason


@dataclass(frozen=True, slots=True)
class Generation:
    """The tokens sampled after one prompt.

    ``ids`` ends with the token that completed a stop string or is an end token; it never holds padding. ``logprobs``, where
    the engine has them, are those of ``ids`` under the distribution that was sampled from.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    stop: StopReason | None = None
    """Why the engine ends the trajectory here, if it does; ``ids`` say nothing then."""
    words: str = ""
    """What a server said of that."""


@dataclass(frozen=True, slots=True)
class Request:
    """A row to sample."""

    key: int
    """Identifies the row in its session. A finished row is submitted again under its key, with a longer prompt."""
    prompt: Sequence[int]
    max_new_tokens: int
    seed: int
    """Seed of this generation alone, whatever batch it is sampled in."""
    begun: Generation = Generation(())
    """Tokens that an interrupted session had sampled already; they count as new tokens. An engine that cannot continue them
    samples the generation again."""
    temperature: float | None = None
    """In place of the session's."""


class Interrupted(BaseException):
    """A step was abandoned because ``Session.interrupted`` is true; no row is lost. Not an ``Exception``: it is no error."""


class Session(Protocol):
    """Sampling of many rows together. One whose generations cost money may have ``keep``: see ``remote``."""

    admission_interval: int
    """Submit rows every so many steps; more than 1 where admitting rows is expensive."""

    interrupted: Callable[[], bool]
    """Checked within long steps, which then raise ``Interrupted``."""

    def submit(self, request: Request) -> None:
        """Queue a row until there is room for it."""
        ...

    def step(self) -> list[tuple[int, Generation]]:
        """Sample one or more tokens; keys and generations of the rows that finished, perhaps none.

        A generation ends at an end token of the model, at a token that completes a stop string, or at ``max_new_tokens``.
        """
        ...

    def release(self, key: int) -> None:
        """Drop a row that will not be submitted again. One that is being sampled may be finished all the same."""
        ...

    def begun(self) -> dict[int, Generation]:
        """The tokens sampled so far of unfinished rows; rows may be missing. Optional."""
        ...


class Engine(Protocol):
    """Samples from a policy, ids in, ids out."""

    tokenizer: Any
    context_length: int
    """Most ids of a prompt and its generation together."""

    def session(self, *, temperature: float, stop: Sequence[str], max_tokens: int) -> AbstractContextManager["Session"]:
        """A session, for as long as the context lasts.

        ``temperature`` 0 is greedy; otherwise the full distribution is sampled, without top-k or top-p. ``stop``: strings
        that end a generation, besides the model's end tokens. ``max_tokens``: most ids of a prompt and its generation.
        """
        ...


class BatchEngine(ABC):
    """An engine that samples whole batches: every row finishes before the next step."""

    tokenizer: Any
    context_length: int

    @abstractmethod
    def generate(self, requests: Sequence[Request], *, temperature: float, stop: Sequence[str]) -> list[Generation]:
        """One generation per request, in their order. See ``Session.step`` and ``Engine.session``."""

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
        """None: a batch is sampled whole."""
        return {}
