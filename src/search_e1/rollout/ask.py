"""One question, answered now."""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from search_e1.config import Prompts, RolloutConfig
from search_e1.retrieval.base import Retriever
from search_e1.rollout.engines.base import Engine
from search_e1.rollout.engines.endpoint import Endpoint, EndpointEngine
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.rollout.engines.vllm import VllmEngine
from search_e1.rollout.loop import rollout, starts
from search_e1.training.policy import Policy
from search_e1.types import Question, Trajectory, Turn


def ask(
    question: str,
    policy: Policy | Endpoint | Engine,
    retriever: Retriever,
    limits: RolloutConfig | None = None,
    *,
    prompts: Prompts | None = None,
    temperature: float = 0.0,
    seed: int | None = None,
    on_turn: Callable[[Turn], None] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Trajectory:
    """Let ``policy`` search and answer; ``answer`` of the trajectory is ``None`` if it came to none.

    ``on_turn`` is called with each turn as it comes, ``on_text`` with what is sampled, as it is sampled and without end
    tokens (an endpoint's comes in turns only). ``prompts`` are those of an endpoint or an engine; a policy brings its own.
    The trajectory carries no reward: the right answer is not known.

    Raises:
        SearchE1Error: the question does not fit, or the retriever or the endpoint fails.
    """
    # A question without gold answers is refused by its type; the empty one matches nothing but an empty answer.
    asked = Question(id="asked", text=question, answers=("",))
    engine: Engine
    opened: AbstractContextManager[object] = nullcontext()
    if isinstance(policy, Endpoint):
        prompts = prompts or Prompts()
        engine = EndpointEngine(policy, prompts)
        opened = engine.server
    elif isinstance(policy, Policy):
        prompts = policy.prompts
        stream = _Stream(policy.tokenizer, on_text) if on_text else None
        engine = TorchEngine(policy.model, policy.tokenizer, on_id=stream)
    else:
        engine, prompts = policy, prompts or Prompts()
        if isinstance(engine, VllmEngine):
            engine.on_id = _Stream(engine.tokenizer, on_text) if on_text else None
    with opened:
        (trajectory,) = rollout(
            engine, retriever, starts(engine.tokenizer, prompts, [asked]), limits or RolloutConfig(), temperature=temperature,
            seed=random.randrange(2**32) if seed is None else seed, prompts=prompts,
            on_turn=(lambda _, turn: on_turn(turn)) if on_turn else None,
        )  # fmt: skip
    return trajectory.model_copy(update={"reward": 0.0, "f1": 0.0})


class _Stream:
    """Turns ids, one at a time, into text: each character once, when it is whole."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text, self._shown = tokenizer, on_text, 0
        self._ids: list[int] = []

    def __call__(self, id: int | None) -> None:
        """``None`` begins a generation."""
        if id is None:
            self._ids, self._shown = [], 0
            return
        if id in self._tokenizer.all_special_ids:
            return
        self._ids.append(id)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        if whole[self._shown :]:
            self._on_text(whole[self._shown :])
            self._shown = len(whole)
