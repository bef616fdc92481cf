"""Examples of following a reference, trained on beside GRPO."""

import copy
import json
from typing import Any

import pytest
import torch

from search_e1.config import ReplayConfig
from search_e1.grpo import replay
from search_e1.text.prompts import privileged_prompt
from search_e1.training.policy import Policy
from search_e1.types import Group
from taught import HABITS, QUESTIONS, scripted, teach
from test_grpo import CONFIG, equal, run, weights, with_trainer


@pytest.fixture(scope="module")
def taught() -> Policy:
    return teach()


def cross_entropy(model: Any, examples: list[replay.Example]) -> torch.Tensor:
    """Mean over sampled tokens, from plain logits."""
    total, count = torch.zeros(()), 0
    for e in examples:
        ids = torch.tensor([[*e.prompt_ids, *e.response_ids]])
        logprobs = torch.log_softmax(model(ids).logits[0, len(e.prompt_ids) - 1 : -1], -1)
        mask = torch.tensor(e.loss_mask)
        total = total - (logprobs.gather(1, torch.tensor(e.response_ids)[:, None])[:, 0] * mask).sum()
        count += int(mask.sum())
    return total / count


def group_of(policy: Policy, *scripts: list[str]) -> Group:
    return Group(question=QUESTIONS[0], trajectories=tuple(scripted(policy, QUESTIONS[0], list(scripts))))


def test_an_example_shows_the_reference_and_asks_for_its_own_ids(taught):
    group = group_of(taught, HABITS[3], HABITS[1], HABITS[0], HABITS[2])
    reference = group.trajectories[3]  # correct without a search
    assert group.reference == reference
    (example,) = replay.examples(
        taught.tokenizer, taught.prompts, [group], ReplayConfig(examples_per_step=3, detours=0), 1024
    )
    assert example.prompt_ids == privileged_prompt(
        taught.tokenizer, taught.prompts, QUESTIONS[0].text, "<answer>Bel</answer>"
    )
    assert example.response_ids == tuple(taught.tokenizer.encode("<answer>Bel</answer>"))
    assert example.loss_mask == (1,) * len(example.response_ids)


def test_a_detour_precedes_the_reference_and_carries_no_loss(taught):
    group = group_of(taught, HABITS[0], HABITS[1])
    config = ReplayConfig(examples_per_step=1, detours=1)
    (example,) = replay.examples(taught.tokenizer, taught.prompts, [group], config, 1024)
    reference, sibling = group.trajectories
    detour = sibling.turns[0].action_ids + sibling.turns[0].observation_ids
    assert example.response_ids == detour + reference.response_ids
    assert example.loss_mask == (0,) * len(detour) + reference.action_mask
    assert 0 in reference.action_mask


def test_examples_are_as_many_as_asked_for_where_there_is_a_reference(taught):
    right, wrong = group_of(taught, HABITS[0]), group_of(taught, HABITS[1])

    def count(groups: list[Group], context_length: int = 1024, **config) -> int:
        return len(replay.examples(taught.tokenizer, taught.prompts, groups, ReplayConfig(**config), context_length))

    assert count([wrong, right, wrong, right, right], examples_per_step=2) == 2
    assert count([wrong, right], examples_per_step=2) == 1
    assert count([right], examples_per_step=0) == 0
    assert count([right], examples_per_step=1, weight=0) == 0
    assert count([right], examples_per_step=1, context_length=100) == 0


def test_replay_turned_off_changes_no_bit(taught, tmp_path):
    results = []
    for i, config in enumerate(
        (ReplayConfig(), ReplayConfig(examples_per_step=2, weight=0), ReplayConfig(examples_per_step=2))
    ):
        policy = copy.deepcopy(taught)
        (tmp_path / str(i)).mkdir()
        run(policy, tmp_path / str(i), CONFIG.model_copy(update={"replay": config}))
        results.append(weights(policy))
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])


def test_replay_adds_the_gradient_of_the_mean_cross_entropy(taught, tmp_path, monkeypatch):
    """One step of plain descent with and without replay differs by learning rate x weight x gradient."""
    made: list[list[replay.Example]] = []
    honest = replay.examples
    monkeypatch.setattr(replay, "examples", lambda *args: made.append(honest(*args)) or made[-1])
    after = {}
    for weight in (0.0, 0.25):
        policy = copy.deepcopy(taught)
        (tmp_path / str(weight)).mkdir()
        config = CONFIG.model_copy(
            update={"steps": 1, "learning_rate": 0.1, "replay": ReplayConfig(examples_per_step=2, weight=weight)}
        )
        run(
            policy,
            tmp_path / str(weight),
            with_trainer(config, optim="sgd", max_grad_norm=0.0, per_device_train_batch_size=2),
        )
        after[weight] = weights(policy)
    assert len(made[-1]) == 2
    model = copy.deepcopy(taught).model
    loss = cross_entropy(model, made[-1])
    loss.backward()
    for name, parameter in model.named_parameters():
        moved = after[0.0][name] - after[0.25][name]
        torch.testing.assert_close(moved, 0.1 * 0.25 * parameter.grad, rtol=1e-3, atol=1e-6)
    line = json.loads((tmp_path / "0.25" / "steps.jsonl").read_text())
    assert line["replay_cross_entropy"] == pytest.approx(loss.item(), rel=1e-4)
    assert line["replay_examples"] == 2


def test_replay_keeps_the_policy_following_references(taught, tmp_path):
    # The policy has never seen a privileged prompt; the reference is the habit that it has least of.
    groups = [group_of(taught, HABITS[2], HABITS[1])]
    config = ReplayConfig(examples_per_step=1, detours=0)
    examples = replay.examples(taught.tokenizer, taught.prompts, groups, config, 1024)
    after = {}
    for count in (0, 3):
        policy = copy.deepcopy(taught)
        (tmp_path / str(count)).mkdir()
        config = dict(steps=8, questions_per_step=3, replay=ReplayConfig(examples_per_step=count))
        run(policy, tmp_path / str(count), CONFIG.model_copy(update=config))
        after[count] = cross_entropy(policy.model, examples).item()
    assert after[3] < 0.5 * after[0]
    lines = [json.loads(line) for line in (tmp_path / "3" / "steps.jsonl").read_text().splitlines()]
    assert lines[-1]["replay_cross_entropy"] < 0.5 * lines[0]["replay_cross_entropy"]
