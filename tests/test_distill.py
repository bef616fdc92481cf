"""Distillation end to end on a tiny policy: alignment, gradients, merging, saving, determinism, refusals."""

import copy
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Lfm2Config, Lfm2ForCausalLM

from conftest import make_tiny_policy
from search_e1.config import DistillConfig, LoraConfig, PolicyConfig
from search_e1.distill.collate import collate, encode, pad_id
from search_e1.distill.passes import SelfDistillation
from search_e1.distill.trainer import train
from search_e1.errors import ConfigError, DataError, TrainingError
from search_e1.training.policy import Policy, load, merge_adapter, with_adapter
from search_e1.types import Question
from test_collate import make_pair

CONFIG = DistillConfig(epochs=1, learning_rate=1e-2, batch_size=4, lora=LoraConfig(rank=4, alpha=8), logits_mib=1)


def lfm2_policy() -> Policy:
    """The hybrid of convolutions and attention, with the same tokenizer and prompts."""
    policy = make_tiny_policy()
    config = Lfm2Config(
        vocab_size=len(policy.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=policy.tokenizer.eos_token_id,
        pad_token_id=policy.tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy.model = Lfm2ForCausalLM(config)
    return policy


def gemma_policy() -> Policy:
    """Logits with a soft cap that bends them."""
    policy = make_tiny_policy()
    config = Gemma2Config(
        vocab_size=len(policy.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        final_logit_softcapping=0.2,
        bos_token_id=None,
        eos_token_id=policy.tokenizer.eos_token_id,
        pad_token_id=policy.tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy.model = Gemma2ForCausalLM(config)
    return policy


@pytest.fixture(params=[make_tiny_policy, lfm2_policy, gemma_policy], ids=["qwen2", "lfm2", "gemma2"])
def policy(request) -> Policy:
    return request.param()


def pairs_of(policy, count):
    names = [f"Mayor of Bel{' or so' * (i % 3)}, {i}?" for i in range(count)]
    return [make_pair(policy, Question(id=f"q{i}", text=text, answers=("Cor Dun",))) for i, text in enumerate(names)]


def batch_of(policy, pairs):
    rows = [encode(policy.tokenizer, policy.prompts, pair) for pair in pairs]
    return collate(rows, pad_id(policy.tokenizer))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def spread(adapted, scale=0.3):
    """Give the adapter an effect; it starts with none."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, scale)


def test_before_training_teacher_and_student_agree_exactly_if_their_prompts_do(policy):
    """The adapter starts with no effect, so only the prompt can tell them apart; a shift by one position would."""
    batch = batch_of(policy, pairs_of(policy, 3))
    model = SelfDistillation(with_adapter(policy.model, CONFIG.lora), CONFIG)
    same = {k.replace("teacher", "student"): v for k, v in batch.items() if k.startswith("teacher")}
    same |= {k: v for k, v in batch.items() if k.startswith("teacher")}
    assert model(**same)[0].item() == pytest.approx(0, abs=1e-9)
    assert model(**{**same, "student_index": same["student_index"] - 1})[0].item() > 1e-4
    assert model(**batch)[0].item() > 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(tau=0.05),
        dict(clip="token", tau=0.2),
        dict(clip="none"),
        dict(divergence="reverse_kl"),
        dict(divergence="js", beta=0.3),
        dict(student_temperature=0.7, teacher_temperature=0.4),
        dict(logits_mib=None),
    ],
)
def test_the_divergence_is_that_of_the_logits(policy, settings):
    """Row by row and without padding, from the whole model's logits: teacher without the adapter, student with it."""
    config = DistillConfig(**{**CONFIG.model_dump(), **settings})
    pairs = pairs_of(policy, 3)
    adapted = with_adapter(policy.model, CONFIG.lora)
    spread(adapted)
    model = SelfDistillation(adapted, config).eval()
    loss, per_token = model(**batch_of(policy, pairs))
    expected = []
    for pair in pairs:
        row = encode(policy.tokenizer, policy.prompts, pair)
        with torch.no_grad(), adapted.disable_adapter():
            teacher = adapted(torch.tensor([row["input_ids"]])).logits[0]
        student = adapted(torch.tensor([row["student_ids"]])).logits[0]
        t = (teacher / config.teacher_temperature).log_softmax(-1)[row["teacher_positions"]]
        s = (student / config.student_temperature).log_softmax(-1)[row["student_positions"]]
        m = (config.beta * t.exp() + (1 - config.beta) * s.exp()).log()
        terms = {
            "forward_kl": t.exp() * (t - s),
            "reverse_kl": s.exp() * (s - t),
            "js": config.beta * t.exp() * (t - m) + (1 - config.beta) * s.exp() * (s - m),
        }[config.divergence]
        terms = terms.clamp(max=config.tau) if config.clip == "entry" else terms
        expected.append(terms.sum(-1).clamp(max=config.tau if config.clip == "token" else math.inf))
    torch.testing.assert_close(per_token, torch.cat(expected).detach(), rtol=1e-3, atol=1e-5)
    assert loss.item() == pytest.approx(torch.cat(expected).mean().item(), rel=1e-3)


def test_observation_tokens_receive_exactly_zero_gradient(tiny_policy):
    """At the hidden states that predict observation ids, and the prompt's, nothing arrives; elsewhere it does."""
    batch = batch_of(tiny_policy, pairs_of(tiny_policy, 2))
    adapted = with_adapter(tiny_policy.model, CONFIG.lora)
    spread(adapted)
    model = SelfDistillation(adapted, CONFIG)
    kept = []

    def keep(module, args, output):
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.retain_grad()
            kept.append(output.last_hidden_state)

    model.decoder.register_forward_hook(keep)
    model(**batch)[0].backward()
    gradient = kept[0].grad.flatten(0, 1).abs().sum(-1)
    sampled = torch.zeros(len(gradient), dtype=torch.bool)
    sampled[batch["student_index"]] = True
    assert gradient[~sampled].max().item() == 0
    assert gradient[sampled].min().item() > 0
    assert (~sampled).sum() > 80


def test_only_the_adapter_of_the_student_is_trained(tiny_policy):
    adapted = with_adapter(tiny_policy.model, CONFIG.lora)
    spread(adapted)
    SelfDistillation(adapted, CONFIG)(**batch_of(tiny_policy, pairs_of(tiny_policy, 2)))[0].backward()
    with_gradient = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all("lora_" in name for name in with_gradient)


def test_the_merged_policy_is_the_adapted_one(policy):
    adapted = with_adapter(policy.model, CONFIG.lora)
    spread(adapted)
    adapted.eval()
    ids = torch.arange(20)[None] + 40
    with torch.no_grad():
        before = adapted(ids).logits
        merged = merge_adapter(adapted)
        torch.testing.assert_close(merged(ids).logits, before, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in merged.parameters())


def test_training_lowers_the_divergence_and_saves_what_it_made(policy, tmp_path):
    base = copy.deepcopy(policy.model.state_dict())
    told = []
    config = CONFIG.model_copy(update={"epochs": 15})
    summary = train(policy, pairs_of(policy, 8), config, seed=1, out=tmp_path, progress=lambda *a: told.append(a))
    steps = lines(tmp_path / "steps.jsonl")
    assert summary["kl_last"] < 0.7 * summary["kl_first"]
    assert (summary["pairs"], summary["pairs_too_long"], summary["steps"]) == (8, 0, 30)
    assert summary["positions"] == sum(pair.student.sampled_tokens for pair in pairs_of(policy, 8))
    assert [step["step"] for step in steps] == list(range(1, 31))
    assert set(steps[0]) == {"step", "loss", "grad_norm", "learning_rate", "seconds"}
    assert steps[0]["learning_rate"] == CONFIG.learning_rate
    taught = [figures for figures in told if figures[2] == "teacher"]
    assert [done for done, *_ in taught] == [4, 8]  # once for each pair, in batches
    assert (told[-1][:2], len(told) - len(taught)) == ((30, 30), 30)
    assert {path.name for path in tmp_path.iterdir()} == {"policy", "steps.jsonl"}
    changed = policy.model.state_dict()
    assert set(changed) == set(base)
    assert any(not torch.equal(changed[name], base[name]) for name in base)
    assert torch.equal(changed["model.embed_tokens.weight"], base["model.embed_tokens.weight"])

    loaded = load(tmp_path / "policy", PolicyConfig(model="", device="cpu"))
    assert loaded.prompts == policy.prompts
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    ids = torch.arange(20)[None] + 40
    with torch.no_grad():
        expected = policy.model(ids).logits
        assert torch.equal(loaded.model.eval()(ids).logits, expected)
        assert torch.equal(plain.eval()(ids).logits, expected)


@pytest.mark.parametrize("settings", [dict(divergence="reverse_kl"), dict(divergence="js", beta=0.3)])
def test_other_divergences_fall_as_well(tiny_policy, tmp_path, settings):
    config = CONFIG.model_copy(update={"epochs": 15, **settings})
    summary = train(tiny_policy, pairs_of(tiny_policy, 8), config, seed=1, out=tmp_path)
    assert summary["kl_last"] < 0.7 * summary["kl_first"]


def test_the_same_seed_gives_the_same_weights_to_the_bit(tmp_path):
    def weights(seed, name):
        policy = make_tiny_policy()
        train(policy, pairs_of(policy, 6), CONFIG, seed=seed, out=tmp_path / name)
        return policy.model.state_dict()

    first, again, other = weights(1, "a"), weights(1, "b"), weights(2, "c")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_micro_batches_do_not_change_the_gradient(tmp_path):
    """Rows differ in how many tokens count, so a mean of micro-batches' means would be another number."""
    longer = Question(id="long", text="Who?", answers=("Cor Dun",))

    def first_step(name, **trainer):
        policy = make_tiny_policy()
        for parameter in policy.model.parameters():
            parameter.data *= 3 if parameter.ndim == 2 else 1  # a policy with opinions, so that the roles really differ
        pairs = pairs_of(policy, 3)
        pair = make_pair(policy, longer)
        turns = (pair.student.turns[0], *pair.student.turns)
        pairs.append(pair.model_copy(update={"student": pair.student.model_copy(update={"turns": turns})}))
        train(policy, pairs, CONFIG.model_copy(update={"trainer": trainer}), seed=1, out=tmp_path / name)
        return lines(tmp_path / name / "steps.jsonl")[0]

    whole, parts = first_step("whole"), first_step("parts", per_device_train_batch_size=1)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_acting_trains_on_fewer_positions(tiny_policy, tmp_path):
    config = CONFIG.model_copy(update={"tokens": "acting"})
    pairs = pairs_of(tiny_policy, 4)
    summary = train(tiny_policy, pairs, config, seed=1, out=tmp_path)
    assert summary["positions"] == 4 * (6 + len("bel") + len("Fen"))


def test_class_weights_make_a_weighted_mean_over_the_whole_batch(tmp_path):
    """A weight of 0 leaves thoughts out as ``tokens="acting"`` does; twice the weight on everything changes nothing."""

    def first_step(name, **settings):
        config = DistillConfig(**{**CONFIG.model_dump(), **settings})
        policy = make_tiny_policy()
        for parameter in policy.model.parameters():
            parameter.data *= 3 if parameter.ndim == 2 else 1
        train(policy, pairs_of(policy, 4), config, seed=1, out=tmp_path / name)
        step = lines(tmp_path / name / "steps.jsonl")[0]
        return pytest.approx([step["loss"], step["grad_norm"]], rel=1e-4)

    def values(approx):
        return approx.expected

    alone = dict(trainer={"per_device_train_batch_size": 1})
    plain, acting = first_step("plain"), first_step("acting", tokens="acting")
    assert values(first_step("zero", class_weights={"thought": 0}, **alone)) == acting
    doubled = dict.fromkeys(("thought", "search", "answer", "tag"), 2.0)
    assert values(first_step("double", class_weights=doubled, **alone)) == plain
    thoughts = dict(search=0, answer=0, tag=0)
    assert values(first_step("thoughts", class_weights=thoughts)) != plain


def test_nothing_is_printed(tiny_policy, tmp_path, capfd):
    train(tiny_policy, pairs_of(tiny_policy, 4), CONFIG, seed=1, out=tmp_path)
    assert capfd.readouterr() == ("", "")


def test_pairs_too_long_are_left_out_and_counted(tiny_policy, tmp_path):
    long = make_pair(tiny_policy, Question(id="long", text="x" * 1000, answers=("Cor Dun",)))
    summary = train(tiny_policy, [long, *pairs_of(tiny_policy, 3)], CONFIG, seed=1, out=tmp_path)
    assert (summary["pairs"], summary["pairs_too_long"]) == (3, 1)
    with pytest.raises(DataError, match="none of the 1 pairs fits the policy's context of 1024"):
        train(tiny_policy, [long], CONFIG, seed=1, out=tmp_path / "none")


def test_no_pairs_are_refused(tiny_policy, tmp_path):
    with pytest.raises(DataError, match="no pairs to distil on; sample a larger pool"):
        train(tiny_policy, [], CONFIG, seed=1, out=tmp_path)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"wramup_steps": 3}, r"distill\.trainer\.wramup_steps: transformers\.TrainingArguments has no such argument"),
        ({"learning_rate": 1e-3}, r"distill\.trainer\.learning_rate: set by distill\.learning_rate; take it out"),
        ({"save_strategy": "steps"}, r"distill\.trainer\.save_strategy: cannot be chosen here"),
        (
            {"per_device_train_batch_size": 3},
            r"distill\.trainer\.per_device_train_batch_size = 3 .* distill\.batch_size = 4",
        ),
        ({"lr_scheduler_type": "diagonal"}, r"distill\.trainer: diagonal is not a valid SchedulerType"),
    ],
)
def test_impossible_trainer_arguments_are_refused_before_any_work(tiny_policy, tmp_path, trainer, message):
    config = CONFIG.model_copy(update={"trainer": trainer})
    with pytest.raises(ConfigError, match=message):
        train(tiny_policy, pairs_of(tiny_policy, 2), config, seed=1, out=tmp_path)
    assert not (tmp_path / "policy").exists()


def test_trainer_arguments_pass_through(tiny_policy, tmp_path):
    config = CONFIG.model_copy(update={"trainer": {"lr_scheduler_type": "constant", "max_steps": 3}})
    train(tiny_policy, pairs_of(tiny_policy, 2), config, seed=1, out=tmp_path)
    assert [step["learning_rate"] for step in lines(tmp_path / "steps.jsonl")] == [CONFIG.learning_rate] * 3


def test_a_loss_that_is_not_finite_stops_with_the_batch_saved(tiny_policy, tmp_path):
    with torch.no_grad():
        tiny_policy.model.model.norm.weight.fill_(float("nan"))
    pairs = pairs_of(tiny_policy, 2)
    with pytest.raises(TrainingError, match=r"step 1: the divergence is nan; its batch is in .*bad_batch\.pt"):
        train(tiny_policy, pairs, CONFIG, seed=1, out=tmp_path)
    saved = torch.load(tmp_path / "bad_batch.pt")
    assert saved["student_input_ids"].shape[0] == 2
    assert saved["per_token"].isnan().all()
