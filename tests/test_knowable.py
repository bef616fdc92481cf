"""What a student could know, by hand: a chain of two searches, followed, begun wrongly, or left out."""

import pytest

from made_pairs import make_turn
from search_e1.selfdistill.knowable import knowable_turns
from search_e1.selfdistill.samples import classes_of, sample_of
from search_e1.text.prompts import plain_prompt
from search_e1.types import ActionKind, Pair, Question, StopReason, Trajectory

QUESTION = Question(id="q", text="Who leads the land of Arca?", answers=("Cor Dun",))
SEARCH = "<think>t</think> <search>{}</search>"
ANSWER = "<think>t</think> <answer>{}</answer>"


def trajectory(policy, *searches: tuple[str, str, str], answer: str) -> Trajectory:
    """``searches``: query, the passage's id, its text."""
    turns = [
        make_turn(policy.tokenizer, SEARCH.format(query), ActionKind.SEARCH, query, f"\n{text}\n").model_copy(
            update={"passage_ids": (id,)}
        )
        for query, id, text in searches
    ]
    last = make_turn(policy.tokenizer, ANSWER.format(answer), ActionKind.ANSWER, answer)
    right = answer in QUESTION.answers
    prompt = plain_prompt(policy.tokenizer, policy.prompts, QUESTION.text)
    return Trajectory(
        question_id="q", prompt_ids=prompt, turns=(*turns, last), stop_reason=StopReason.ANSWERED, answer=answer, reward=right
    )


FIRST = ("Arca", "p1", "Arca is in the land of Bel.")
SECOND = ("Bel", "p2", "The leader of Bel is Cor Dun.")
ELSEWHERE = ("who leads", "p9", "Nothing of use.")


def pair(policy, *searches: tuple[str, str, str], answer: str) -> Pair:
    reference = trajectory(policy, FIRST, SECOND, answer="Cor Dun")
    return Pair(question=QUESTION, reference=reference, student=trajectory(policy, *searches, answer=answer))


@pytest.mark.parametrize(
    ("searches", "known"),
    [
        ([FIRST, SECOND], [True, True, True]),  # the reference's own way
        ([], [True]),  # an answer where the first query could be asked
        ([ELSEWHERE], [True, False]),  # "Bel" was never read
        ([ELSEWHERE, FIRST], [True, False, False]),  # the answer was not read
        ([FIRST], [True, True]),  # "Bel" was read: a search is missing, and could be made
        ([FIRST, ("Bel", "p2", "cut off")], [True, True, True]),  # all that the reference had read, by id
    ],
)
def test_what_can_be_known_at_each_turn(tiny_policy, searches, known) -> None:
    assert knowable_turns(pair(tiny_policy, *searches, answer="Fen")) == known


@pytest.mark.parametrize(("mask", "left"), [("none", "all"), ("turns", "first turn"), ("answers", "all but the answer")])
def test_masked_tokens_have_no_weight(tiny_policy, mask, left) -> None:
    made = pair(tiny_policy, ELSEWHERE, answer="Fen")
    classes = classes_of(tiny_policy.tokenizer, tiny_policy.prompts, made.student)
    sample = sample_of(made, classes, None, mask)
    text = tiny_policy.tokenizer.decode([sample.response_ids[i] for i in sample.positions])
    first, last = SEARCH.format("who leads"), ANSWER.format("Fen")
    assert text == {"all": first + last, "first turn": first, "all but the answer": first + last.replace("Fen", "")}[left]
    weighted = sample_of(made, classes, {"thought": 2.0, "search": 1.0, "answer": 1.0, "tag": 0.5}, mask)
    assert set(weighted.positions) == set(sample.positions)
    assert weighted.weights[sample.positions[0]] == 0.5
