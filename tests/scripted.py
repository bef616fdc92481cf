"""A generator that says what it is told to, for tests of everything around it."""

from collections.abc import Mapping, Sequence
from typing import Any

from search_e1.prompts import INFORMATION_CLOSE
from search_e1.rollout.generator import Generation


class ScriptedGenerator:
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

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, stop: Sequence[str]
    ) -> list[Generation]:
        self.calls.append(
            {"prompts": [tuple(p) for p in prompts], "max_new_tokens": max_new_tokens, "temperature": temperature}
        )
        generations = []
        for prompt in prompts:
            text = self.tokenizer.decode(prompt)
            [question] = [q for q in self.script if q in text]
            action = self.script[question][text.count(INFORMATION_CLOSE) + text.count(self.correction)]
            ids = tuple(self.tokenizer.encode(action, add_special_tokens=False))[:max_new_tokens]
            generations.append(Generation(ids, tuple(-0.5 - i for i in range(len(ids)))))
        return generations
