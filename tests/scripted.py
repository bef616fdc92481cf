"""A generator that says what it is told to, for tests of everything around it."""

from collections.abc import Mapping, Sequence
from typing import Any

from search_e1.rollout.engines.base import BatchEngine, Engine, Generation, Request
from search_e1.text.prompts import INFORMATION_CLOSE

STOP_STRINGS = ("</search>", "</answer>")
"""What ends a generation that uses tags."""


class ScriptedEngine(BatchEngine):
    """Says ``script[question][i]`` as the ``i``-th action of the question that its prompt holds.

    Which action is due is read off the context (observations and corrections in it), so that rows may come in any order.
    """

    def __init__(
        self,
        tokenizer: Any,
        script: Mapping[str, Sequence[str]],
        *,
        context_length: int = 1024,
        correction: str = "\nNo.\n",
    ) -> None:
        self.tokenizer = tokenizer
        self.script = script
        self.context_length = context_length
        self.correction = correction
        self.calls: list[dict[str, Any]] = []

    def generate(self, requests: Sequence[Request], *, temperature: float, stop: Sequence[str]) -> list[Generation]:
        self.calls.append(
            {
                "prompts": [tuple(request.prompt) for request in requests],
                "max_new_tokens": [request.max_new_tokens for request in requests],
                "temperature": temperature,
            }
        )
        generations = []
        for request in requests:
            text = self.tokenizer.decode(request.prompt)
            [question] = [q for q in self.script if q in text]
            action = self.script[question][text.count(INFORMATION_CLOSE) + text.count(self.correction)]
            ids = tuple(self.tokenizer.encode(action, add_special_tokens=False))[: request.max_new_tokens]
            generations.append(Generation(ids, tuple(-0.5 - i for i in range(len(ids)))))
        return generations


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
