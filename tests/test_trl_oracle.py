"""GRPO's loss, gradient and advantages are those of TRL's trainer on the same trajectories. TRL is nothing but the oracle."""

import copy
import warnings
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOConfig as TrlConfig
from trl import GRPOTrainer

from conftest import make_tiny_policy
from search_e1.training.objectives.grpo import advantages
from search_e1.types import Sample
from trained import assert_near, gradients, grpo, opinionated, sample, token_logprobs

LOW, HIGH, CAP, LIMIT = 0.2, 0.28, 1.5, 64


def make_trainer(out, model: Any, **changes: Any) -> GRPOTrainer:
    settings = dict(
        output_dir=str(out), num_generations=3, per_device_train_batch_size=6, max_steps=1, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", disable_tqdm=True, save_strategy="no", max_grad_norm=1e9,
        max_completion_length=LIMIT, epsilon=LOW, epsilon_high=HIGH, dataloader_pin_memory=False, logging_steps=1,
        shuffle_dataset=False, use_bias_correction_kl=False,
    )  # fmt: skip
    made = dict(
        model=model, processing_class=make_tiny_policy().tokenizer, reward_funcs=lambda prompts, **_: [0.0] * len(prompts),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
    ) | {name: changes.pop(name) for name in ("reward_funcs", "rollout_func", "train_dataset") if name in changes}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = GRPOTrainer(args=TrlConfig(**settings | changes), **made)
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.fixture(scope="module")
def model() -> Any:
    return opinionated(make_tiny_policy().model)


@pytest.fixture(scope="module", params=[1.0, 0.7])
def trainer(request, tmp_path_factory, model) -> GRPOTrainer:
    """Of a temperature."""
    trainer = make_trainer(tmp_path_factory.mktemp("trl"), copy.deepcopy(model).train(), temperature=request.param)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def rows_of(samples: list[Sample], name: str, *, left: bool = False) -> torch.Tensor:
    rows = [torch.tensor(getattr(s, name)) for s in samples]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left" if left else "right")


def by_trl(trainer: GRPOTrainer, samples: list[Sample], settings: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of one batch in TRL; prompts are padded on the left there, responses on the right."""
    lengths = torch.tensor([[len(s.prompt_ids), len(s.response_ids)] for s in samples])
    prompts, responses = rows_of(samples, "prompt_ids", left=True), rows_of(samples, "response_ids")
    mask = rows_of(samples, "action_mask")
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": (torch.arange(prompts.shape[1]) >= prompts.shape[1] - lengths[:, :1]).long(),
        "completion_ids": responses,
        "completion_mask": (torch.arange(responses.shape[1]) < lengths[:, 1:]).long(),
        "tool_mask": mask,
        "advantages": torch.tensor([s.advantages[0] for s in samples]),
        "num_items_in_batch": mask.sum(),
    }
    if samples[0].old_logprobs is not None:
        inputs["old_per_token_logps"] = rows_of(samples, "old_logprobs")
    if samples[0].ref_logprobs is not None:
        inputs["ref_per_token_logps"] = rows_of(samples, "ref_logprobs")
    if samples[0].sampling_logprobs is not None:  # what TRL makes of vLLM's, by token_truncate
        gap = rows_of(samples, "old_logprobs") - rows_of(samples, "sampling_logprobs")
        inputs["importance_sampling_ratio"] = torch.exp(gap).clamp(max=CAP)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(trainer, name, value)
        patch.setattr(trainer, "use_vllm", samples[0].sampling_logprobs is not None)
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
    return loss.item(), {name: weight.grad for name, weight in trainer.model.named_parameters()}


def trajectories(model: Any, *, temperature=1.0, old=False, ref=False, sampling=False) -> list[Sample]:
    """Six of different lengths; old log-probabilities make ratios of 0.6 to 1.6."""
    gains = [1.2, -0.7, -0.5, 0.9, 0.4, -1.3]
    made = [sample(i, 3 + i, 8 + 5 * i, advantage=gain) for i, gain in enumerate(gains)]
    draw = torch.Generator().manual_seed(7)
    for i, s in enumerate(made):
        with torch.no_grad():
            now = token_logprobs(model, s, temperature)

        def shifted(by, spread, now=now):
            return tuple((by + spread * torch.randn(now.shape, generator=draw)).tolist())

        fields = {}
        if old:
            ratio = torch.empty(now.shape).uniform_(0.6, 1.6, generator=draw)
            fields["old_logprobs"] = tuple((now - ratio.log()).tolist())
        if ref:
            fields["ref_logprobs"] = shifted(now, 0.3)
        if sampling:
            fields["sampling_logprobs"] = shifted(torch.tensor(fields["old_logprobs"]), 0.5)
        made[i] = s.model_copy(update=fields)
    return made


@pytest.mark.parametrize("average", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize(
    "off",
    [{}, {"old": True}, {"ref": True}, {"old": True, "ref": True}, {"old": True, "ref": True, "sampling": True}],
    ids=["on-policy", "clipped", "kl", "clipped-kl", "other-engine"],
)
def test_loss_and_gradient(model, trainer, average, off):
    temperature = trainer.temperature
    samples = trajectories(model, temperature=temperature, **off)
    kl = 0.3 if off.get("ref") else 0.0
    objective = grpo(
        LIMIT, average=average, temperature=temperature, kl_coefficient=kl, clip_low=LOW, clip_high=HIGH,
        importance_cap=CAP,
    )  # fmt: skip
    settings = {"loss_type": average, "beta": kl}
    expected_loss, expected = by_trl(trainer, samples, settings)
    for packed in (False, True):
        loss, found, figures = gradients(model, samples, objective, packed=packed, prepared=True)
        assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
        assert_near(found, expected, 1e-5)
    if off.get("old"):
        assert 0.1 < figures["clip_ratio"] / weight_of(samples, objective) < 0.6


def weight_of(samples: list[Sample], objective: Any) -> float:
    """Of all positions together."""
    count = sum(sum(s.action_mask) for s in samples)
    return count / (len(samples) * LIMIT) if objective.average == "constant" else 1.0


def test_the_clip_binds_on_both_sides(model):
    samples = trajectories(model, old=True)
    ratios = torch.cat([(token_logprobs(model, s).detach() - torch.tensor(s.old_logprobs)).exp() for s in samples])
    gains = torch.cat([torch.tensor(s.advantages) for s in samples])
    for beyond in (ratios < 1 - LOW, ratios > 1 + HIGH):
        assert (beyond & (gains > 0)).sum() > 5
        assert (beyond & (gains < 0)).sum() > 5


@pytest.mark.parametrize("average", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_whole_step_of_trls_trainer(tmp_path, model, average, scaled):
    """From rewards to the gradient, through TRL's own rollouts, groups, advantages and micro-batches of two."""
    samples = [sample(i, 3 + i % 3, 8 + 5 * i) for i in range(6)]
    rewards = [1.0, 0.0, 0.25, 1.0, 1.0, 0.5]
    seen: dict[tuple[int, ...], float] = {}
    gradient: dict[str, torch.Tensor] = {}

    class Recording(GRPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            for ids, mask, gain in zip(inputs["completion_ids"], inputs["completion_mask"], inputs["advantages"], strict=True):
                seen[tuple(ids[mask.bool()].tolist())] = gain.item()
            return super().compute_loss(model, inputs, *args, **kwargs)

        def _clip_grad_norm(self, model):
            gradient.update({name: weight.grad.clone() for name, weight in model.named_parameters()})
            return super()._clip_grad_norm(model)

    def rollout(prompts, trainer):
        assert prompts == ["a"] * 3 + ["b"] * 3
        return {
            "prompt_ids": [list(s.prompt_ids) for s in samples],
            "completion_ids": [list(s.response_ids) for s in samples],
            "env_mask": [list(s.action_mask) for s in samples],
            "logprobs": None,
            "row": list(range(6)),
        }

    trainer = make_trainer(
        tmp_path, copy.deepcopy(model), rollout_func=rollout, reward_funcs=lambda row, **_: [rewards[i] for i in row],
        loss_type=average, scale_rewards="group" if scaled else "none", per_device_train_batch_size=2,
        gradient_accumulation_steps=3, generation_batch_size=6,
    )  # fmt: skip
    trainer.__class__ = Recording
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    gains = [*advantages(rewards[:3], scaled=scaled), *advantages(rewards[3:], scaled=scaled)]
    for s, gain in zip(samples, gains, strict=True):
        assert seen[s.response_ids] == pytest.approx(gain, rel=1e-5, abs=1e-6)
    ours = [s.model_copy(update={"advantages": (gain,) * len(s.response_ids)}) for s, gain in zip(samples, gains, strict=True)]
    _, found, _ = gradients(model, ours, grpo(LIMIT, average=average))
    assert_near(found, gradient, 1e-5)
