"""Failure classes: exactly one for every wrong answer.

Classes are tried in the order of ``Failure``, and the first that applies wins: first what no policy could change, then how
the trajectory ended, then the evidence behind the answer.
"""

from enum import StrEnum

from search_e1.data.answers import normalize_answer
from search_e1.types import ActionKind, StopReason, Trajectory


class Failure(StrEnum):
    """Why an answer is wrong, in the order of decision. "Read" refers to passages as the policy saw them."""

    NOT_IN_CORPUS = "not_in_corpus"
    """No passage of the corpus contains an answer."""
    REFUSED = "refused"
    """No answer: an endpoint's content filter refused the question or the retrieved passages."""
    FORMAT = "format"
    """No answer: the last generation was neither a search nor an answer."""
    REPEATED_SEARCH = "repeated_search"
    """A query was repeated, and there is no answer, or an answer outside the four classes after ``BUDGET``."""
    BUDGET = "budget"
    """No answer: searches or tokens ran out."""
    YES_NO = "yes_no"
    """The right answer is yes or no, and the policy answered something else."""
    INVENTED = "invented"
    """The documents hold no answer, and the policy gave one."""
    WORDING = "wording"
    """The answer contains a right answer as whole words, plus other words."""
    NOT_READ_OUT = "not_read_out"
    """A right answer was read, and the policy gave another."""
    NO_SEARCH = "no_search"
    """The policy answered without a search."""
    NOT_RETRIEVED = "not_retrieved"
    """The policy searched, and nothing it read contains an answer."""


def classify(
    trajectory: Trajectory,
    *,
    covers: bool,
    yes_no: bool,
    read: bool | None,
    in_corpus: bool | None,
    unanswerable: bool = False,
) -> Failure | None:
    """The class of ``trajectory``; ``None`` if its answer is right.

    Args:
        covers: the answer contains a right one.
        yes_no: the right answers are yes or no.
        read: a passage that the policy read contains an answer; ``None`` for yes/no and unanswerable questions.
        in_corpus: some passage of the corpus contains an answer; ``None`` if unknown.
        unanswerable: the documents hold no answer.
    """
    if trajectory.correct:
        return None
    # A server may have passages that the corpus file lacks, so what was read takes precedence.
    if in_corpus is False and not read:
        return Failure.NOT_IN_CORPUS
    if trajectory.stop_reason is StopReason.REFUSED:
        return Failure.REFUSED
    if trajectory.stop_reason is StopReason.MALFORMED:
        return Failure.FORMAT
    answered = trajectory.stop_reason is StopReason.ANSWERED
    if not (answered and (yes_no or unanswerable or covers or read)) and repeats(trajectory):
        return Failure.REPEATED_SEARCH
    if not answered:
        return Failure.BUDGET
    if yes_no:
        return Failure.YES_NO
    if unanswerable and not covers:
        return Failure.INVENTED
    if covers:
        return Failure.WORDING
    if read:
        return Failure.NOT_READ_OUT
    return Failure.NOT_RETRIEVED if trajectory.searches else Failure.NO_SEARCH


def repeats(trajectory: Trajectory) -> bool:
    """Whether a query was repeated, ignoring case, punctuation, articles and white space; unserved queries count."""
    queries = [normalize_answer(turn.argument or "") for turn in trajectory.turns if turn.kind is ActionKind.SEARCH]
    return len(set(queries)) < len(queries)
