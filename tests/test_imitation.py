"""Supervised fine-tuning on references: its loss against plain cross-entropy, what is trained on, and that nobody teaches."""

import json

import pytest
import torch
from torch.nn import functional

from conftest import make_tiny_policy
from search_e1.config import DistillConfig, LoraConfig
from search_e1.distill.collate import collate, encode_reference, pack, pad_id
from search_e1.distill.passes import SelfDistillation
from search_e1.distill.trainer import train
from search_e1.errors import DataError, TrainingError
from search_e1.text.tokens import TokenClass
from search_e1.training import divergence as loss_module
from search_e1.training.divergence import fused_cross_entropy
from search_e1.training.head import Head
from search_e1.training.policy import with_adapter
from search_e1.types import ActionKind, Question
from test_collate import SEARCH_TEXT, SEEN, make_pair, make_turn
from test_distill import spread

CONFIG = DistillConfig(objective="sft", learning_rate=1e-2, batch_size=4, lora=LoraConfig(rank=4, alpha=8))


def pair_of(policy, number=0):
    """A pair whose reference searches once, and its question."""
    pair = make_pair(policy, Question(id=f"q{number}", text=f"Mayor of Bel{'!' * number}?", answers=("Cor Dun",)))
    search = make_turn(policy.tokenizer, SEARCH_TEXT, ActionKind.SEARCH, "bel", SEEN)
    turns = (search, *pair.reference.turns)
    return pair.model_copy(update={"reference": pair.reference.model_copy(update={"turns": turns})})


def by_hand(model, pair):
    """[positions]: the cross-entropy at the reference's sampled ids under the plain prompt, from the whole model's logits."""
    ids = torch.tensor([*pair.student.prompt_ids, *pair.reference.response_ids])
    sampled = torch.tensor([0] * len(pair.student.prompt_ids) + list(pair.reference.action_mask)).bool()
    return functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")[sampled[1:]]


@pytest.mark.parametrize("how", [{}, {"scale": 0.3, "softcap": 2.0}])
def test_the_fused_loss_and_its_gradients_are_those_of_torch(monkeypatch, how):
    monkeypatch.setattr(loss_module, "_CPU_TILE", 64)  # several tiles of a vocabulary of 50, and several chunks
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = (drawn(*shape).requires_grad_() for shape in ((9, 6), (50, 6), (50,)))
    targets, weights = torch.arange(9) * 5, drawn(9).abs()
    head = Head(weight, bias, **how)
    loss, per_token = fused_cross_entropy(hidden, targets, head, weights=weights, logits_mib=1 / 1024)
    expected = functional.cross_entropy(head.logits(hidden), targets, reduction="none")
    torch.testing.assert_close(per_token, expected.detach())
    mean = (weights * expected).sum() / weights.sum()
    torch.testing.assert_close(loss, mean)
    trained = (hidden, weight, bias)
    for ours, theirs in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(mean, trained), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("batched", [collate, pack])
def test_the_gradient_is_that_of_cross_entropy_through_the_plain_model(tiny_policy, batched):
    pairs = [pair_of(tiny_policy, number) for number in range(3)]
    tokenizer, prompts = tiny_policy.tokenizer, tiny_policy.prompts
    rows = [encode_reference(tokenizer, prompts, pair, number=n) for n, pair in enumerate(pairs)]
    adapted = with_adapter(tiny_policy.model, CONFIG.lora)
    spread(adapted)
    model = SelfDistillation(adapted, CONFIG).eval()
    batch = batched(rows, pad_id(tokenizer)) if batched is collate else batched(rows)
    assert not any(key.startswith("teacher") for key in batch)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    loss, per_token = model(**batch)
    ours = torch.autograd.grad(loss, trained)
    expected = torch.cat([by_hand(adapted, pair) for pair in pairs])
    torch.testing.assert_close(per_token, expected.detach(), rtol=1e-4, atol=1e-5)
    for one, other in zip(ours, torch.autograd.grad(expected.mean(), trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_observations_and_prompt_receive_exactly_zero_gradient(tiny_policy):
    pair = pair_of(tiny_policy)
    row = encode_reference(tiny_policy.tokenizer, tiny_policy.prompts, pair)
    adapted = with_adapter(tiny_policy.model, CONFIG.lora)
    model, kept = SelfDistillation(adapted, CONFIG), []

    def keep(module, args, output):
        output.last_hidden_state.retain_grad()
        kept.append(output.last_hidden_state)

    model.decoder.register_forward_hook(keep)
    model(**collate([row], 0))[0].backward()
    gradient = kept[0].grad[0].abs().sum(-1)
    mask = torch.tensor([0] * len(pair.student.prompt_ids) + list(pair.reference.action_mask)).bool()
    assert gradient[:-1][~mask[1:]].max().item() == 0
    assert gradient[:-1][mask[1:]].min().item() > 0
    assert (~mask).sum() > 30


def test_acting_and_class_weights_choose_tokens_as_in_distillation(tiny_policy):
    pair = pair_of(tiny_policy)
    row = encode_reference(tiny_policy.tokenizer, tiny_policy.prompts, pair, tokens="acting")
    assert TokenClass.THOUGHT not in row["classes"]
    sampled = "".join(turn.action_text for turn in pair.reference.turns)
    acting = "<think></think><search>bel</search><answer>Cor Dun</answer>"
    assert tiny_policy.tokenizer.decode([row["student_ids"][p + 1] for p in row["student_positions"]]) == acting
    assert len(sampled) > len(acting)


def test_each_reference_is_learnt_once_an_epoch_and_nobody_teaches(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a teacher was asked")

    monkeypatch.setattr(SelfDistillation, "_teacher", refuse)
    policy = make_tiny_policy()
    pairs = [pair_of(policy, number) for number in range(6)]
    other = pairs[0].student.model_copy(update={"turns": pairs[0].student.turns[-1:]})
    pairs.append(pairs[0].model_copy(update={"student": other}))  # a second student of a reference
    told = []
    config = CONFIG.model_copy(update={"epochs": 12})
    figures = train(policy, pairs, config, seed=1, out=tmp_path, progress=lambda *a: told.append(a[2]))
    assert (figures["pairs"], figures["pairs_too_long"], figures["steps"]) == (6, 0, 24)
    assert figures["positions"] == sum(pair.reference.sampled_tokens for pair in pairs[:6])
    assert figures["cross_entropy_last"] < figures["cross_entropy_first"] - 0.3
    assert not {"kl_first", "kl_last"} & set(figures)
    assert all(figure.startswith("CE ") for figure in told)
    first = json.loads((tmp_path / "steps.jsonl").read_text().splitlines()[0])
    assert told[0] == f"CE {first['loss']:.4f}"


@pytest.mark.parametrize("weights", ["lora", "all"])
def test_the_first_step_has_the_loss_of_the_policy_as_it_was(tmp_path, weights):
    """Also in micro-batches, whose rows differ in length, and with all weights trained."""
    policy = make_tiny_policy()
    pairs = [pair_of(policy, number) for number in range(4)]
    with torch.no_grad():
        expected = torch.cat([by_hand(policy.model, pair) for pair in pairs]).mean().item()
    changed = dict(weights=weights, trainer={"per_device_train_batch_size": 1})
    train(policy, pairs, CONFIG.model_copy(update=changed), seed=1, out=tmp_path)
    first = json.loads((tmp_path / "steps.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_learnt_is_told(tiny_policy, tmp_path):
    long = pair_of(tiny_policy)
    turns = long.reference.turns[:1] * 60 + long.reference.turns[1:]
    long = long.model_copy(update={"reference": long.reference.model_copy(update={"turns": turns})})
    with pytest.raises(DataError, match="none of the 1 pairs fits the policy's context of 1024 tokens; use"):
        train(tiny_policy, [long], CONFIG, seed=1, out=tmp_path / "long")
    with torch.no_grad():
        tiny_policy.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 1: the cross-entropy is nan; its batch is in"):
        train(tiny_policy, [pair_of(tiny_policy)], CONFIG, seed=1, out=tmp_path / "nan")
