"""Alignment of student and teacher, and what part of an action a token is."""

import pytest
import torch

from search_e1.distill.collate import collate, encode, fits, pad_id
from search_e1.errors import DataError
from search_e1.text.prompts import plain_prompt, privileged_prompt
from search_e1.text.tokens import TokenClass, token_classes
from search_e1.types import ActionKind, Pair, Question, StopReason, Trajectory, Turn

QUESTION = Question(id="q1", text="Mayor of Bel?", answers=("Cor Dun",))
SEARCH_TEXT = "<think>who</think> <search>bel</search>"
SEEN = "\n<information>\nDoc 1\n</information>\n"
ANSWER_TEXT = "so <answer>Fen</answer>"


def make_turn(tokenizer, text, kind, argument, seen=""):
    return Turn(
        action_ids=tokenizer.encode(text, add_special_tokens=False),
        action_text=text,
        kind=kind,
        argument=argument,
        observation_ids=tokenizer.encode(seen, add_special_tokens=False) if seen else (),
        observation_text=seen,
    )


def make_pair(policy, question=QUESTION):
    tokenizer = policy.tokenizer
    prompt = plain_prompt(tokenizer, policy.prompts, question.text)
    student = Trajectory(
        question_id=question.id,
        prompt_ids=prompt,
        turns=(
            make_turn(tokenizer, SEARCH_TEXT, ActionKind.SEARCH, "bel", SEEN),
            make_turn(tokenizer, ANSWER_TEXT, ActionKind.ANSWER, "Fen"),
        ),
        stop_reason=StopReason.ANSWERED,
        answer="Fen",
    )
    reference = Trajectory(
        question_id=question.id,
        prompt_ids=prompt,
        turns=(make_turn(tokenizer, "<answer>Cor Dun</answer>", ActionKind.ANSWER, "Cor Dun"),),
        stop_reason=StopReason.ANSWERED,
        answer="Cor Dun",
        reward=1.0,
    )
    return Pair(question=question, reference=reference, student=student)


def test_both_rows_predict_every_sampled_id_and_no_other(tiny_policy):
    pair = make_pair(tiny_policy)
    row = encode(tiny_policy.tokenizer, tiny_policy.prompts, pair)
    sampled = [i for turn in pair.student.turns for i in turn.action_ids]
    assert [row["student_ids"][p + 1] for p in row["student_positions"]] == sampled
    assert [row["input_ids"][p + 1] for p in row["teacher_positions"]] == sampled
    # The two rows differ in their prompts alone.
    teacher_prompt = privileged_prompt(tiny_policy.tokenizer, tiny_policy.prompts, QUESTION.text, pair.reference.text)
    shift = len(teacher_prompt) - len(pair.student.prompt_ids)
    assert shift > 0
    assert [p - shift for p in row["teacher_positions"]] == row["student_positions"]
    assert tuple(row["student_ids"]) == pair.student.prompt_ids + pair.student.response_ids
    assert tuple(row["input_ids"]) == teacher_prompt + pair.student.response_ids


def test_the_stored_prompt_is_the_students_prompt(tiny_policy):
    pair = make_pair(tiny_policy)
    pair = pair.model_copy(update={"student": pair.student.model_copy(update={"prompt_ids": (5, 6)})})
    row = encode(tiny_policy.tokenizer, tiny_policy.prompts, pair)
    assert row["student_ids"][:2] == [5, 6]
    assert row["student_positions"][0] == 1


def test_a_batch_is_aligned_whatever_the_padding(tiny_policy):
    long = Question(id="q2", text="Mayor of the city that is the capital of Arda?", answers=("Cor Dun",))
    pairs = [make_pair(tiny_policy), make_pair(tiny_policy, long)]
    rows = [encode(tiny_policy.tokenizer, tiny_policy.prompts, pair) for pair in pairs]
    batch = collate(rows, pad_id(tiny_policy.tokenizer))
    sampled = [i for pair in pairs for turn in pair.student.turns for i in turn.action_ids]
    for role in ("student", "teacher"):
        assert batch[f"{role}_input_ids"].flatten()[batch[f"{role}_index"] + 1].tolist() == sampled
        lengths = [len(row["student_ids" if role == "student" else "input_ids"]) for row in rows]
        assert batch[f"{role}_attention_mask"].sum(1).tolist() == lengths
        assert batch[f"{role}_input_ids"].shape == (2, max(lengths))
    padding = batch["student_input_ids"][batch["student_attention_mask"] == 0]
    assert set(padding.tolist()) == {tiny_policy.tokenizer.pad_token_id}
    assert batch["student_index"].dtype is torch.int64


def by_class(policy, turn):
    """The text of each class, in order."""
    pieces = [policy.tokenizer.decode([i]) for i in turn.action_ids]
    classes = token_classes(policy.tokenizer, turn)
    return {k: "".join(p for p, c in zip(pieces, classes, strict=True) if c is k) for k in TokenClass}


def test_token_classes(tiny_policy):
    pair = make_pair(tiny_policy)
    searching, answering = pair.student.turns
    assert by_class(tiny_policy, searching) == {
        TokenClass.TAG: "<think></think><search></search>",
        TokenClass.THOUGHT: "who ",
        TokenClass.SEARCH: "bel",
        TokenClass.ANSWER: "",
    }
    assert by_class(tiny_policy, answering)[TokenClass.ANSWER] == "Fen"


def test_token_classes_at_the_edges(tiny_policy):
    tokenizer = tiny_policy.tokenizer
    unclosed = make_turn(tokenizer, "<search>be <th", ActionKind.MALFORMED, None)
    assert by_class(tiny_policy, unclosed)[TokenClass.SEARCH] == "be <th"
    ended = Turn(
        action_ids=(*tokenizer.encode("é", add_special_tokens=False), tokenizer.eos_token_id),
        action_text="é",
        kind=ActionKind.MALFORMED,
    )
    # Two bytes of one character, then an end token.
    assert token_classes(tokenizer, ended) == [TokenClass.THOUGHT, TokenClass.THOUGHT, TokenClass.TAG]


class Pieces:
    """A tokenizer whose tags are spread over several tokens, with neighbours glued on."""

    pieces = ("hm", "\n<", "sea", "rch>", "be", "l</", "search", ">\n")
    all_special_ids: list[int] = []

    def decode(self, ids, **_):
        return "".join(self.pieces[i] for i in ids)


def test_token_classes_of_tags_in_pieces():
    turn = Turn(action_ids=range(8), action_text="", kind=ActionKind.SEARCH, argument="bel")
    assert token_classes(Pieces(), turn) == ["thought", "tag", "tag", "tag", "search", "tag", "tag", "tag"]


def test_acting_leaves_thoughts_out(tiny_policy):
    pair = make_pair(tiny_policy)
    row = encode(tiny_policy.tokenizer, tiny_policy.prompts, pair, tokens="acting")
    predicted = tiny_policy.tokenizer.decode([row["student_ids"][p + 1] for p in row["student_positions"]])
    assert predicted == "<think></think><search>bel</search><answer>Fen</answer>"
    taught = [row["input_ids"][p + 1] for p in row["teacher_positions"]]
    assert taught == [row["student_ids"][p + 1] for p in row["student_positions"]]


def test_a_pair_that_does_not_fit_is_named(tiny_policy):
    pair = make_pair(tiny_policy)
    length = len(encode(tiny_policy.tokenizer, tiny_policy.prompts, pair)["input_ids"])
    arguments = (tiny_policy.tokenizer, tiny_policy.prompts, pair)
    assert fits(*arguments, length)
    assert encode(*arguments, context_length=length)["name"] == "q1"
    assert not fits(*arguments, length - 1)
    with pytest.raises(DataError, match=f"question 'q1' takes {length} tokens .* holds {length - 1}"):
        encode(*arguments, context_length=length - 1)
