"""The distillation stage on tiny policies of three families: what falls, what changes, what is saved, what is refused."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import make_tiny_policy
from made_pairs import gemma_policy, lfm2_policy, pairs_of
from search_e1.config import PolicyConfig
from search_e1.errors import DataError, TrainingError
from search_e1.runs.context import StageContext
from search_e1.training.policy import Policy, load
from search_e1.training.trained import _Roles
from search_e1.types import Sample
from stages_run import run_distill
from trained import equal, opinionated, token_logprobs, weights

DISTILL = {"learning_rate": 1e-2, "batch_size": 4, "lora": {"rank": 4, "alpha": 8}}


@pytest.fixture(params=[make_tiny_policy, lfm2_policy, gemma_policy], ids=["qwen2", "lfm2", "gemma2"])
def policy(request) -> Policy:
    return request.param()


def lines(out):
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


def test_training_lowers_the_divergence_and_saves_what_it_made(policy, tmp_path):
    base = copy.deepcopy(policy.model.state_dict())
    pairs, shown = pairs_of(policy, 8), []
    context = StageContext(tmp_path, seed=1, progress=lambda *args: shown.append(args))
    torch.manual_seed(1)
    figures = run_distill(policy, pairs, tmp_path, context=context, **DISTILL, epochs=15)
    steps = lines(tmp_path)
    assert figures["kl_last"] < 0.7 * figures["kl_first"]
    assert (figures["pairs"], figures["pairs_too_long"], figures["steps"], figures["halved"]) == (8, 0, 30, 0)
    assert figures["positions"] == sum(pair.student.sampled_tokens for pair in pairs)
    assert [step["step"] for step in steps] == list(range(1, 31))
    assert set(steps[0]) == {"step", "loss", "divergence", "grad_norm", "learning_rate", "seconds"}
    assert all(step["divergence"] == pytest.approx(step["loss"], rel=1e-5) for step in steps)
    # Linear, by default.
    assert [step["learning_rate"] for step in steps] == pytest.approx([1e-2 * (1 - i / 30) for i in range(30)])
    assert [(done, total) for done, total, _ in shown] == [(i, 30) for i in range(1, 31)]
    assert {path.name for path in tmp_path.iterdir()} == {"pairs", "policy", "steps.jsonl"}
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


@pytest.mark.parametrize(
    "settings",
    [dict(divergence="reverse_kl"), dict(divergence="js", beta=0.3), dict(weights="all", learning_rate=1e-3)],
)
def test_other_divergences_and_all_weights_fall_as_well(tiny_policy, tmp_path, settings):
    torch.manual_seed(1)
    figures = run_distill(tiny_policy, pairs_of(tiny_policy, 8), tmp_path, **{**DISTILL, **settings}, epochs=15)
    assert figures["kl_last"] < 0.7 * figures["kl_first"]
    moved = not torch.equal(tiny_policy.model.model.embed_tokens.weight, make_tiny_policy().model.model.embed_tokens.weight)
    assert moved == (settings.get("weights") == "all")


def test_the_same_seed_gives_the_same_weights_to_the_bit(tmp_path):
    def trained(seed, name):
        policy = make_tiny_policy()
        torch.manual_seed(0)  # of the adapters' start; the stages' runner does it
        run_distill(policy, pairs_of(policy, 6), tmp_path / name, seed=seed, **DISTILL)
        return weights(policy.model)

    first, again, other = trained(1, "a"), trained(1, "b"), trained(2, "c")
    assert equal(first, again)
    assert not equal(first, other)


def first_step(out, **settings):
    policy = make_tiny_policy()
    opinionated(policy.model)
    torch.manual_seed(1)
    figures = run_distill(policy, pairs_of(policy, 4), out, **DISTILL, **settings)
    return figures, pytest.approx({k: v for k, v in lines(out)[0].items() if k != "seconds"}, rel=1e-4)


def test_class_weights_make_a_weighted_mean(tmp_path):
    """Twice the weight on everything changes nothing; without thoughts it is another mean over fewer positions."""
    figures, plain = first_step(tmp_path / "plain")
    doubled = dict.fromkeys(("thought", "search", "answer", "tag"), 2.0)
    assert first_step(tmp_path / "double", class_weights=doubled)[1].expected == plain
    few, acting = first_step(tmp_path / "acting", class_weights={"thought": 0})
    assert acting.expected != plain
    assert few["positions"] == 4 * (6 + len("bel") + len("Fen"))
    assert figures["positions"] == 4 * sum(
        turn and len(turn.action_ids) for turn in pairs_of(make_tiny_policy(), 1)[0].student.turns
    )
    thoughts = dict(search=0, answer=0, tag=0)
    assert first_step(tmp_path / "thoughts", class_weights=thoughts)[1].expected != acting


@pytest.mark.parametrize("how", ["lora", "all"])
def test_fine_tuning_learns_each_reference_once_an_epoch_and_nobody_teaches(tmp_path, monkeypatch, how):
    def refuse(*_):
        raise AssertionError("a teacher was asked")

    monkeypatch.setattr(_Roles, "_teach", refuse)
    policy = make_tiny_policy()
    pairs = pairs_of(policy, 4, reference_searches=True)
    other = pairs[0].student.model_copy(update={"turns": pairs[0].student.turns[-1:]})
    doubled = [*pairs, pairs[0].model_copy(update={"student": other})]
    with torch.no_grad():
        terms = []
        for pair in pairs:
            own = pair.student.prompt_ids, pair.reference.response_ids
            mask = torch.tensor(pair.reference.action_mask).bool()
            terms.append(-token_logprobs(policy.model, _row(*own))[mask])
        expected = torch.cat(terms).mean().item()
    torch.manual_seed(1)
    figures = run_distill(policy, doubled, tmp_path, **DISTILL, objective="sft", weights=how, epochs=24)
    assert (figures["pairs"], figures["pairs_too_long"], figures["steps"]) == (4, 0, 24)
    assert figures["positions"] == sum(pair.reference.sampled_tokens for pair in pairs)
    assert lines(tmp_path)[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert figures["cross_entropy_last"] < figures["cross_entropy_first"] - 0.3
    assert not {"kl_first", "kl_last"} & set(figures)


def _row(prompt, response):
    return Sample(question_id="", prompt_ids=prompt, response_ids=response, action_mask=(1,) * len(response))


def test_pairs_too_long_are_left_out_and_counted(tiny_policy, tmp_path):
    pairs = pairs_of(tiny_policy, 4)
    pairs[0] = pairs[0].model_copy(update={"teacher_prompt_ids": (1,) * 1000})
    pairs[1] = pairs[1].model_copy(update={"shortened": True, "reference_shown": "cut"})
    figures = run_distill(tiny_policy, pairs, tmp_path, **DISTILL)
    assert (figures["pairs"], figures["pairs_too_long"], figures["pairs_shortened"]) == (3, 1, 1)


def test_pairs_of_another_tokenizer_are_refused(tiny_policy, tmp_path):
    (pair,) = pairs_of(tiny_policy, 1)
    turns = tuple(turn.model_copy(update={"action_ids": turn.action_ids[::-1]}) for turn in pair.student.turns)
    pair = pair.model_copy(update={"student": pair.student.model_copy(update={"turns": turns})})
    with pytest.raises(DataError, match="sampled with another tokenizer"):
        run_distill(tiny_policy, [pair], tmp_path, **DISTILL)
    assert not (tmp_path / "policy").exists()


def test_a_loss_that_is_not_finite_stops_with_the_batch_saved(tiny_policy, tmp_path):
    with torch.no_grad():
        tiny_policy.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan; the batch is in .*bad_batch\.pt"):
        run_distill(tiny_policy, pairs_of(tiny_policy, 2), tmp_path, **DISTILL)
    saved = torch.load(tmp_path / "bad_batch.pt", weights_only=False)
    assert len(saved["samples"]["distill"]) == 2
    assert saved["batch"].student.input_ids.shape[0] == 2
    assert not (tmp_path / "policy").exists()


def test_nothing_is_printed(tiny_policy, tmp_path, capfd):
    run_distill(tiny_policy, pairs_of(tiny_policy, 4), tmp_path, **DISTILL)
    assert capfd.readouterr() == ("", "")
