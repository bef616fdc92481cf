"""From a pool to pairs: which trajectory is shown to the teacher, and which siblings are to learn from it.

How far a sibling b is from the reference a is the edit distance between what they did, divided by the longer one's number
of actions: with A, B the sequences of actions (a search and its query, an answer, a malformed action),

    divergence(a, b) = edit(A, B) / max(|A|, |B|)                                          in [0, 1],

where inserting or deleting an action costs 1, and replacing x by y costs 1 if they are of another kind, else
``1 - |W(x) & W(y)| / |W(x) | W(y)|`` with W the set of words of the argument after EM's normalisation.
"""

from collections.abc import Iterable, Sequence
from statistics import fmean

from search_e1.config import PairsConfig
from search_e1.scoring import normalize_answer
from search_e1.types import Group, Pair, Record, StopReason, Trajectory, Turn

VERBOSE = 1.25
"""A correct sibling with as many searches as the reference is less efficient from this many times its sampled tokens on."""


class PoolHealth(Record):
    """What a pool held and what became of it. Counts are of questions unless they say otherwise; means are 0 of nothing."""

    questions: int
    trajectories: int
    never_correct: int
    """Without a pair: no trajectory is correct, so there is nothing to show."""
    nothing_to_learn: int
    """Without a pair: no sibling is wrong, and none is less efficient than the reference."""
    usable: int
    """With at least one pair; ``questions == never_correct + nothing_to_learn + usable``."""
    all_correct: int
    """Every trajectory is correct, usable or not."""
    pairs: int
    wrong_students: int
    """Pairs whose student is wrong; the other students are correct and less efficient."""
    em: float
    """Of all trajectories, like the next two."""
    searches: float
    tokens: float
    """Sampled tokens of a trajectory."""
    reference_searches: float
    """Of the pairs' references, like the next."""
    reference_tokens: float
    student_searches: float
    student_tokens: float
    divergence: float
    """Mean over pairs."""
    stop_reasons: dict[StopReason, int]
    """Of all trajectories."""


def select(groups: Iterable[Group], config: PairsConfig) -> tuple[list[Pair], PoolHealth]:
    """The pairs of a pool, in the order of its groups, and what the pool was like.

    The reference is ``Group.reference``: correct, with the fewest searches. Its students are at most ``config.students``
    siblings: wrong ones first, then correct ones that are less efficient; within each the most divergent first. Of
    siblings with the same ids one is enough. Remaining ties go by the order in the group.
    """
    groups = list(groups)
    pairs: list[Pair] = []
    never_correct = nothing_to_learn = 0
    for group in groups:
        reference = group.reference
        students = find_students(group, reference)[: config.students] if reference else []
        never_correct += reference is None
        nothing_to_learn += reference is not None and not students
        if reference:
            pairs += [Pair(question=group.question, reference=reference, student=student) for student in students]
    return pairs, _health(groups, pairs, never_correct, nothing_to_learn)


def find_students(group: Group, reference: Trajectory) -> list[Trajectory]:
    """Every sibling that teaches something, the one to prefer first."""
    distinct: dict[tuple[int, ...], Trajectory] = {}
    for trajectory in group.trajectories:
        distinct.setdefault(trajectory.response_ids, trajectory)
    siblings = [t for t in distinct.values() if t.turns and (not t.correct or _less_efficient(t, reference))]
    return sorted(siblings, key=lambda t: (t.correct, -divergence(reference, t)))


def _less_efficient(sibling: Trajectory, reference: Trajectory) -> bool:
    return sibling.searches > reference.searches or sibling.sampled_tokens >= VERBOSE * reference.sampled_tokens


def divergence(a: Trajectory, b: Trajectory) -> float:
    """How differently two trajectories acted, in [0, 1]; the module's head has the formula."""
    if not a.turns or not b.turns:
        return float(bool(a.turns) != bool(b.turns))
    previous = [float(j) for j in range(len(b.turns) + 1)]
    for i, x in enumerate(a.turns, 1):
        row = [float(i)]
        for j, y in enumerate(b.turns, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + _replacement(x, y)))
        previous = row
    return previous[-1] / max(len(a.turns), len(b.turns))


def _replacement(x: Turn, y: Turn) -> float:
    if x.kind is not y.kind:
        return 1.0
    words_x, words_y = (set(normalize_answer(turn.argument or "").split()) for turn in (x, y))
    union = words_x | words_y
    return 1 - len(words_x & words_y) / len(union) if union else 0.0


def _health(groups: Sequence[Group], pairs: Sequence[Pair], never_correct: int, nothing_to_learn: int) -> PoolHealth:
    trajectories = [t for group in groups for t in group.trajectories]
    references, students = [p.reference for p in pairs], [p.student for p in pairs]
    stop_reasons = [t.stop_reason for t in trajectories]
    return PoolHealth(
        questions=len(groups),
        trajectories=len(trajectories),
        never_correct=never_correct,
        nothing_to_learn=nothing_to_learn,
        usable=len(groups) - never_correct - nothing_to_learn,
        all_correct=sum(all(t.correct for t in group.trajectories) for group in groups),
        pairs=len(pairs),
        wrong_students=sum(not t.correct for t in students),
        em=_mean(t.reward for t in trajectories),
        searches=_mean(t.searches for t in trajectories),
        tokens=_mean(t.sampled_tokens for t in trajectories),
        reference_searches=_mean(t.searches for t in references),
        reference_tokens=_mean(t.sampled_tokens for t in references),
        student_searches=_mean(t.searches for t in students),
        student_tokens=_mean(t.sampled_tokens for t in students),
        divergence=_mean(divergence(p.reference, p.student) for p in pairs),
        stop_reasons={reason: stop_reasons.count(reason) for reason in StopReason},
    )


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return fmean(values) if values else 0.0
