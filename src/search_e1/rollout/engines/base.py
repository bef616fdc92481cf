"""What an engine is. An extension point: anything with these members samples for rollouts.

A rollout asks through a session: it submits rows, takes what is finished step by step, and submits a row again with its
observation while others are still being sampled. An engine that can only sample a whole batch at a time subclasses
``BatchEngine`` and gets its session from there.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Generation:
    """What was sampled after one prompt.

    ``ids`` holds everything up to and including the token that completed a stop string or is an end token; padding never.
    ``logprobs``, where the engine has them, belong to ``ids`` under the distribution that was sampled from.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A row to sample: what to continue, and how far."""

    key: int
    """Names the row in its session. A row that was finished is submitted again under its key, with a longer prompt."""
    prompt: Sequence[int]
    max_new_tokens: int
    seed: int
    """Of this generation's randomness, which is its own: not that of the batch it happens to be sampled in."""
    begun: Generation = Generation(())
    """What an interrupted session had sampled of it, which counts among the new tokens. Engines that cannot continue it
    sample the generation anew."""


class Interrupted(BaseException):
    """A step was given up because ``Session.interrupted`` says so; no row is lost. No ``Exception``: it is no error."""


class Session(Protocol):
    """Sampling under way, for many rows together."""

    admission_interval: int
    """Steps between two moments at which rows had best be submitted. More than 1 where rows join at a cost."""

    interrupted: Callable[[], bool]
    """Asked within long steps: whether to give up and raise ``Interrupted``."""

    def submit(self, request: Request) -> None:
        """Ask for a row; it waits until there is room for it."""
        ...

    def step(self) -> list[tuple[int, Generation]]:
        """Go on for a while; keys and generations of the rows that have finished since, perhaps none.

        A generation ends at the first of: an end token of the model, a token that completes a stop string,
        ``max_new_tokens``.
        """
        ...

    def release(self, key: int) -> None:
        """Say that a finished row is not submitted again."""
        ...

    def begun(self) -> dict[int, Generation]:
        """What was sampled so far of rows that are not finished; may leave out any."""
        ...


class Engine(Protocol):
    """Samples from a policy, ids in, ids out."""

    tokenizer: Any
    context_length: int
    """Most ids that a prompt and what is sampled after it may have together."""

    def session(self, *, temperature: float, stop: Sequence[str], max_tokens: int) -> AbstractContextManager["Session"]:
        """Begin to sample. ``stop`` holds the strings that end a generation, beside the end tokens of the model.

        ``temperature`` 0 is greedy; otherwise the full distribution is sampled, without top-k or top-p. No prompt, with
        what is sampled after it, will have more than ``max_tokens`` ids.
        """
        ...


class BatchEngine(ABC):
    """An engine that samples whole batches: every row is finished before the next step."""

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
    """For ``Session.interrupted``: nothing interrupts."""
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
        requests, self._waiting = self._waiting, []
        generations = self._engine.generate(requests, temperature=self._temperature, stop=self._stop)
        return [(request.key, done) for request, done in zip(requests, generations, strict=True)]

    def release(self, key: int) -> None:
        """Nothing is kept."""

    def begun(self) -> dict[int, Generation]:
        """A batch is sampled whole."""
        return {}


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    stop: Sequence[str],
    seed: int = 0,
) -> list[Generation]:
    """One generation per prompt, in their order; each prompt's randomness is that of its place."""
    most = max(map(len, prompts)) + max_new_tokens
    done: dict[int, Generation] = {}
    with engine.session(temperature=temperature, stop=stop, max_tokens=most) as session:
        for key, prompt in enumerate(prompts):
            session.submit(Request(key, prompt, max_new_tokens, seed + key))
        while len(done) < len(prompts):
            for key, generation in session.step():
                done[key] = generation
                session.release(key)
    return [done[key] for key in range(len(prompts))]
