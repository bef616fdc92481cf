"""Which teacher actions a student could have inferred: the teacher has seen the reference, the student only its own turns."""

import itertools
from collections.abc import Sequence

from search_e1.config import Mask
from search_e1.data.answers import normalize_answer
from search_e1.text.tokens import TokenClass
from search_e1.types import ActionKind, Pair, Trajectory


def knowable_turns(pair: Pair) -> list[bool]:
    """For each turn of the student, whether the teacher's next step is knowable to the student.

    The teacher's next step is the reference's action after the same number of searches. It is knowable if all its words occur
    in the question or in the student's observations so far, or if the student has read every passage that the reference had
    read by then.
    """
    steps = [turn for turn in pair.reference.turns if turn.argument is not None]
    words = set(normalize_answer(pair.question.text).split())
    read: set[str] = set()
    knowable = []
    for turn, searches in zip(pair.student.turns, _searches_before(pair.student), strict=True):
        step = steps[min(searches, len(steps) - 1)]
        needed = {id for earlier in steps[: min(searches, len(steps) - 1)] for id in earlier.passage_ids}
        argument = set(normalize_answer(step.argument or "").split())
        knowable.append(argument <= words or (bool(needed) and needed <= read))
        words |= set(normalize_answer(turn.observation_text).split())
        read |= set(turn.passage_ids)
    return knowable


def _searches_before(trajectory: Trajectory) -> list[int]:
    counts, count = [], 0
    for turn in trajectory.turns:
        counts.append(count)
        count += turn.served
    return counts


def knowable_tokens(pair: Pair, classes: Sequence[TokenClass], mask: Mask) -> list[bool]:
    """For each sampled token of the student, whether it stays in the loss; ``classes`` are the tokens' classes.

    ``mask``: ``turns`` drops all tokens of a turn whose next step is not knowable, ``answers`` only its answer tokens.
    """
    kinds = iter(classes)
    kept = []
    for turn, known in zip(pair.student.turns, knowable_turns(pair), strict=True):
        for kind in itertools.islice(kinds, len(turn.action_ids)):
            hidden = mask == "turns" or (turn.kind is ActionKind.ANSWER and kind is TokenClass.ANSWER)
            kept.append(known or not hidden)
    return kept
