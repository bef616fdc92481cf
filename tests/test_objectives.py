"""Each objective against the same thing in plain torch, row by row from the whole model's logits."""

import copy
import math

import pytest
import torch
from torch.nn import functional

from conftest import make_tiny_policy
from made_pairs import gemma_policy, lfm2_policy
from search_e1.config import DistillConfig, GatedConfig, LoraConfig, TrainingConfig
from search_e1.errors import ConfigError
from search_e1.training.batch import make_batch, normalized_weights, packs
from search_e1.training.objectives import objectives, open_objective
from search_e1.training.objectives.gated import Gated
from search_e1.training.objectives.hindsight import Hindsight
from search_e1.training.objectives.self_distillation import SelfDistillation
from search_e1.training.objectives.sft import Sft
from search_e1.training.policy import with_adapter
from search_e1.training.trained import TrainedPolicy
from trained import (
    CONFIG,
    assert_near,
    config_of,
    equal,
    gradients,
    grpo,
    logprobs,
    opinionated,
    run,
    sample,
    token_logprobs,
)

LORA = LoraConfig(rank=4, alpha=8)
FAMILIES = {"qwen2": make_tiny_policy, "lfm2": lfm2_policy, "gemma2": gemma_policy}


@pytest.fixture(scope="module")
def tiny():
    return opinionated(make_tiny_policy().model)


def spread(adapted, scale=0.3):
    """Give the adapter an effect; it starts with none."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, scale)
    return adapted


def taught_samples(**fields):
    """Three whose teachers' prompts are of other lengths than theirs, longer and shorter."""
    return [sample(i, 4 + 3 * i, 8 + 3 * i, teacher=(21, 7, 6)[i], **fields) for i in range(3)]


def class_weighted(samples):
    """Weights 0, 1 and 2 in turn."""
    return [
        s.model_copy(update={"weights": tuple(float((i + at) % 3) for at in range(len(s.response_ids)))})
        for i, s in enumerate(samples)
    ]


def mean_over_positions(samples, terms):
    """Weighted mean of ``terms``, a [response] for each sample."""
    total = sum((torch.tensor([(s.weights or s.action_mask)[i] for i in s.positions]) * t[list(s.positions)]).sum()
                for s, t in zip(samples, terms, strict=True))  # fmt: skip
    return total / sum((s.weights or s.action_mask)[i] for s in samples for i in s.positions)


def autograd(loss, model):
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def divergence_terms(config, t, s):
    """[response] of log-probabilities [response, V]."""
    m = (config.beta * t.exp() + (1 - config.beta) * s.exp()).log()
    terms = {
        "forward_kl": t.exp() * (t - s),
        "reverse_kl": s.exp() * (s - t),
        "js": config.beta * t.exp() * (t - m) + (1 - config.beta) * s.exp() * (s - m),
    }[config.divergence]
    terms = terms.clamp(max=config.tau) if config.clip == "entry" else terms
    return terms.sum(-1).clamp(max=config.tau if config.clip == "token" else math.inf)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(tau=0.05),
        dict(clip="token", tau=0.2),
        dict(clip="none"),
        dict(divergence="reverse_kl"),
        dict(divergence="js", beta=0.3),
        dict(teacher_temperature=0.4),
        dict(training={"logits_mib": 1}),
    ],
    ids=str,
)
def test_self_distillation_teacher_without_the_adapter_student_with_it(family, settings):
    config = DistillConfig(**settings)
    model = spread(with_adapter(opinionated(FAMILIES[family]().model, 2), LORA))
    samples = class_weighted(taught_samples())
    loss, found, figures = gradients(model, samples, SelfDistillation(config))
    terms = []
    for s in samples:
        with torch.no_grad(), model.disable_adapter():
            teacher = logprobs(model, s.teacher_prompt_ids, s.response_ids, config.teacher_temperature)
        terms.append(divergence_terms(config, teacher, logprobs(model, s.prompt_ids, s.response_ids)))
    expected = mean_over_positions(samples, terms)
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert figures["divergence"] == pytest.approx(expected.item(), rel=1e-4)
    assert_near(found, autograd(expected, model), 1e-4)
    assert all("lora_" in name for name in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_self_distillation_of_all_weights_has_a_frozen_teacher(family, tmp_path):
    """Also in the second step, when the student has moved; its head is its own."""
    model = opinionated(FAMILIES[family]().model, 2)
    start = copy.deepcopy(model)
    samples = taught_samples()
    config = DistillConfig()
    source = [{"distill": samples}] * 2
    records, trained = run(model, source, {"distill": SelfDistillation(config)}, tmp_path, learning_rate=3e-3)

    def loss(student):
        terms = [
            divergence_terms(
                config,
                logprobs(start, s.teacher_prompt_ids, s.response_ids).detach(),
                logprobs(student, s.prompt_ids, s.response_ids),
            )
            for s in samples
        ]
        return mean_over_positions(samples, terms)

    assert records[0]["loss"] == pytest.approx(loss(start).item(), rel=1e-5)
    student = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.0)
    for record in records:
        optimizer.zero_grad()
        value = loss(student)
        value.backward()
        assert record["loss"] == pytest.approx(value.item(), rel=1e-3)
        optimizer.step()
    before, after = start.state_dict(), trained.state_dict()
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_teacher_and_student_agree_exactly_if_their_prompts_do(tiny):
    """The adapter starts with no effect, so only the prompt can tell them apart; a shift by one position would."""
    model = with_adapter(copy.deepcopy(tiny), LORA)
    same = [s.model_copy(update={"teacher_prompt_ids": s.prompt_ids}) for s in taught_samples()]
    objective = SelfDistillation(DistillConfig())
    assert gradients(model, same, objective)[0] == pytest.approx(0, abs=1e-9)
    assert gradients(model, taught_samples(), objective)[0] > 1e-3


def test_fine_tuning_is_cross_entropy(tiny):
    model = spread(with_adapter(copy.deepcopy(tiny), LORA))
    for samples in ([sample(i, 4 + i, 9 + i) for i in range(3)], class_weighted([sample(i, 5, 14) for i in range(4)])):
        terms = []
        for s in samples:
            logits = model(torch.tensor([[*s.prompt_ids, *s.response_ids]])).logits[0, len(s.prompt_ids) - 1 : -1]
            terms.append(functional.cross_entropy(logits, torch.tensor(s.response_ids), reduction="none"))
        expected = mean_over_positions(samples, terms)
        model.zero_grad()
        by_hand = autograd(expected, model)
        for packed in (False, True):
            loss, found, figures = gradients(model, samples, Sft(weight=1.0), packed=packed)
            assert loss == pytest.approx(expected.item(), rel=1e-5)
            assert figures["cross_entropy"] == pytest.approx(expected.item(), rel=1e-5)
            assert_near(found, by_hand, 1e-5)


def test_hindsight_is_the_divergence_from_the_policy_as_it_is_now(tiny):
    """With adapters too the teacher has them on, and no gradient goes through it."""
    for model in (copy.deepcopy(tiny), spread(with_adapter(copy.deepcopy(tiny), LORA))):
        samples = class_weighted(taught_samples())
        objective = Hindsight(0.25)
        loss, found, figures = gradients(model, samples, objective)
        config = DistillConfig(divergence="js", clip="none")
        terms = [
            divergence_terms(
                config,
                logprobs(model, s.teacher_prompt_ids, s.response_ids).detach(),
                logprobs(model, s.prompt_ids, s.response_ids),
            )
            for s in samples
        ]
        expected = mean_over_positions(samples, terms)
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        assert figures["divergence"] == pytest.approx(expected.item(), rel=1e-4)
        assert_near(found, autograd(0.25 * expected, model), 1e-4)


def test_gated_distillation_weighs_what_was_sampled_by_a_constant_gate(tiny):
    """SDAR's loss (arXiv:2605.15155) by hand: no gradient through the gate, none through the teacher."""
    for sharpness in (0.0, 5.0):
        model = spread(with_adapter(copy.deepcopy(tiny), LORA))
        samples = class_weighted(taught_samples())
        objective = Gated(GatedConfig(weight=0.25, sharpness=sharpness), temperature=0.7)
        prepared = objective.prepare(TrainedPolicy(model, CONFIG, frozen_start=True), samples)
        assert all(s.teacher_prompt_ids is None for s in prepared)
        loss, found, figures = gradients(model, samples, objective)
        terms, gates = [], []
        for s in samples:
            ids = torch.tensor(s.response_ids)[:, None]
            teacher, plain = (
                (logprobs(model, prompt, s.response_ids) / 0.7).log_softmax(-1).gather(1, ids)
                for prompt in (s.teacher_prompt_ids, s.prompt_ids)
            )
            gap = (teacher.detach() - plain)[:, 0]
            gates.append(torch.sigmoid(sharpness * gap.detach()))
            terms.append(gates[-1] * gap)
        expected = mean_over_positions(samples, terms)
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        assert figures["gate"] == pytest.approx(mean_over_positions(samples, gates).item(), rel=1e-4)
        assert_near(found, autograd(0.25 * expected, model), 1e-4)
        if not sharpness:
            assert figures["gate"] == pytest.approx(0.5)


def policy_of(model, **config):
    return TrainedPolicy(model, TrainingConfig(**config), frozen_start=True)


def test_log_probabilities_of_samples_whatever_their_number_a_pass(tiny):
    model = spread(with_adapter(copy.deepcopy(tiny), LORA)).train()
    samples = [*taught_samples(), sample(5, action_mask=(0,) * 8, teacher=3)]
    for tokens in (1, 60, 10_000):
        policy = policy_of(model, micro_batch_tokens=tokens)
        for teacher in (None, "current", "start"):
            for s, found in zip(samples, policy.logprobs(samples, 0.7, teacher), strict=True):
                prompt = s.prompt_ids if teacher is None else s.teacher_prompt_ids
                row = s.model_copy(update={"prompt_ids": prompt})
                with torch.no_grad():
                    if teacher == "start":
                        with model.disable_adapter():
                            expected = token_logprobs(model, row, 0.7)
                    else:
                        expected = token_logprobs(model, row, 0.7)
                expected = expected * torch.tensor([float(i in s.positions) for i in range(len(s.response_ids))])
                torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)
    assert model.training
    assert policy_of(tiny).logprobs([]) == []


def test_grpo_prepares_what_it_needs_and_no_more(tiny):
    samples = [sample(i, 4 + i, 9 + i, advantage=0.5) for i in range(3)]
    policy = policy_of(copy.deepcopy(tiny))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.1)  # not the start any more
    (plain,) = grpo().prepare(policy, samples[:1])
    assert plain == samples[0]

    def assert_of(model, row, s):
        expected = token_logprobs(model, s, 0.7).detach() * torch.tensor(s.action_mask)
        torch.testing.assert_close(torch.tensor(row), expected, rtol=1e-4, atol=1e-5)

    for change in ({"mini_batches": 2}, {"epochs": 2}):
        for s, made in zip(samples, grpo(temperature=0.7, **change).prepare(policy, samples), strict=True):
            assert_of(policy.model, made.old_logprobs, s)
            assert made.ref_logprobs is None
    for s, made in zip(samples, grpo(temperature=0.7, kl_coefficient=0.1).prepare(policy, samples), strict=True):
        assert made.old_logprobs is None
        assert_of(tiny, made.ref_logprobs, s)
        assert made.teacher_prompt_ids is None
    other_engine = [s.model_copy(update={"sampling_logprobs": (-1.0,) * len(s.response_ids)}) for s in samples]
    for s, made in zip(samples, grpo(temperature=0.7).prepare(policy, other_engine), strict=True):
        assert_of(policy.model, made.old_logprobs, s)


def every_objective():
    return {
        "grpo": grpo(kl_coefficient=0.1, mini_batches=2),
        "self_distillation": SelfDistillation(DistillConfig()),
        "sft": Sft(),
        "hindsight": Hindsight(1.0),
        "gated": Gated(GatedConfig(weight=1.0), 1.0),
    }


@pytest.mark.parametrize("name", every_objective())
@pytest.mark.parametrize("packed", [False, True])
def test_observations_and_prompts_receive_exactly_zero_gradient(tiny, name, packed):
    """At the hidden states that predict them nothing arrives; at those that predict an action it does."""
    model = spread(with_adapter(copy.deepcopy(tiny), LORA))
    samples = taught_samples(advantage=1.0)
    kept = []

    def keep(module, args, output):
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.retain_grad()
            kept.append(output.last_hidden_state)

    objective, policy = every_objective()[name], TrainedPolicy(model, CONFIG, frozen_start=True)
    prepared = objective.prepare(policy, samples)
    model.get_base_model().get_decoder().register_forward_hook(keep)
    policy.packed = packed
    policy.model.train()
    weights = normalized_weights(prepared, objective.average, lambda own: own)
    batch = make_batch(prepared, weights, packed=packed)
    policy.run(batch, objective.loss, objective.teacher)[0].backward()
    assert len(kept) == 1  # the teacher's pass has no gradient
    gradient = kept[0].grad.flatten(0, 1).abs().sum(-1)
    predicting = torch.zeros(len(gradient), dtype=torch.bool)
    predicting[batch.student.index] = True
    assert gradient[~predicting].max().item() == 0
    assert gradient[predicting].min().item() > 0
    assert predicting.sum() == sum(sum(s.action_mask) for s in samples)


@pytest.mark.parametrize("name", every_objective())
def test_what_is_not_sampled_changes_no_bit_of_the_gradient(tiny, name):
    """Other ids in an observation at the end, which nothing sampled reads."""
    found = []
    for last in ((50, 51), (60, 61)):
        s = sample(1, teacher=9, advantage=1.0)
        s = s.model_copy(update={"response_ids": (*s.response_ids[:6], *last), "action_mask": (1, 1, 1, 0, 0, 1, 0, 0)})
        found.append(gradients(tiny, [s, sample(2, 4, 19, teacher=6, advantage=-1.0)], every_objective()[name]))
    assert found[0][0] == found[1][0]
    assert equal(found[0][1], found[1][1])


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
@pytest.mark.parametrize("name", every_objective())
def test_packed_and_padded_batches_agree(family, name):
    model = opinionated(FAMILIES[family]().model, 2)
    assert packs(model)
    samples = taught_samples(advantage=1.0)
    padded, packed = (gradients(model, samples, every_objective()[name], packed=packed) for packed in (False, True))
    assert packed[0] == pytest.approx(padded[0], rel=1e-4, abs=1e-6)
    assert_near(packed[1], padded[1], 1e-4)


def test_objectives_by_name(tmp_path):
    config = config_of(tmp_path, grpo={"clip_low": 0.1}, distill={"tau": 3.0})
    assert set(objectives.names) >= {"grpo", "self_distillation", "sft"}
    assert open_objective("grpo", "grpo.objective", config).config.clip_low == 0.1
    assert open_objective("grpo", "grpo.objective", config).max_tokens == config.rollout.max_tokens
    assert open_objective("self_distillation", "distill.objective", config).config.tau == 3.0
    assert isinstance(open_objective("sft", "distill.objective", config), Sft)
    for name, says in {
        "self_destillation": "did you mean 'self_distillation'?",
        "zzz": "known: grpo",
        "no_such_module:Loss": "No module named 'no_such_module'; give an importable module:attribute",
        "math:Loss": "give an importable module:attribute",
    }.items():
        with pytest.raises(ConfigError, match=r"^distill\.objective = ") as refusal:
            open_objective(name, "distill.objective", config)
        assert says in str(refusal.value)
        assert "\n" not in str(refusal.value)
