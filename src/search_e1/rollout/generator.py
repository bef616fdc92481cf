"""What a generator is. An extension point: anything with these members samples for rollouts."""

from collections.abc import Sequence
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


class Generator(Protocol):
    """Samples from a policy, ids in, ids out."""

    tokenizer: Any
    context_length: int
    """Most ids that a prompt and what is sampled after it may have together."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, stop: Sequence[str]
    ) -> list[Generation]:
        """One generation per prompt, in their order.

        Each ends at the first of: an end token of the model, a token that completes one of ``stop``, ``max_new_tokens``.
        ``temperature`` 0 is greedy; otherwise the full distribution is sampled, without top-k or top-p.
        """
        ...
