"""How a policy acts before and after its cold start: a few training questions, asked greedily."""

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
    """``count`` of ``questions``, the same for a seed; first those that no lesson is about. Lessons stay as they are."""
    taught = {lesson.question.id for lesson in lessons}
    others, rest = ([q for q in questions if (q.id in taught) is known] for known in (False, True))
    chosen = subsample(others, count, seed) if count else []
    return chosen + (subsample(rest, count - len(chosen), seed) if count > len(chosen) else [])


def measure(
    run: Inputs, trained: TrainedPolicy, policy: Policy, questions: Sequence[Question], name: str, context: StageContext
) -> Mapping[str, float]:
    """Shares of the trajectories that end malformed, that search, and that are correct. The trajectories are written into
    ``name`` in ``context.out``, and are not sampled again where they are there. All ranks call it.

    Raises:
        Stopped: a signal asked to stop.
        RetrievalError: from the retriever.
    """
    counted = [_counted(t) for t in answer_greedily(run, trained, policy, questions, name, context)]
    return {name: sum(one[name] for one in counted) / len(questions) for name in FIGURES}


def _counted(trajectory: Trajectory) -> Mapping[str, float]:
    malformed = trajectory.stop_reason is StopReason.MALFORMED
    return dict(malformed=malformed, searching=trajectory.searches > 0, em=trajectory.correct)
