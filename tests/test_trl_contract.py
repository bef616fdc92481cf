"""What is relied on in TRL, one fact a test, on ``GRPOTrainer`` alone: when TRL moves, these say what moved."""

import copy
import warnings
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from conftest import make_tiny_policy
from search_e1.grpo.arguments import RESERVED
from search_e1.grpo.trainer import _FIGURES

QUESTIONS, GROUP, STEPS, MICRO = 2, 3, 2, 2
PROMPT = [5, 6, 7]
TEMPERATURE = 0.7
# One trajectory: sampled, inserted, sampled. Longer than max_completion_length, and it does not end with an end token.
MASK = [1, 1, 1, 0, 0, 0, 0, 1, 1]


@dataclass
class Record:
    """What one short training left behind."""

    calls: list[list[str]] = field(default_factory=list)  # prompts of each call of rollout_func
    completions: list[list[int]] = field(default_factory=list)
    train_mode: list[bool] = field(default_factory=list)
    reward_rows: list[list[int]] = field(default_factory=list)  # the extra field, as the reward function gets it
    inputs: list[dict[str, Any]] = field(default_factory=list)  # of each micro-batch
    losses: list[float] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)
    first_gradient: dict[str, torch.Tensor] = field(default_factory=dict)
    start: Any = None  # the model before training


class Recording(GRPOTrainer):
    record: Record

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.record.inputs.append(inputs)
        self.record.losses.append(loss.item())
        return loss

    def _clip_grad_norm(self, model):
        if not self.record.first_gradient:
            self.record.first_gradient.update(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )
        return super()._clip_grad_norm(model)

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        self.record.logs.append(dict(logs))


def make_trainer(tmp_path, record: Record, **changes) -> Recording:
    policy = make_tiny_policy()
    record.start = copy.deepcopy(policy.model)
    draw = torch.Generator().manual_seed(0)

    def rollout_func(prompts, trainer):
        record.calls.append(list(prompts))
        record.train_mode.append(trainer.model.training)
        completions = torch.randint(0, 255, (len(prompts), len(MASK)), generator=draw).tolist()
        record.completions += completions
        return {
            "prompt_ids": [PROMPT] * len(prompts),
            "completion_ids": completions,
            "env_mask": [MASK] * len(prompts),
            "logprobs": None,
            "row": list(range(len(prompts))),
        }

    def exact_match(row, log_metric, **_):
        record.reward_rows.append(row)
        log_metric("searches", 2.5)
        return [float(r in (0, 4)) for r in row]  # one right of the first three, one of the second three

    settings = dict(
        output_dir=str(tmp_path), loss_type="grpo", num_generations=GROUP, per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=QUESTIONS * GROUP // MICRO, generation_batch_size=QUESTIONS * GROUP, max_steps=STEPS,
        max_completion_length=4, temperature=TEMPERATURE, shuffle_dataset=False, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", logging_steps=1, disable_tqdm=True, save_strategy="no",
        learning_rate=1e-3, seed=1, dataloader_pin_memory=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Recording(
            model=policy.model,
            args=GRPOConfig(**{**settings, **changes}),
            reward_funcs=exact_match,
            train_dataset=Dataset.from_dict({"prompt": [f"q{i}" for i in range(QUESTIONS * STEPS)]}),
            processing_class=policy.tokenizer,
            rollout_func=rollout_func,
        )
    trainer.record = record
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> Record:
    record = Record()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_trainer(tmp_path_factory.mktemp("trl"), record).train()
    return record


def test_rollout_func_is_called_once_an_optimiser_step(record):
    assert len(record.calls) == STEPS


def test_prompts_arrive_repeated_siblings_side_by_side_in_the_order_of_the_data(record):
    assert record.calls == [["q0"] * 3 + ["q1"] * 3, ["q2"] * 3 + ["q3"] * 3]


def test_the_model_is_in_train_mode_during_rollouts(record):
    assert record.train_mode == [True, True]


def test_extra_fields_reach_the_reward_function_row_by_row(record):
    assert record.reward_rows == [[0, 1, 2, 3, 4, 5]] * STEPS


def test_completions_are_trained_on_whole_and_unchanged(record):
    trained = sorted(row for inputs in record.inputs[:3] for row in inputs["completion_ids"].tolist())
    assert trained == sorted(record.completions[:6])
    assert all(inputs["completion_mask"].all() for inputs in record.inputs)
    assert all(row == PROMPT for inputs in record.inputs for row in inputs["prompt_ids"].tolist())


def test_env_mask_is_kept_as_tool_mask_with_1_for_sampled(record):
    assert all(row == MASK for inputs in record.inputs for row in inputs["tool_mask"].tolist())


def test_advantages_are_reward_minus_mean_over_sample_deviation_of_the_group(record):
    deviation = torch.tensor([1.0, 0.0, 0.0]).std().item()  # of a sample: divided by n - 1
    right, wrong = (1 - 1 / 3) / (deviation + 1e-4), (0 - 1 / 3) / (deviation + 1e-4)
    rewards = {tuple(c): i in (0, 4) for i, c in enumerate(record.completions[:6])}
    for inputs in record.inputs[:3]:
        expected = [right if rewards[tuple(c)] else wrong for c in inputs["completion_ids"].tolist()]
        assert inputs["advantages"].tolist() == pytest.approx(expected, rel=1e-6)


def test_on_policy_steps_carry_no_old_logprobs(record):
    assert all("old_per_token_logps" not in inputs for inputs in record.inputs)


def test_the_gradient_is_that_of_the_mean_over_trajectories_of_the_mean_over_sampled_tokens(record):
    """Against an independent implementation on full logits, temperature included; micro-batches add up."""
    model = record.start.train()
    for inputs in record.inputs[:3]:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        logprobs = torch.log_softmax(model(ids).logits[:, len(PROMPT) - 1 : -1] / TEMPERATURE, -1)
        sampled = logprobs.gather(2, inputs["completion_ids"][:, :, None])[:, :, 0]
        mask = torch.tensor(MASK, dtype=torch.float32)
        (-(inputs["advantages"] * (sampled * mask).sum(1) / mask.sum()).mean() / 3).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(record.first_gradient[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_losses_of_micro_batches_are_already_divided_by_their_number(record):
    assert record.losses[0] == pytest.approx(-record.inputs[0]["advantages"].mean().item() / 3, abs=1e-6)


def test_a_trajectory_that_ends_without_end_token_counts_as_truncated(record):
    assert record.logs[0]["completions/clipped_ratio"] == 1.0


def test_the_figures_that_are_recorded_are_logged_every_step(record):
    theirs = {
        name for ours, name in _FIGURES.items() if ours not in ("kl", "sampled_tokens", "answered", "sampling_gap")
    }
    steps = [logs for logs in record.logs if "loss" in logs]
    assert len(steps) == STEPS
    assert all(theirs | {"frac_reward_zero_std"} <= set(logs) for logs in steps)
    assert steps[0]["reward"] == pytest.approx(1 / 3)
    assert steps[0]["frac_reward_zero_std"] == 0.0
    assert steps[0]["searches"] == 2.5


def test_a_ratio_beyond_the_clip_has_no_gradient(tmp_path):
    """With 0.2, and an advantage that would push it further out."""
    trainer = make_trainer(tmp_path, Record())
    trainer.current_gradient_accumulation_steps = 1
    ids, ones = torch.tensor([[9, 10]]), torch.ones(1, 2, dtype=torch.long)
    inputs = dict(prompt_ids=torch.tensor([PROMPT]), prompt_mask=torch.ones(1, 3, dtype=torch.long), completion_ids=ids,
                  completion_mask=ones, advantages=torch.tensor([1.0]))  # fmt: skip
    now, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, torch.tensor([[*PROMPT, 9, 10]]), torch.ones(1, 5, dtype=torch.long), 2
    )

    def gradient(ratio: float) -> float:
        trainer.model.zero_grad()
        old = now.detach() - torch.log(torch.tensor(ratio))
        trainer._compute_loss(trainer.model, {**inputs, "old_per_token_logps": old}).backward()
        return trainer.model.model.norm.weight.grad.abs().sum().item()

    assert gradient(1.19) > 0
    assert gradient(1.21) == 0
    assert gradient(0.5) > 0  # clipped from one side only: a good token that became rare is still pushed up


def test_what_must_be_changed_is_still_the_default(tmp_path):
    defaults = {f.name: f.default for f in fields(GRPOConfig)}
    assert defaults["loss_type"] == "dapo"
    assert defaults["beta"] == 0.0
    assert defaults["scale_rewards"] == "group"
    assert defaults["num_iterations"] == 1
    assert defaults["gradient_checkpointing"] is True
    assert GRPOConfig(output_dir=str(tmp_path), use_cpu=True).bf16 is True


def test_every_key_that_is_reserved_exists():
    assert set(RESERVED) <= {f.name for f in fields(GRPOConfig) if f.init}


def test_a_kl_penalty_loads_its_anchor_through_the_function_that_is_replaced(tmp_path, monkeypatch):
    anchor = make_tiny_policy().model
    monkeypatch.setattr(grpo_trainer, "create_model_from_path", lambda *_, **__: anchor)
    assert make_trainer(tmp_path, Record(), beta=0.1).ref_model is anchor


def test_telemetry_goes_through_the_method_that_is_overridden():
    assert callable(GRPOTrainer._send_telemetry)
