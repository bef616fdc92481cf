"""From samples to batches: which position predicts which id, what it weighs, and what goes through the model together."""

import pytest
import torch
from pydantic import ValidationError

from conftest import make_tiny_policy
from made_pairs import gemma_policy, lfm2_policy
from search_e1.training.batch import make_batch, micro_batches, normalized_weights, packs
from search_e1.training.head import split_head
from search_e1.types import Sample
from trained import sample


def ones(samples):
    return [[1.0] * len(s.positions) for s in samples]


def by_hand(**fields) -> Sample:
    return Sample(**{"question_id": "q", "prompt_ids": (5, 6, 7), "response_ids": (11, 12, 21, 14),
                     "action_mask": (1, 1, 0, 1), **fields})  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_by_hand(packed):
    one = by_hand(advantages=(0.1, 0.2, 9.0, 0.4), teacher_prompt_ids=(1, 2, 3, 4, 5))
    two = by_hand(prompt_ids=(8,), response_ids=(31, 32), action_mask=(0, 1), advantages=(9.0, 0.6), teacher_prompt_ids=(9,))
    batch = make_batch([one, two], [[0.25, 0.25, 0.25], [0.5]], packed=packed)
    assert batch.targets.tolist() == [11, 12, 14, 32]
    assert batch.advantages.tolist() == pytest.approx([0.1, 0.2, 0.4, 0.6])
    assert batch.weights.tolist() == [0.25, 0.25, 0.25, 0.5]
    assert (batch.old_logprobs, batch.ref_logprobs, batch.sampling_logprobs) == (None, None, None)
    rows = [[5, 6, 7, 11, 12, 21, 14], [8, 31, 32]]
    if packed:
        assert batch.student.input_ids.tolist() == [[*rows[0], *rows[1]]]
        assert batch.student.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2]]
        assert (batch.student.cu_seq.tolist(), batch.student.longest) == ([0, 7, 10], 7)
        assert (batch.teacher.cu_seq.tolist(), batch.teacher.longest) == ([0, 9, 12], 9)
        assert batch.student.cu_seq.dtype == torch.int32
        # The last prompt id predicts 11, 11 predicts 12, 21 predicts 14; in the second row 31 predicts 32.
        assert batch.student.index.tolist() == [2, 3, 5, 8]
        assert batch.teacher.index.tolist() == [4, 5, 7, 10]
    else:
        assert batch.student.input_ids.tolist() == [rows[0], rows[1] + [0] * 4]
        assert (batch.student.position_ids, batch.student.cu_seq, batch.student.longest) == (None, None, None)
        assert batch.student.index.tolist() == [2, 3, 5, 8]
        assert batch.teacher.index.tolist() == [4, 5, 7, 10]
    flat, taught = (side.input_ids.flatten().tolist() for side in (batch.student, batch.teacher))
    assert [flat[i + 1] for i in batch.student.index] == batch.targets.tolist()
    assert [taught[i + 1] for i in batch.teacher.index] == batch.targets.tolist()


def test_without_a_teacher_there_are_no_rows_of_one():
    assert make_batch([by_hand()], [[1.0] * 3], packed=False).teacher is None


def test_positions_are_sampled_and_weighted():
    assert by_hand().positions == (0, 1, 3)
    assert by_hand(weights=(0.0, 2.0, 5.0, 0.5)).positions == (1, 3)
    assert by_hand(action_mask=(0, 0, 0, 0)).positions == ()
    assert len(by_hand()) == 7
    assert len(by_hand(teacher_prompt_ids=(1,) * 10)) == 14


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"action_mask": (1, 1)}, "2 action_mask for 4 response_ids"),
        ({"weights": (1.0,)}, "1 weights for 4 response_ids"),
        ({"advantages": (1.0,) * 5}, "5 advantages for 4 response_ids"),
        ({"action_mask": (1, 2, 0, 1)}, "something other than 0 and 1"),
        ({"prompt_ids": ()}, "prompt_ids"),
    ],
)
def test_an_impossible_sample_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        by_hand(**fields)


def test_averages_by_hand():
    samples = [
        by_hand(),
        by_hand(action_mask=(1, 0, 0, 0)),
        by_hand(action_mask=(0,) * 4),
        by_hand(weights=(1, 3, 9, 4)),
    ]

    def total(own):
        return own

    # Positions weigh 3 x 1, 1, nothing, 1 + 3 + 4: 12 in all.
    assert normalized_weights(samples, "tokens", total) == [[1 / 12] * 3, [1 / 12], [], [1 / 12, 3 / 12, 4 / 12]]
    assert normalized_weights(samples, "sequences", total) == [[1 / 12] * 3, [1 / 4], [], [1 / 32, 3 / 32, 4 / 32]]
    assert normalized_weights(samples, "constant", total, 50) == [
        [1 / 200] * 3,
        [1 / 200],
        [],
        [1 / 200, 3 / 200, 4 / 200],
    ]
    assert normalized_weights([], "sequences", total) == []


def test_averages_divide_by_what_all_ranks_hold():
    """Another rank holds as much again."""
    samples = [by_hand(), by_hand(action_mask=(1, 0, 0, 0))]
    assert normalized_weights(samples, "tokens", lambda own: 2 * own) == [[1 / 8] * 3, [1 / 8]]
    assert normalized_weights(samples, "sequences", lambda own: 2 * own) == [[1 / 12] * 3, [1 / 4]]


def test_micro_batches_hold_at_most_so_many_tokens_longest_first():
    samples = [sample(i, 2, n) for i, n in enumerate((8, 18, 3, 8, 1))]  # rows of 10, 20, 5, 10, 3
    assert list(micro_batches(samples, 20, packed=False)) == [[1], [0, 3], [2, 4]]
    assert list(micro_batches(samples, 20, packed=True)) == [[1], [0, 3], [2, 4]]
    # Padded to 20 each, two rows are 40; end to end three are.
    assert list(micro_batches(samples, 40, packed=False)) == [[1, 0], [3, 2, 4]]
    assert list(micro_batches(samples, 40, packed=True)) == [[1, 0, 3], [2, 4]]
    assert list(micro_batches(samples, 1, packed=True)) == [[1], [0], [3], [2], [4]]
    assert list(micro_batches([], 10, packed=True)) == []


def test_micro_batches_leave_out_what_has_no_position():
    samples = [sample(0), sample(1, action_mask=(0,) * 8), sample(2, weights=(0.0,) * 8)]
    assert list(micro_batches(samples, 1000, packed=False)) == [[0]]


def test_rows_that_would_be_mostly_padding_begin_a_new_micro_batch():
    samples = [sample(i, 4, 96) for i in range(8)] + [sample(9, 4, 70), sample(10, 4, 60)]
    assert list(map(len, micro_batches(samples, 10_000, packed=False))) == [8, 2]
    assert list(map(len, micro_batches(samples, 10_000, packed=True))) == [10]
    assert list(map(len, micro_batches(samples[1:], 10_000, packed=False))) == [8, 1]  # 74 of 100 come as the eighth
    assert list(map(len, micro_batches(samples[2:], 10_000, packed=False))) == [8]


@pytest.mark.parametrize(("policy", "apart"), [(make_tiny_policy, True), (gemma_policy, True), (lfm2_policy, False)])
def test_whether_a_policy_packs_is_found_out(policy, apart):
    """A convolution runs on over the border."""
    assert packs(policy().model) is apart


def hidden_states(model, samples, packed):
    decoder, _ = split_head(model)
    batch = make_batch(samples, ones(samples), packed=packed)
    return batch.student.hidden(decoder), batch.teacher.hidden(decoder)


@pytest.mark.parametrize("policy", [make_tiny_policy, gemma_policy, lfm2_policy])
@torch.no_grad()
def test_hidden_states_are_those_of_each_row_alone(policy):
    model = policy().model.eval()
    samples = [sample(i, 3 + 2 * i, 8 + 3 * i, teacher=20 - i) for i in range(4)]
    alone = [hidden_states(model, [s], False) for s in samples]
    for packed in (False, True) if packs(model) else (False,):
        together = hidden_states(model, samples, packed)
        for role in (0, 1):
            torch.testing.assert_close(together[role], torch.cat([one[role] for one in alone]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_no_attention_across_packed_rows(tiny_policy):
    """Other ids in the first row change nothing in the second, not one bit."""
    first, second = sample(1, 3, 8), sample(2, 4, 11)
    decoder, _ = split_head(tiny_policy.model.eval())
    batch = make_batch([first, second], ones([first, second]), packed=True)
    of_second = batch.student.index >= 11
    before = batch.student.hidden(decoder)
    batch.student.input_ids[0, :10] += 1
    after = batch.student.hidden(decoder)
    assert torch.equal(before[of_second], after[of_second])
    assert not torch.allclose(before[~of_second], after[~of_second])
