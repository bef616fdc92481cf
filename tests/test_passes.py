"""The two passes: packing, the teacher computed once, all weights, checkpointing; each against the plain way."""

import copy
import shutil
from collections import namedtuple

import pytest
import torch

from conftest import make_tiny_policy
from search_e1.config import DistillConfig, LoraConfig
from search_e1.distill.collate import collate, encode, pack, pad_id
from search_e1.distill.passes import SelfDistillation, TeacherStates, packs, teach
from search_e1.distill.trainer import train
from search_e1.errors import ConfigError, RunError
from search_e1.training.head import hidden_at, split_head
from search_e1.training.policy import with_adapter
from test_distill import lfm2_policy, pairs_of, spread

CONFIG = DistillConfig(epochs=2, learning_rate=1e-2, batch_size=4, lora=LoraConfig(rank=4, alpha=8))


def rows_of(policy, count):
    return [
        encode(policy.tokenizer, policy.prompts, pair, number=number)
        for number, pair in enumerate(pairs_of(policy, count))
    ]


def trained(tmp_path, name, **settings):
    """The weights after a distillation, and what it returned."""
    policy = make_tiny_policy()
    summary = train(policy, pairs_of(policy, 8), CONFIG.model_copy(update=settings), seed=3, out=tmp_path / name)
    return {name: weight.clone() for name, weight in policy.model.state_dict().items()}, summary


def assert_same_weights(left, right):
    assert set(left) == set(right)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=2e-5)


def test_a_packed_batch_gives_the_hidden_states_of_a_padded_one(tiny_policy):
    rows = rows_of(tiny_policy, 5)
    decoder, _ = split_head(tiny_policy.model.eval())
    padded, packed = collate(rows, pad_id(tiny_policy.tokenizer)), pack(rows)
    assert packed["student_input_ids"].shape == (1, sum(len(row["student_ids"]) for row in rows))
    assert packed["teacher_position_ids"][0, len(rows[0]["input_ids"])] == 0
    for role in ("student", "teacher"):
        torch.testing.assert_close(hidden_at(decoder, packed, role), hidden_at(decoder, padded, role))


def test_no_attention_across_packed_sequences(tiny_policy):
    """Other ids in the first sequence change nothing in the second, not one bit."""
    rows = rows_of(tiny_policy, 2)
    decoder, _ = split_head(tiny_policy.model.eval())
    batch = pack(rows)
    second = batch["student_index"] >= len(rows[0]["student_ids"])
    before = hidden_at(decoder, batch, "student")
    batch["student_input_ids"][0, : len(rows[0]["student_ids"]) - 1] += 1
    after = hidden_at(decoder, batch, "student")
    assert torch.equal(before[second], after[second])
    assert not torch.allclose(before[~second], after[~second])


def test_whether_a_policy_packs_is_found_out(tiny_policy):
    assert packs(tiny_policy.model)
    assert not packs(lfm2_policy().model)  # its convolution runs on over the border


def test_packed_training_gives_the_weights_of_padded_training(tmp_path):
    padded, _ = trained(tmp_path, "padded", packing="never")
    packed, _ = trained(tmp_path, "packed", packing="always")
    assert_same_weights(padded, packed)


def test_packing_that_the_policy_cannot_do_is_refused(tmp_path):
    policy = lfm2_policy()
    with pytest.raises(
        ConfigError, match=r'packing = "always": a Lfm2ForCausalLM does not keep packed sequences apart'
    ):
        train(policy, pairs_of(policy, 4), CONFIG.model_copy(update={"packing": "always"}), seed=0, out=tmp_path)


@pytest.mark.parametrize("weights", ["lora", "all"])
def test_a_teacher_computed_once_is_the_teacher_of_every_step(tmp_path, weights):
    live, first = trained(tmp_path, "live", weights=weights, teacher="live")
    cached, second = trained(tmp_path, "cached", weights=weights, teacher="cached")
    assert_same_weights(live, cached)
    assert first["kl_first"] == pytest.approx(second["kl_first"], rel=1e-4)


def test_states_are_found_by_row_in_any_order(tiny_policy, tmp_path):
    rows = rows_of(tiny_policy, 5)
    states = teach(tiny_policy.model, rows, tmp_path / "states", pack, batch_size=2)
    decoder, _ = split_head(tiny_policy.model.eval())
    chosen = [rows[3], rows[0], rows[4]]
    expected = hidden_at(decoder, pack(chosen), "teacher")
    torch.testing.assert_close(states.read(torch.tensor([3, 0, 4])), expected)


def test_all_weights_are_trained_and_the_teacher_stays_as_it_was(tiny_policy):
    rows = rows_of(tiny_policy, 4)
    batch = pack(rows)
    with_lora = SelfDistillation(with_adapter(copy.deepcopy(tiny_policy.model), CONFIG.lora), CONFIG)
    whole = SelfDistillation(tiny_policy.model, CONFIG)
    loss, per_token = whole(**batch)
    torch.testing.assert_close(per_token, with_lora(**batch)[1])
    loss.backward()
    gradients = {name: p.grad for name, p in tiny_policy.model.named_parameters()}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    teacher = whole._teacher(batch)
    with torch.no_grad():
        for parameter in tiny_policy.model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(whole._teacher(batch), teacher)
    assert not torch.equal(whole.teacher_head.weight, whole.head.weight)


def test_training_all_weights_moves_embeddings_too(tmp_path):
    before = make_tiny_policy().model.state_dict()
    after, summary = trained(tmp_path, "all", weights="all", learning_rate=1e-3, epochs=15)
    assert summary["kl_last"] < 0.7 * summary["kl_first"]
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, _ = trained(tmp_path, "plain")
    checkpointed, _ = trained(tmp_path, "checkpointed", trainer={"gradient_checkpointing": True})
    assert_same_weights(plain, checkpointed)


def test_an_adapter_still_leaves_the_head_alone(tiny_policy):
    adapted = with_adapter(tiny_policy.model, CONFIG.lora)
    spread(adapted)
    distillation = SelfDistillation(adapted, CONFIG)
    distillation(**pack(rows_of(tiny_policy, 2)))[0].backward()
    assert distillation.head.weight.grad is None


def test_a_disk_without_room_is_told_before_the_work(tiny_policy, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(RunError, match=r'MiB and the disk has 0 left; make room, or set distill\.teacher = "live"'):
        TeacherStates(tmp_path / "states", rows_of(tiny_policy, 2), 8, torch.float32)
    assert not (tmp_path / "states").exists()
