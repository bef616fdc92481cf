"""From pairs to what is learned: which token is of which class, what it weighs, and in which order samples come."""

import pytest

from conftest import make_tiny_policy
from made_pairs import ANSWER_TEXT, make_pair, make_turn, pairs_of
from search_e1.config import DistillConfig
from search_e1.errors import DataError
from search_e1.selfdistill.samples import classes_of, reference_sample_of, sample_of, weights_of
from search_e1.stages.coldstart import BatchSource
from search_e1.stages.distill import EpochSource, make_samples
from search_e1.text.tokens import TokenClass, token_classes
from search_e1.types import ActionKind, Turn
from trained import sample

ONES = {"thought": 1.0, "search": 1.0, "answer": 1.0, "tag": 1.0}


def text_at(policy, sample):
    """What the positions of the loss predict."""
    return policy.tokenizer.decode([sample.response_ids[i] for i in sample.positions])


def by_class(policy, turn):
    """The text of each class, in order."""
    pieces = [policy.tokenizer.decode([i]) for i in turn.action_ids]
    classes = token_classes(policy.tokenizer, turn)
    return {k: "".join(p for p, c in zip(pieces, classes, strict=True) if c is k) for k in TokenClass}


def test_token_classes(tiny_policy):
    searching, answering = make_pair(tiny_policy).student.turns
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


def test_a_student_under_its_own_prompt_and_its_teachers(tiny_policy):
    pair = make_pair(tiny_policy)
    pair = pair.model_copy(update={"student": pair.student.model_copy(update={"prompt_ids": (5, 6)})})
    made = sample_of(pair, classes_of(tiny_policy.tokenizer, tiny_policy.prompts, pair.student), ONES)
    assert made.prompt_ids == (5, 6)  # the stored one, not made anew
    assert made.teacher_prompt_ids == pair.teacher_prompt_ids
    assert (made.response_ids, made.action_mask) == (pair.student.response_ids, pair.student.action_mask)
    assert text_at(tiny_policy, made) == "".join(turn.action_text for turn in pair.student.turns)
    assert made.weights == tuple(float(mask) for mask in pair.student.action_mask)


def test_weights_by_class(tiny_policy):
    pair = make_pair(tiny_policy)
    classes = classes_of(tiny_policy.tokenizer, tiny_policy.prompts, pair.student)
    weights = {"thought": 0.0, "search": 3.0, "answer": 2.0, "tag": 0.5}
    made = sample_of(pair, classes, weights)
    assert text_at(tiny_policy, made) == "<think></think><search>bel</search><answer>Fen</answer>"
    assert [made.weights[i] for i in made.positions] == [0.5] * 3 + [3.0] * 3 + [0.5] * 2 + [2.0] * 3 + [0.5]
    observed = len(pair.student.turns[0].observation_ids)
    at = len(pair.student.turns[0].action_ids)
    assert weights_of(pair.student, classes, weights)[at : at + observed] == (0.0,) * observed


def test_a_reference_is_imitated_under_the_plain_prompt(tiny_policy):
    pair = make_pair(tiny_policy, reference_searches=True)
    classes = classes_of(tiny_policy.tokenizer, tiny_policy.prompts, pair.reference)
    made = reference_sample_of(pair, classes, {**ONES, "thought": 0.0})
    assert made.prompt_ids == pair.student.prompt_ids
    assert (made.response_ids, made.action_mask) == (pair.reference.response_ids, pair.reference.action_mask)
    assert text_at(tiny_policy, made) == "<think></think><search>bel</search><answer>Cor Dun</answer>"
    assert made.teacher_prompt_ids is None


def test_each_pair_is_a_sample_and_for_fine_tuning_each_reference_once(tiny_policy):
    pairs = pairs_of(tiny_policy, 3, reference_searches=True)
    other = pairs[0].student.model_copy(update={"turns": pairs[0].student.turns[-1:]})
    pairs.append(pairs[0].model_copy(update={"student": other}))  # a second student of a reference
    students = make_samples(tiny_policy, pairs, DistillConfig())
    assert [s.response_ids for s in students] == [pair.student.response_ids for pair in pairs]
    assert text_at(tiny_policy, students[3]) == ANSWER_TEXT
    references = make_samples(tiny_policy, pairs, DistillConfig(objective="sft"))
    assert sorted((s.prompt_ids, s.response_ids) for s in references) == sorted(
        (pair.student.prompt_ids, pair.reference.response_ids) for pair in pairs[:3]
    )


def test_what_does_not_fit_is_left_out_and_nothing_left_is_refused(tiny_policy):
    short = make_pair(tiny_policy)
    fits = short.model_copy(update={"teacher_prompt_ids": (1,) * (1024 - len(short.student.response_ids))})
    long = short.model_copy(update={"teacher_prompt_ids": (*fits.teacher_prompt_ids, 1)})
    assert make_samples(tiny_policy, [long, fits, short], DistillConfig())[0].teacher_prompt_ids == fits.teacher_prompt_ids
    assert len(make_samples(tiny_policy, [long, fits, short], DistillConfig())) == 2
    with pytest.raises(DataError, match="none of the 1 pairs fits the policy's context of 1024"):
        make_samples(tiny_policy, [long], DistillConfig())
    with pytest.raises(DataError, match="no pairs to distill on; sample a larger pool"):
        make_samples(tiny_policy, [], DistillConfig())
    # The reference of the same pair is short.
    assert len(make_samples(tiny_policy, [long], DistillConfig(objective="sft"))) == 1


def test_every_sample_once_an_epoch_in_an_order_of_its_own():
    samples = [sample(i) for i in range(10)]
    source = EpochSource(samples, 4, seed=1)
    assert source.steps == 3

    def epoch(source, number):
        return [s.question_id for step in range(3) for s in source.next(3 * number + step)["distill"]]

    assert [len(source.next(step)["distill"]) for step in range(3)] == [4, 4, 2]
    first, second = epoch(source, 0), epoch(source, 1)
    assert sorted(first) == sorted(second) == sorted(s.question_id for s in samples)
    assert first != second
    assert epoch(EpochSource(samples, 4, seed=1), 1) == second  # a step's samples follow from its number
    assert epoch(EpochSource(samples, 4, seed=2), 0) != first


def test_samples_that_are_not_shuffled_keep_their_order_in_every_epoch():
    samples = [sample(i) for i in range(5)]
    source = EpochSource(samples, 2, seed=1, shuffled=False)
    assert [source.next(step)["distill"] for step in range(6)] == 2 * [samples[:2], samples[2:4], samples[4:]]


def test_demonstrations_are_drawn_in_their_order_also_from_the_middle():
    batches = [[sample(10 * i + j) for j in range(2)] for i in range(4)]
    whole = BatchSource(iter(batches), 100)
    assert [whole.next(step)["sft"] for step in range(4)] == batches
    resumed = BatchSource(iter(batches), 100)
    assert [resumed.next(step)["sft"] for step in (2, 3)] == batches[2:]
    with pytest.raises(DataError, match="demonstrations ran out after 4 steps"):
        resumed.next(4)
    with pytest.raises(DataError, match="ran out after 0 steps"):
        BatchSource(iter([[]]), 100).next(0)
    with pytest.raises(DataError, match="a demonstration of 13 tokens does not fit into the context of 12"):
        BatchSource(iter(batches), 12).next(0)


def test_a_policy_of_another_tokenizer_has_no_part_in_it():
    """Two policies of the same tokenizer make the same samples: ids are taken over, never made again."""
    pairs = pairs_of(make_tiny_policy(), 2)
    assert make_samples(make_tiny_policy(1), pairs, DistillConfig()) == make_samples(make_tiny_policy(), pairs, DistillConfig())
