"""Behavior of a policy before and after its cold start, on a few training questions answered greedily."""

from collections.abc import Mapping, Sequence

from search_e1.rollout.demonstrations.forms import Lesson
from search_e1.runs.context import StageContext
from search_e1.stages.greedy import answer_greedily
from search_e1.stages.inputs import Inputs, subsample
from search_e1.training.policy import Policy
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Question, StopReason, Trajectory

FIGURES = ("malformed", "searching", "em")


def questions_of(questions: Sequence[Question], lessons: Sequence[Lesson], count: int, seed: int) -> list[Question]:
    """A random subset of at most ``count`` questions; those with a lesson only if there are too few others."""
    taught = {lesson.question.id for lesson in lessons}
    others, rest = ([q for q in questions if (q.id in taught) is known] for known in (False, True))
    chosen = subsample(others, count, seed) if count else []
    return chosen + (subsample(rest, count - len(chosen), seed) if count > len(chosen) else [])


def measure(
    run: Inputs, trained: TrainedPolicy, policy: Policy, questions: Sequence[Question], name: str, context: StageContext
) -> Mapping[str, float]:
    """Shares of trajectories that end malformed, that search, and that are correct. Trajectories are written to ``name`` in
    ``context.out`` and reused from there. All ranks must call it.

    Raises:
        Stopped: a signal asked to stop.
        RetrievalError: from the retriever.
    """
    indicators = [_indicators(t) for t in answer_greedily(run, trained, policy, questions, name, context)]
    return {name: sum(one[name] for one in indicators) / len(questions) for name in FIGURES}


def _indicators(trajectory: Trajectory) -> Mapping[str, float]:
    malformed = trajectory.stop_reason is StopReason.MALFORMED
    return dict(malformed=malformed, searching=trajectory.searches > 0, em=trajectory.correct)
