"""One question, answered now."""

from collections.abc import Callable

from search_e1.config import RolloutConfig
from search_e1.policy import Policy
from search_e1.prompts import plain_prompt
from search_e1.retrieval.base import Retriever
from search_e1.rollout.hf import HFGenerator
from search_e1.rollout.loop import Start, rollout
from search_e1.types import Question, Trajectory, Turn


def ask(
    question: str,
    policy: Policy,
    retriever: Retriever,
    limits: RolloutConfig | None = None,
    *,
    temperature: float = 0.0,
    on_turn: Callable[[Turn], None] | None = None,
) -> Trajectory:
    """Let ``policy`` search and answer; ``answer`` of the trajectory is ``None`` if it came to none.

    ``on_turn`` is called with each turn as it comes. The trajectory carries no reward: the right answer is not known.
    """
    # A question without gold answers is refused by its type; the empty one matches nothing but an empty answer.
    asked = Question(id="asked", text=question, answers=("",))
    (trajectory,) = rollout(
        HFGenerator(policy.model, policy.tokenizer),
        retriever,
        [Start(asked, plain_prompt(policy.tokenizer, policy.prompts, question))],
        limits or RolloutConfig(),
        temperature=temperature,
        prompts=policy.prompts,
        on_turn=(lambda _, turn: on_turn(turn)) if on_turn else None,
    )
    return trajectory.model_copy(update={"reward": 0.0, "f1": 0.0})
