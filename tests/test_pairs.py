"""Which trajectory is shown, and who learns from it."""

from zlib import crc32

import pytest
from pydantic import ValidationError

from search_e1.config import PairsConfig
from search_e1.errors import DataError
from search_e1.selfdistill.files import check_tokenizer
from search_e1.selfdistill.pairs import align, divergence, select
from search_e1.text.reference import RenderedReference
from search_e1.types import ActionKind, Group, Pair, Question, StopReason, Trajectory, Turn

QUESTION = Question(id="q", text="Who is the mayor of Bel?", answers=("Cor Dun",))


def search(query: str, tokens: int = 3) -> Turn:
    text = f"<search>{query}</search>"
    return Turn(
        action_ids=(1, crc32(query.encode()), *range(tokens - 2)),
        action_text=text,
        kind=ActionKind.SEARCH,
        argument=query,
        observation_ids=(7, 8),
        observation_text="(seen)",
        passage_ids=("p",),
    )


def answer(text: str, tokens: int = 3) -> Turn:
    ids = (2, crc32(text.encode()), *range(tokens - 2))
    return Turn(action_ids=ids, action_text=f"<answer>{text}</answer>", kind=ActionKind.ANSWER, argument=text)


MALFORMED = Turn(action_ids=(3, 4), action_text="hm", kind=ActionKind.MALFORMED)


def trajectory(*turns: Turn, question: str = "q") -> Trajectory:
    final = turns[-1].argument if turns and turns[-1].kind is ActionKind.ANSWER else None
    reward = float(final == "Cor Dun")
    stop = StopReason.MALFORMED if final is None else StopReason.ANSWERED
    return Trajectory(question_id=question, prompt_ids=(9,), turns=turns, stop_reason=stop, answer=final, reward=reward)


def whole(question: Question, reference: Trajectory, student: Trajectory) -> RenderedReference:
    """All of the reference, in a prompt that tells who is shown what."""
    return RenderedReference(reference.text, (len(question.text), len(reference.turns), len(student.turns)))


def group(*trajectories: Trajectory) -> Group:
    return Group(question=QUESTION, trajectories=trajectories)


def students_of(*trajectories: Trajectory, students: int = 9, **config) -> list[Trajectory]:
    pairs, _ = select([group(*trajectories)], PairsConfig(students=students, **config), whole)
    return [pair.student for pair in pairs]


SHORT = trajectory(search("mayor bel"), answer("Cor Dun"))
LONG = trajectory(search("bel"), search("mayor"), search("mayor bel"), answer("Cor Dun"))
WRONG_NEAR = trajectory(search("mayor bel"), answer("Cor"))
WRONG_FAR = trajectory(search("fen"), search("eth"), answer("Hor"))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (SHORT, SHORT, 0.0),
        # The answers {cor, dun} and {cor} share one of two words: 1/2 over 2 actions.
        (SHORT, WRONG_NEAR, 0.25),
        # An insertion, a search with no word in common, another answer: 3 over 3 actions.
        (SHORT, WRONG_FAR, 1.0),
        # Two searches inserted before equal ones: 2 over 4.
        (SHORT, LONG, 0.5),
        # An answer in place of a malformed action is a replacement of kind (1), the search is deleted (1): 2 over 2.
        (SHORT, trajectory(MALFORMED), 1.0),
        # Case, articles and punctuation do not count.
        (SHORT, trajectory(search("the Mayor, Bel"), answer("Cor Dun")), 0.0),
        (SHORT, trajectory(), 1.0),
        (trajectory(), trajectory(), 0.0),
    ],
)
def test_divergence_by_hand(a, b, expected):
    assert divergence(a, b) == pytest.approx(expected)
    assert divergence(b, a) == pytest.approx(expected)


def test_the_reference_has_fewest_searches_then_fewest_tokens():
    wordy = trajectory(search("mayor bel"), answer("Cor Dun", tokens=30))
    pairs, _ = select([group(WRONG_FAR, LONG, wordy, SHORT)], PairsConfig(), whole)
    assert [(p.reference, p.student) for p in pairs] == [(SHORT, WRONG_FAR)]


def test_wrong_students_first_most_divergent_first():
    assert students_of(SHORT, LONG, WRONG_NEAR, WRONG_FAR) == [WRONG_FAR, WRONG_NEAR, LONG]
    assert students_of(SHORT, LONG, WRONG_NEAR, WRONG_FAR, students=2) == [WRONG_FAR, WRONG_NEAR]


def test_a_correct_sibling_must_be_less_efficient():
    as_good = trajectory(search("bel"), answer("Cor Dun", tokens=4))  # 7 sampled tokens against 6: under 1.25 times
    wordy = trajectory(search("bel"), answer("Cor Dun", tokens=5))  # 8: over
    assert students_of(SHORT, as_good) == []
    assert students_of(SHORT, as_good, wordy) == [wordy]


def test_equal_siblings_count_once_and_empty_ones_not_at_all():
    assert students_of(SHORT, WRONG_NEAR, WRONG_NEAR, trajectory(), SHORT) == [WRONG_NEAR]


def test_ties_go_by_the_order_in_the_group():
    other = trajectory(search("ion"), search("ion"), answer("Gil"))
    assert students_of(SHORT, other, WRONG_FAR) == [other, WRONG_FAR]
    assert students_of(SHORT, WRONG_FAR, other) == [WRONG_FAR, other]


def test_references_with_more_searches_than_asked_for_are_left_out_and_counted():
    two = trajectory(search("bel"), search("mayor bel"), answer("Cor Dun"))
    groups = [group(SHORT, WRONG_FAR), group(two, WRONG_FAR)]
    pairs, health = select(groups, PairsConfig(max_searches=1), whole)
    assert [pair.reference for pair in pairs] == [SHORT]
    assert (health.usable, health.too_many_searches, health.nothing_to_learn) == (1, 1, 0)
    pairs, health = select(groups, PairsConfig(max_searches=2), whole)
    assert (len(pairs), health.too_many_searches) == (2, 0)


def test_health():
    groups = [
        group(SHORT, WRONG_FAR, LONG, WRONG_NEAR),
        group(WRONG_FAR, trajectory(MALFORMED)),
        group(SHORT, SHORT),
        group(SHORT, LONG),
    ]
    pairs, health = select(iter(groups), PairsConfig(), whole)
    assert len(pairs) == 2
    assert (health.questions, health.trajectories, health.pairs, health.wrong_students) == (4, 10, 2, 1)
    assert (health.never_correct, health.nothing_to_learn, health.usable, health.all_correct) == (1, 1, 2, 2)
    assert health.em == pytest.approx(6 / 10)
    assert health.searches == pytest.approx((1 + 2 + 3 + 1 + 2 + 0 + 1 + 1 + 1 + 3) / 10)
    assert health.tokens == pytest.approx((6 + 9 + 12 + 6 + 9 + 2 + 6 + 6 + 6 + 12) / 10)
    assert (health.reference_searches, health.student_searches) == (1, 2.5)
    assert (health.reference_tokens, health.student_tokens) == (6, 10.5)
    assert health.divergence == pytest.approx((1.0 + 0.5) / 2)
    assert health.stop_reasons[StopReason.ANSWERED] == 9
    assert health.stop_reasons[StopReason.MALFORMED] == 1
    assert (health.none_fits, health.too_long, health.shortened) == (0, 0, 0)
    assert select(groups, PairsConfig(), whole) == (pairs, health)


def test_an_empty_pool_has_no_pairs():
    pairs, health = select([], PairsConfig(), whole)
    assert pairs == []
    assert (health.questions, health.pairs, health.em) == (0, 0, 0.0)


def test_any_of_the_group_learns_as_often_as_it_was_sampled():
    again = trajectory(*SHORT.turns)
    students = students_of(SHORT, again, again, WRONG_FAR, trajectory(), students=8, students_by="any")
    assert sorted(map(id, students)) == sorted(map(id, [SHORT, again, again, WRONG_FAR]))


def test_random_students_depend_on_the_seed_and_the_question_alone():
    siblings = [trajectory(search(f"query {i}"), answer("Cor")) for i in range(8)]
    config = PairsConfig(students=9, students_by="any")

    def order(seed: int, *before: Group) -> list[Trajectory]:
        pairs, _ = select([*before, group(SHORT, *siblings)], config, whole, seed=seed)
        return [pair.student for pair in pairs][-9:]

    assert sorted(map(id, order(1))) == sorted(map(id, [SHORT, *siblings]))
    assert order(1) == order(1) == order(1, group(SHORT, WRONG_FAR))
    assert order(1) != order(2)


def test_a_pair_holds_what_the_teacher_reads():
    (pair,), _ = select([group(SHORT, WRONG_FAR)], PairsConfig(), whole)
    assert (pair.question, pair.reference, pair.student) == (QUESTION, SHORT, WRONG_FAR)
    assert (pair.reference_shown, pair.shortened) == (None, False)
    assert pair.teacher_prompt_ids == (len(QUESTION.text), 2, 3)


def test_a_sibling_that_does_not_fit_makes_room_for_the_next():
    def render(question, reference, student):
        if student == WRONG_FAR:
            return None
        return RenderedReference("cut", (7,), True) if student == WRONG_NEAR else RenderedReference(reference.text, (8, 9))

    fits, health = select([group(SHORT, LONG, WRONG_NEAR, WRONG_FAR)], PairsConfig(students=2), render)
    assert [(p.student, p.reference_shown, p.shortened, p.teacher_prompt_ids) for p in fits] == [
        (WRONG_NEAR, "cut", True, (7,)),
        (LONG, None, False, (8, 9)),
    ]
    assert (health.usable, health.none_fits, health.too_long, health.shortened) == (1, 0, 1, 1)
    pairs, health = select([group(SHORT, WRONG_FAR), group(WRONG_FAR)], PairsConfig(), render)
    assert pairs == []
    assert (health.none_fits, health.too_long, health.never_correct, health.nothing_to_learn) == (1, 1, 1, 0)
    assert health.questions == health.never_correct + health.nothing_to_learn + health.none_fits + health.usable


def test_actions_side_by_side():
    def brief(steps):
        return [(s.a and s.a.argument, s.b and s.b.argument, s.cost) for s in steps]

    assert brief(align(SHORT, LONG)) == [
        (None, "bel", 1), (None, "mayor", 1), ("mayor bel", "mayor bel", 0), ("Cor Dun", "Cor Dun", 0),
    ]  # fmt: skip
    assert brief(align(SHORT, WRONG_NEAR)) == [("mayor bel", "mayor bel", 0), ("Cor Dun", "Cor", 0.5)]
    # Replacing costs as much as leaving out and putting in one action less; it keeps them side by side.
    assert brief(align(trajectory(search("x"), MALFORMED), trajectory(search("y"), MALFORMED)))[0] == ("x", "y", 1)


class Words:
    """Ids 1 and 2 are words, 3 none."""

    def decode(self, ids, **_):
        return " ".join({1: "a", 2: "b"}[i] for i in ids)


def test_ids_of_another_tokenizer_are_refused():
    def said(*ids: int) -> Trajectory:
        turn = Turn(action_ids=ids, action_text="a b", kind=ActionKind.MALFORMED)
        return Trajectory(question_id="q7", prompt_ids=(9,), turns=(turn,), stop_reason=StopReason.MALFORMED)

    check_tokenizer(Words(), [said(1, 2)], "pairs-1")
    for ids in ((2, 1), (1, 3)):
        with pytest.raises(DataError, match="pairs-1: sampled with another tokenizer: the ids of question 'q7'") as refused:
            check_tokenizer(Words(), [said(1, 2), said(*ids)], "pairs-1")
        assert "\n" not in str(refused.value)


def test_a_pair_across_questions_or_with_a_wrong_reference_is_none():
    stranger = trajectory(*SHORT.turns, question="other")
    for changes, message in (
        ({"reference": stranger}, "a pair across questions"),
        ({"student": stranger}, "a pair across questions"),
        ({"reference": WRONG_NEAR}, "a reference that is not correct"),
    ):
        with pytest.raises(ValidationError, match=message):
            Pair(**{"question": QUESTION, "reference": SHORT, "student": WRONG_FAR, **changes})
