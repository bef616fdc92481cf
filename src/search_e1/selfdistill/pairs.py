"""From a pool to pairs: which trajectory is shown to the teacher, and which siblings are to learn from it.

How far a sibling b is from the reference a is the edit distance between what they did, divided by the longer one's number
of actions: with A, B the sequences of actions (a search and its query, an answer, a malformed action),

    divergence(a, b) = edit(A, B) / max(|A|, |B|)                                          in [0, 1],

where inserting or deleting an action costs 1, and replacing x by y costs 1 if they are of another kind, else
``1 - |W(x) & W(y)| / |W(x) | W(y)|`` with W the set of words of the argument after EM's normalization.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from search_e1.config import PairsConfig
from search_e1.data.answers import normalize_answer
from search_e1.text.reference import RenderedReference
from search_e1.types import Group, Pair, Question, Record, StopReason, Trajectory, Turn

VERBOSE = 1.25
"""A correct sibling with as many searches as the reference is less efficient from this many times its sampled tokens on."""

Gold = Callable[[Question], list[Trajectory]]
"""A question's demonstrations; none is an empty list."""

Render = Callable[[Question, Trajectory, Trajectory], RenderedReference | None]
"""From a question, a reference and a student to what the teacher sees; ``None`` if that cannot be made to fit."""


class PoolHealth(Record):
    """What a pool held and what became of it. Counts are of questions unless they say otherwise; means are 0 of nothing."""

    questions: int
    trajectories: int
    never_correct: int
    """Without a pair: no trajectory is correct, so there is nothing to show."""
    no_demonstration: int = 0
    """Without a pair: references are demonstrations, and there is none."""
    too_many_searches: int = 0
    """Without a pair: the reference has more searches than ``pairs.max_searches``."""
    nothing_to_learn: int
    """Without a pair: no sibling is one to learn from its reference."""
    none_fits: int
    """Without a pair: those that there were are all too long."""
    usable: int
    """With at least one pair; ``questions`` is the sum of this and the counts without a pair."""
    all_correct: int
    """Every trajectory is correct, usable or not."""
    pairs: int
    wrong_students: int
    """Pairs whose student is wrong; the other students are correct and less efficient."""
    shortened: int
    """Pairs whose teacher sees a reference without some of its passages, so that the prompt fits."""
    too_long: int
    """Pairs that were left out because no reference that may be shown fits; the next sibling took their place, if any."""
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


_COUNTS = (
    "questions", "all_correct", "never_correct", "no_demonstration", "too_many_searches", "nothing_to_learn", "none_fits",
    "usable", "too_long",
)  # fmt: skip


class _Figures(NamedTuple):
    """What is kept of a trajectory, so that a pool need not be in memory."""

    reward: float
    searches: int
    tokens: int
    stop_reason: StopReason


def select(
    groups: Iterable[Group], config: PairsConfig, render: Render, *, seed: int = 0, gold: Gold | None = None
) -> tuple[list[Pair], PoolHealth]:
    """The pairs of a pool, in the order of its groups, and what the pool was like.

    With ``gold`` demonstrations are the references, and no trajectory of the pool is one. What is drawn at random depends on
    ``seed`` and the question's id alone, not on the other groups.
    """
    pairs: list[Pair] = []
    sampled: list[_Figures] = []
    counts = dict.fromkeys(_COUNTS, 0)
    for group in groups:
        sampled += [_Figures(float(t.correct), t.searches, t.sampled_tokens, t.stop_reason) for t in group.trajectories]
        counts["questions"] += 1
        counts["all_correct"] += all(t.correct for t in group.trajectories)
        reference = next(iter(gold(group.question)), None) if gold else group.reference
        hard = reference is not None and config.max_searches is not None and reference.searches > config.max_searches
        made, too_long = _pairs(group, reference, config, render, seed) if reference and not hard else ([], 0)
        pairs += made
        counts["too_long"] += too_long
        if hard:
            counts["too_many_searches"] += 1
        elif made:
            counts["usable"] += 1
        elif too_long:
            counts["none_fits"] += 1
        else:
            counts["nothing_to_learn" if reference else "no_demonstration" if gold else "never_correct"] += 1
    return pairs, _health(sampled, pairs, counts)


def _pairs(group: Group, reference: Trajectory, config: PairsConfig, render: Render, seed: int) -> tuple[list[Pair], int]:
    """The pairs of a group, and how many were too long."""
    pairs: list[Pair] = []
    too_long = 0
    for student in find_students(group, reference, config, seed):
        if len(pairs) == config.students:
            break
        rendered = render(group.question, reference, student)
        if rendered is None:
            too_long += 1
            continue
        pairs.append(
            Pair(
                question=group.question,
                reference=reference,
                student=student,
                reference_shown=None if rendered.text == reference.text else rendered.text,
                shortened=rendered.shortened,
                teacher_prompt_ids=rendered.prompt_ids,
            )
        )
    return pairs, too_long


def find_students(group: Group, reference: Trajectory, config: PairsConfig, seed: int = 0) -> list[Trajectory]:
    """Every sibling that may learn from ``reference``, the one to prefer first.

    By ``wrong_first``: the wrong siblings, then the correct but less efficient ones (more searches, or ``VERBOSE`` times the
    sampled tokens), within each the most divergent first (ties: the order in the group). One of siblings with the same ids
    is enough.

    By ``any``: every member of the group in random order, as often as it was sampled, the reference too, so that students are
    distributed as the policy's own trajectories are. Mistakes alone show the student the states in which the teacher says no,
    never those that look the same to the student and in which the teacher says yes.
    """
    if config.students_by == "any":
        students = [t for t in group.trajectories if t.turns]
        random.Random(f"{seed}/student/{group.question.id}").shuffle(students)
        return students
    students = [t for t in _distinct(group) if t.turns and (not t.correct or _less_efficient(t, reference))]
    students.sort(key=lambda t: (t.correct, -divergence(reference, t)))
    return students


def _distinct(group: Group) -> list[Trajectory]:
    distinct: dict[tuple[int, ...], Trajectory] = {}
    for trajectory in group.trajectories:
        distinct.setdefault(trajectory.response_ids, trajectory)
    return list(distinct.values())


def _less_efficient(sibling: Trajectory, reference: Trajectory) -> bool:
    return sibling.searches > reference.searches or sibling.sampled_tokens >= VERBOSE * reference.sampled_tokens


class Step(NamedTuple):
    """Two actions side by side: what replacing ``a`` by ``b`` costs, or 1 where one of them is missing."""

    a: Turn | None
    b: Turn | None
    cost: float


_Way = tuple[float, int, list[Step]]
"""Cost, steps without a partner, steps."""


def divergence(a: Trajectory, b: Trajectory) -> float:
    """How differently two trajectories acted, in [0, 1]; the module's head has the formula."""
    return sum(step.cost for step in align(a, b)) / max(len(a.turns), len(b.turns), 1)


def align(a: Trajectory, b: Trajectory) -> list[Step]:
    """The cheapest way from the actions of ``a`` to those of ``b``, in order; of equally cheap ones the one that keeps most
    actions side by side."""
    ways: list[list[_Way]] = []  # for each pair of prefixes
    for i in range(len(a.turns) + 1):
        ways.append([])
        for j in range(len(b.turns) + 1):
            options: list[_Way] = [] if i or j else [(0.0, 0, [])]
            if i and j:
                x, y = a.turns[i - 1], b.turns[j - 1]
                options.append(_longer(ways[i - 1][j - 1], Step(x, y, _replacement(x, y))))
            if i:
                options.append(_longer(ways[i - 1][j], Step(a.turns[i - 1], None, 1.0)))
            if j:
                options.append(_longer(ways[i][j - 1], Step(None, b.turns[j - 1], 1.0)))
            ways[i].append(min(options, key=lambda way: way[:2]))
    return ways[-1][-1][2]


def _longer(way: _Way, step: Step) -> _Way:
    cost, missing, steps = way
    return cost + step.cost, missing + (step.a is None or step.b is None), [*steps, step]


def _replacement(x: Turn, y: Turn) -> float:
    if x.kind is not y.kind:
        return 1.0
    words_x, words_y = (set(normalize_answer(turn.argument or "").split()) for turn in (x, y))
    union = words_x | words_y
    return 1 - len(words_x & words_y) / len(union) if union else 0.0


def _health(sampled: Sequence[_Figures], pairs: Sequence[Pair], counts: dict[str, int]) -> PoolHealth:
    references, students = [p.reference for p in pairs], [p.student for p in pairs]
    stop_reasons = Counter(t.stop_reason for t in sampled)
    return PoolHealth(
        **counts,
        trajectories=len(sampled),
        pairs=len(pairs),
        wrong_students=sum(not t.correct for t in students),
        shortened=sum(pair.shortened for pair in pairs),
        em=_mean(t.reward for t in sampled),
        searches=_mean(t.searches for t in sampled),
        tokens=_mean(t.tokens for t in sampled),
        reference_searches=_mean(t.searches for t in references),
        reference_tokens=_mean(t.sampled_tokens for t in references),
        student_searches=_mean(t.searches for t in students),
        student_tokens=_mean(t.sampled_tokens for t in students),
        divergence=_mean(divergence(p.reference, p.student) for p in pairs),
        stop_reasons={reason: stop_reasons[reason] for reason in StopReason},
    )


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return fmean(values) if values else 0.0
