"""The strength at which a distilled adapter is merged, chosen on training questions that were not distilled on."""

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
    """The policy's results per question, with its adapter scaled by ``strength``."""

    strength: float
    rewards: Sequence[float]
    tokens: Sequence[float]
    """Sampled tokens."""


def choose_strength(
    run: Inputs, trained: TrainedPolicy, policy: Policy, pairs: Sequence[Pair], context: StageContext
) -> Mapping[str, Any]:
    """Scale the adapter by the best of the strengths in ``distill.merge`` (see ``best``). All ranks must call it.

    The policy answers the same training questions greedily at each strength; trajectories go to ``merge-STRENGTH.jsonl``.

    Returns:
        The chosen strength, and for each strength EM (mean reward) and sampled tokens per question.

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

    The standard error is that of the mean paired difference over questions. One-standard-error rule: Breiman et al.,
    Classification and Regression Trees, 1984.
    """
    top = max(tried, key=lambda t: (fmean(t.rewards), -fmean(t.tokens)))

    def as_good(t: Tried) -> bool:
        losses = [high - own for high, own in zip(top.rewards, t.rewards, strict=True)]
        error = stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
        return fmean(losses) <= error

    return min(filter(as_good, tried), key=lambda t: fmean(t.tokens)).strength


def _questions(questions: Sequence[Question], pairs: Sequence[Pair], count: int, seed: int) -> list[Question]:
    """A random subset of at most ``count`` questions; distilled ones only if there are too few others."""
    distilled = {pair.question.id for pair in pairs}
    others = subsample([q for q in questions if q.id not in distilled], count, seed)
    return others + subsample([q for q in questions if q.id in distilled], count - len(others), seed)
