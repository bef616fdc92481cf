"""What a student could know: the teacher has read the reference, and may ask for what the student has not found yet."""

import itertools
from collections.abc import Sequence

from search_e1.config import Mask
from search_e1.data.answers import normalize_answer
from search_e1.text.tokens import TokenClass
from search_e1.types import ActionKind, Pair, Trajectory


def knowable_turns(pair: Pair) -> list[bool]:
    """For each turn of the student, whether the teacher's next step can be known there.

    That step is the reference's action after as many searches as the student has made. It can be known if all its words occur
    in the question or in what the student has read so far, or if the student has read all passages that the reference had.
    """
    steps = [turn for turn in pair.reference.turns if turn.argument is not None]
    words = set(normalize_answer(pair.question.text).split())
    read: set[str] = set()
    found = []
    for turn, searches in zip(pair.student.turns, _searches_before(pair.student), strict=True):
        step = steps[min(searches, len(steps) - 1)]
        needed = {id for earlier in steps[: min(searches, len(steps) - 1)] for id in earlier.passage_ids}
        argument = set(normalize_answer(step.argument or "").split())
        found.append(argument <= words or (bool(needed) and needed <= read))
        words |= set(normalize_answer(turn.observation_text).split())
        read |= set(turn.passage_ids)
    return found


def _searches_before(trajectory: Trajectory) -> list[int]:
    counts, count = [], 0
    for turn in trajectory.turns:
        counts.append(count)
        count += turn.served
    return counts


def knowable_tokens(pair: Pair, classes: Sequence[TokenClass], mask: Mask) -> list[bool]:
    """For each sampled token of the student, of the given classes, whether it is taught.

    ``mask``: ``turns`` leaves out all tokens of a turn whose next step cannot be known, ``answers`` those of its answer alone.
    """
    kinds = iter(classes)
    taught = []
    for turn, known in zip(pair.student.turns, knowable_turns(pair), strict=True):
        for kind in itertools.islice(kinds, len(turn.action_ids)):
            hidden = mask == "turns" or (turn.kind is ActionKind.ANSWER and kind is TokenClass.ANSWER)
            taught.append(known or not hidden)
    return taught
