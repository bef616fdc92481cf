"""How much of a distilled adapter is merged, chosen by the policy's answers to training questions outside the distillation."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from search_e1.runs.context import StageContext
from search_e1.stages.greedy import answer_greedily
from search_e1.stages.inputs import Inputs, subsample
from search_e1.training.policy import Policy
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Pair, Question


class Tried(NamedTuple):
    """What the policy did with a share of its adapter, question by question."""

    strength: float
    rewards: Sequence[float]
    tokens: Sequence[float]
    """Sampled ones."""


def choose_strength(
    run: Inputs, trained: TrainedPolicy, policy: Policy, pairs: Sequence[Pair], context: StageContext
) -> Mapping[str, Any]:
    """Give the adapter the strength that ``best`` names, of those that ``distill.merge`` lists. All ranks call it.

    Each strength answers the same training questions greedily; the trajectories are written into ``merge-STRENGTH.jsonl``.

    Returns:
        The strength, and the curve: EM (mean reward) and sampled tokens a question at each.

    Raises:
        RetrievalError: from the retriever.
    """
    config = run.config.distill.merge
    if len(config.strengths) == 1:
        trained.scale_adapter(config.strengths[0])
        return {"strength": config.strengths[0]}
    questions = _questions(run.train_questions, pairs, config.questions, context.seed)
    parts = []
    for strength in config.strengths:
        trained.scale_adapter(strength)
        trajectories = answer_greedily(run, trained, policy, questions, f"merge-{strength:g}.jsonl", context)
        parts.append(Tried(strength, [t.reward for t in trajectories], [t.sampled_tokens for t in trajectories]))
    chosen = best(parts)
    trained.scale_adapter(chosen)
    curve = {f"{t.strength:g}": {"em": fmean(t.rewards), "tokens": fmean(t.tokens)} for t in parts}
    return {"strength": chosen, "strengths": curve}


def best(tried: Sequence[Tried]) -> float:
    """The strength with the fewest tokens among those whose EM is at most one standard error below the highest.

    The error is that of the mean paired difference over questions: the one-standard-error rule (Breiman et al.,
    Classification and Regression Trees, 1984).
    """
    top = max(tried, key=lambda t: (fmean(t.rewards), -fmean(t.tokens)))

    def as_good(t: Tried) -> bool:
        losses = [high - own for high, own in zip(top.rewards, t.rewards, strict=True)]
        error = stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
        return fmean(losses) <= error

    return min(filter(as_good, tried), key=lambda t: fmean(t.tokens)).strength


def _questions(questions: Sequence[Question], pairs: Sequence[Pair], count: int, seed: int) -> list[Question]:
    """``count`` of ``questions``, the same for a seed; those that are distilled on only where there are not enough others."""
    distilled = {pair.question.id for pair in pairs}
    others = subsample([q for q in questions if q.id not in distilled], count, seed)
    return others + subsample([q for q in questions if q.id in distilled], count - len(others), seed)
