"""Which trajectory is shown, and who learns from it."""

from zlib import crc32

import pytest
from pydantic import ValidationError

from search_e1.config import PairsConfig
from search_e1.errors import DataError
from search_e1.selfdistill.files import check_tokenizer
from search_e1.selfdistill.pairs import align, divergence, find_references, mismatch, select
from search_e1.text.reference import Shown
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


def group(*trajectories: Trajectory) -> Group:
    return Group(question=QUESTION, trajectories=trajectories)


def students_of(*trajectories: Trajectory, students: int = 9, **config) -> list[Trajectory]:
    pairs, _ = select([group(*trajectories)], PairsConfig(students=students, **config))
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
    pairs, _ = select([group(WRONG_FAR, LONG, wordy, SHORT)], PairsConfig())
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


def test_health():
    groups = [
        group(SHORT, WRONG_FAR, LONG, WRONG_NEAR),
        group(WRONG_FAR, trajectory(MALFORMED)),
        group(SHORT, SHORT),
        group(SHORT, LONG),
    ]
    pairs, health = select(iter(groups), PairsConfig())
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
    assert select(groups, PairsConfig()) == (pairs, health)


def test_an_empty_pool_has_no_pairs():
    pairs, health = select([], PairsConfig())
    assert pairs == []
    assert (health.questions, health.pairs, health.em) == (0, 0, 0.0)


def test_all_wrong_siblings_however_many():
    assert students_of(SHORT, LONG, WRONG_NEAR, WRONG_FAR, students=1, students_by="all_wrong") == [
        WRONG_FAR,
        WRONG_NEAR,
    ]
    assert students_of(SHORT, LONG, students_by="all_wrong") == []


def test_the_longest_first_right_or_wrong():
    assert students_of(SHORT, WRONG_NEAR, WRONG_FAR, LONG, students_by="longest") == [LONG, WRONG_FAR, WRONG_NEAR]
    assert students_of(SHORT, WRONG_NEAR, LONG, students=1, students_by="longest") == [LONG]


def test_random_students_depend_on_the_seed_and_the_question_alone():
    siblings = [trajectory(search(f"query {i}"), answer("Cor")) for i in range(8)]
    config = PairsConfig(students=8, students_by="random")

    def order(seed: int, *before: Group) -> list[Trajectory]:
        pairs, _ = select([*before, group(SHORT, *siblings)], config, seed=seed)
        return [pair.student for pair in pairs][-8:]

    assert sorted(map(siblings.index, order(1))) == list(range(8))
    assert order(1) == order(1) == order(1, group(SHORT, WRONG_FAR))
    assert order(1) != order(2)


def test_any_of_the_group_learns_as_often_as_it_was_sampled():
    again = trajectory(*SHORT.turns)
    students = students_of(SHORT, again, again, WRONG_FAR, students=8, students_by="any")
    assert sorted(map(id, students)) == sorted(map(id, [SHORT, again, again, WRONG_FAR]))


def test_a_random_reference_is_any_correct_one_and_its_students_are_less_efficient_than_it():
    groups = [
        Group(question=Question(id=f"q{i}", text="?", answers=("Cor Dun",)), trajectories=(t(f"q{i}") for t in makers))
        for i in range(30)
        for makers in [(lambda q: trajectory(*SHORT.turns, question=q), lambda q: trajectory(*LONG.turns, question=q))]
    ]
    pairs, health = select(groups, PairsConfig(references_by="random"), seed=1)
    # Shown the long one, the short one has nothing to learn.
    assert {(pair.reference.searches, pair.student.searches) for pair in pairs} == {(1, 3)}
    assert 5 < len(pairs) < 25
    assert health.nothing_to_learn == 30 - len(pairs)


def test_further_references_are_as_efficient_as_the_first_and_no_students():
    twin = trajectory(search("bel mayor of"), answer("Cor Dun"))
    found = find_references(group(LONG, SHORT, SHORT, twin, WRONG_FAR), PairsConfig(references=3))
    assert found == [SHORT, twin]
    pairs, _ = select([group(LONG, SHORT, twin, WRONG_FAR)], PairsConfig(references=3, students=9))
    assert [(p.reference, p.student) for p in pairs] == [
        (SHORT, WRONG_FAR), (SHORT, LONG), (twin, WRONG_FAR), (twin, LONG),
    ]  # fmt: skip
    anyone = PairsConfig(references=3, references_by="random", students=9)
    pairs, _ = select([group(LONG, SHORT, twin, WRONG_FAR)], anyone)
    assert len(pairs) == 3
    assert all(pair.student == WRONG_FAR for pair in pairs)


def test_a_sibling_that_does_not_fit_makes_room_for_the_next():
    def show(question, reference, student):
        return None if student == WRONG_FAR else Shown("cut", True) if student == WRONG_NEAR else Shown(reference.text)

    fits, health = select([group(SHORT, LONG, WRONG_NEAR, WRONG_FAR)], PairsConfig(students=2), show)
    assert [(p.student, p.shown, p.reference_shown, p.shortened) for p in fits] == [
        (WRONG_NEAR, "cut", "cut", True),
        (LONG, SHORT.text, None, False),
    ]
    assert (health.usable, health.none_fits, health.too_long, health.shortened) == (1, 0, 1, 1)
    pairs, health = select([group(SHORT, WRONG_FAR), group(WRONG_FAR)], PairsConfig(), show)
    assert pairs == []
    assert (health.none_fits, health.too_long, health.never_correct, health.nothing_to_learn) == (1, 1, 1, 0)


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
        with pytest.raises(
            DataError, match="pairs-1: sampled with another tokenizer: the ids of question 'q7'"
        ) as refused:
            check_tokenizer(Words(), [said(1, 2), said(*ids)], "pairs-1")
        assert "\n" not in str(refused.value)


def asked(number: int) -> Pair:
    """A pair of a question of its own, whose answer is its number."""
    question = Question(id=f"q{number}", text="Which?", answers=(str(number % 10),))
    right, wrong = (
        trajectory(search(f"which {number}"), answer(text), question=question.id).model_copy(update={"reward": reward})
        for text, reward in ((str(number % 10), 1.0), ("none", 0.0))
    )
    return Pair(question=question, reference=right, student=wrong)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.3, 6), (1.0, 20)])
def test_a_share_of_the_questions_sees_the_reference_of_another_one(share, count):
    pairs = [asked(number) for number in range(20)]
    pairs.append(pairs[3].model_copy(update={"student": pairs[3].student.model_copy(update={"f1": 0.5})}))
    made, left_out = mismatch(pairs, pairs, share, seed=4)
    assert left_out == 0
    assert len({pair.question.id for pair in made if pair.mismatched}) == count
    for before, after in zip(pairs, made, strict=True):
        assert (after.question, after.student) == (before.question, before.student)
        if after.mismatched:
            assert after.reference.question_id != after.question.id
            assert after.reference.answer not in after.question.answers  # q7 and q17 have one answer
            assert after.shown == after.reference.text
        else:
            assert after == before
    assert made[3].reference == made[-1].reference  # of one question
    assert mismatch(pairs, pairs, share, seed=4) == (made, 0)
    others = {pair.question.id for pair in mismatch(pairs, pairs, 1.0, seed=4)[0] if pair.mismatched}
    assert {pair.question.id for pair in made if pair.mismatched} <= others  # a larger share adds to a smaller one
    if count == 6:
        assert mismatch(pairs, pairs, share, seed=5)[0] != made


def test_a_reference_of_another_question_has_to_fit():
    pairs = [asked(number) for number in range(4)]

    def show(question, reference, student):
        return None if question.id == "q0" or reference.question_id == "q3" else Shown("cut", shortened=True)

    made, left_out = mismatch(pairs, pairs, 1.0, show)
    assert [pair.question.id for pair in made] == ["q1", "q2", "q3"]
    assert left_out == 1
    assert {(pair.shown, pair.shortened) for pair in made} == {("cut", True)}
    assert "q3" not in {pair.reference.question_id for pair in made}
    with pytest.raises(DataError, match=r"pairs.mismatched = 1: no other question has a reference with another answer"):
        mismatch(pairs[:1], pairs[:1], 1.0)


def test_a_pair_across_questions_must_say_so():
    one, other = asked(1), asked(2)
    for changes in ({"reference": other.reference}, {"mismatched": True}, {"student": other.student}):
        with pytest.raises(ValidationError, match="a pair across questions"):
            Pair(**{**dict(one), **changes})
    assert Pair(**{**dict(one), "reference": other.reference, "mismatched": True}).shown == other.reference.text
