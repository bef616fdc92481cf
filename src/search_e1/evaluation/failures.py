"""Failure classes: exactly one for every wrong answer.

The classes are tried in the order of ``Failure`` and the first that applies is taken: first what no policy could change, then
how the trajectory ended, then the evidence that the answer was based on.
"""

from enum import StrEnum

from search_e1.data.answers import normalize_answer
from search_e1.types import ActionKind, StopReason, Trajectory


class Failure(StrEnum):
    """In the order of decision. "Read": a passage, as the policy read it, contains an answer."""

    NOT_IN_CORPUS = "not_in_corpus"
    """No passage of the corpus contains an answer."""
    REFUSED = "refused"
    """No answer: an endpoint's content filter refused the question, or what was found."""
    FORMAT = "format"
    """No answer: the last generation was neither a search nor an answer."""
    REPEATED_SEARCH = "repeated_search"
    """A query was repeated, and the policy gave no answer, or one that is none of the four classes after ``BUDGET``."""
    BUDGET = "budget"
    """No answer: searches or tokens ran out."""
    YES_NO = "yes_no"
    """The answer is yes or no, and the policy said something else."""
    INVENTED = "invented"
    """The documents hold no answer, and the policy gave one."""
    WORDING = "wording"
    """The answer contains a right one as whole words, and more."""
    NOT_READ_OUT = "not_read_out"
    """An answer was read, and the policy gave another."""
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
        covers: its answer contains a right one.
        yes_no: the right answers are yes or no.
        read: a passage that it read contains an answer; ``None`` for yes/no questions and unanswerable ones.
        in_corpus: some passage of the corpus does; ``None`` if unknown.
        unanswerable: the right answer is that there is none.
    """
    if trajectory.correct:
        return None
    # A server may hold passages that the corpus file lacks, so what was read decides.
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
    """Whether a query was repeated, up to case, punctuation, articles and white space; unserved ones count."""
    queries = [normalize_answer(turn.argument or "") for turn in trajectory.turns if turn.kind is ActionKind.SEARCH]
    return len(set(queries)) < len(queries)
