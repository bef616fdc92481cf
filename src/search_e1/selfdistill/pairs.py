"""Mines a pool for pairs: chooses each question's reference, and the siblings that learn from it.

The divergence of sibling b from reference a is the edit distance of their actions, divided by the number of actions of the
longer one. With A, B the sequences of actions (a search and its query, an answer, a malformed action),

    divergence(a, b) = edit(A, B) / max(|A|, |B|)                                          in [0, 1],

where inserting or deleting an action costs 1, and replacing x by y costs 1 if their kinds differ, else
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
"""A correct sibling is less efficient if it samples at least this many times the reference's tokens."""

Gold = Callable[[Question], list[Trajectory]]
"""Returns a question's demonstrations, possibly none."""

Render = Callable[[Question, Trajectory, Trajectory], RenderedReference | None]
"""Renders a reference for the teacher, given question, reference and student; ``None`` if it cannot fit the context."""


class PoolHealth(Record):
    """Statistics of a pool and of its pairs. Counts are questions unless stated otherwise; a mean of nothing is 0."""

    questions: int
    trajectories: int
    never_correct: int
    """No pair: no trajectory is correct, so there is no reference."""
    no_demonstration: int = 0
    """No pair: references are demonstrations, and the question has none."""
    too_many_searches: int = 0
    """No pair: the reference has more searches than ``pairs.max_searches``."""
    nothing_to_learn: int
    """No pair: no sibling can learn from the reference."""
    none_fits: int
    """No pair: all candidates are too long."""
    usable: int
    """At least one pair; ``questions`` is the sum of this and the counts without a pair."""
    all_correct: int
    """Every trajectory is correct; independent of the other counts."""
    pairs: int
    wrong_students: int
    """Pairs with a wrong student; the other students are correct and less efficient."""
    shortened: int
    """Pairs whose reference was shortened to fit the context."""
    too_long: int
    """Pairs left out because the rendered reference does not fit; replaced by the next sibling, if any."""
    em: float
    """Mean over all trajectories, like the next two."""
    searches: float
    tokens: float
    """Sampled tokens per trajectory."""
    reference_searches: float
    """Mean over the pairs' references, like the next."""
    reference_tokens: float
    student_searches: float
    student_tokens: float
    divergence: float
    """Mean over pairs."""
    stop_reasons: dict[StopReason, int]
    """Counts over all trajectories."""


_COUNTS = (
    "questions", "all_correct", "never_correct", "no_demonstration", "too_many_searches", "nothing_to_learn", "none_fits",
    "usable", "too_long",
)  # fmt: skip


class _Figures(NamedTuple):
    """The figures kept of each trajectory, so that the pool need not be in memory."""

    reward: float
    searches: int
    tokens: int
    stop_reason: StopReason


def select(
    groups: Iterable[Group], config: PairsConfig, render: Render, *, seed: int = 0, gold: Gold | None = None
) -> tuple[list[Pair], PoolHealth]:
    """The pairs of a pool, in the order of its groups, and the pool's health.

    With ``gold``, references are demonstrations instead of trajectories of the pool. Random choices depend on ``seed`` and the
    question's id alone, not on other groups.
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
    """The pairs of a group, and the number of candidates that were too long."""
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
    """Every sibling that may learn from ``reference``, in order of preference.

    ``wrong_first``: wrong siblings, then correct but less efficient ones (more searches, or ``VERBOSE`` times the sampled
    tokens), each most divergent first (ties: group order). Siblings with the same ids count once.

    ``any``: all members of the group in random order, the reference and duplicates included, so that students follow the
    policy's own distribution. Students chosen for their mistakes are taught only in states where the teacher disagrees, never
    in states that look the same to the student and where the teacher agrees.
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
    """Two aligned actions, and the cost of replacing ``a`` by ``b``; 1 if one of them is missing."""

    a: Turn | None
    b: Turn | None
    cost: float


_Alignment = tuple[float, int, list[Step]]
"""Cost, number of steps with a missing action, steps."""


def divergence(a: Trajectory, b: Trajectory) -> float:
    """The divergence of two trajectories in [0, 1]; formula in the module's docstring."""
    return sum(step.cost for step in align(a, b)) / max(len(a.turns), len(b.turns), 1)


def align(a: Trajectory, b: Trajectory) -> list[Step]:
    """The cheapest alignment of the actions of ``a`` and ``b``, in order; ties: the fewest missing actions."""
    best: list[list[_Alignment]] = []  # for each pair of prefixes
    for i in range(len(a.turns) + 1):
        best.append([])
        for j in range(len(b.turns) + 1):
            options: list[_Alignment] = [] if i or j else [(0.0, 0, [])]
            if i and j:
                x, y = a.turns[i - 1], b.turns[j - 1]
                options.append(_extended(best[i - 1][j - 1], Step(x, y, _replacement_cost(x, y))))
            if i:
                options.append(_extended(best[i - 1][j], Step(a.turns[i - 1], None, 1.0)))
            if j:
                options.append(_extended(best[i][j - 1], Step(None, b.turns[j - 1], 1.0)))
            best[i].append(min(options, key=lambda alignment: alignment[:2]))
    return best[-1][-1][2]


def _extended(alignment: _Alignment, step: Step) -> _Alignment:
    cost, missing, steps = alignment
    return cost + step.cost, missing + (step.a is None or step.b is None), [*steps, step]


def _replacement_cost(x: Turn, y: Turn) -> float:
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
