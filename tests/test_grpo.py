"""GRPO end to end on a policy of a few thousand weights that answers rightly now and then."""

import copy
import json
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import PASSAGES, TinyRetriever
from search_e1.config import GrpoConfig, LoraConfig, ReplayConfig
from search_e1.errors import RetrievalError, TrainingError
from search_e1.grpo import rollouts
from search_e1.grpo import trainer as grpo
from search_e1.rollout.loop import rollout
from search_e1.training.policy import Policy
from search_e1.types import Trajectory
from taught import LIMITS, QUESTIONS, teach

CONFIG = GrpoConfig(steps=2, questions_per_step=2, group_size=6, learning_rate=3e-3)


@pytest.fixture(scope="module")
def taught() -> Policy:
    return teach()


@pytest.fixture
def policy(taught) -> Policy:
    return copy.deepcopy(taught)


class Spy:
    """Keeps what was sampled and what was trained on."""

    def __init__(self, monkeypatch) -> None:
        self.rollouts: list[list[Trajectory]] = []
        self.inputs: list[dict[str, torch.Tensor]] = []
        self.hidden: list[torch.Tensor] = []  # last hidden states of each training forward, with their gradients
        compute_loss = grpo.GRPOTrainer._compute_loss

        def recording_rollout(*args, **kwargs):
            self.rollouts.append(rollout(*args, **kwargs))
            return self.rollouts[-1]

        def recording_loss(trainer, model, inputs):
            self.inputs.append(inputs)

            def keep(_, __, output):
                output.last_hidden_state.retain_grad()
                self.hidden.append(output.last_hidden_state)

            handle = model.base_model.register_forward_hook(keep)
            try:
                return compute_loss(trainer, model, inputs)
            finally:
                handle.remove()

        monkeypatch.setattr(rollouts, "rollout", recording_rollout)
        monkeypatch.setattr(grpo.GRPOTrainer, "_compute_loss", recording_loss)

    @property
    def trajectories(self) -> dict[tuple[int, ...], Trajectory]:
        return {t.prompt_ids + t.response_ids: t for batch in self.rollouts for t in batch}


def rows(inputs: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    """Prompt and response of each row, without padding."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1).bool()
    return [tuple(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)]


def run(policy: Policy, out, config: GrpoConfig = CONFIG, seed: int = 3, **kwargs) -> dict[str, float]:
    return grpo.train(policy, QUESTIONS, TinyRetriever(PASSAGES), config, LIMITS, seed=seed, out=out, **kwargs)


def with_trainer(config: GrpoConfig, **trainer) -> GrpoConfig:
    return config.model_copy(update={"trainer": trainer})


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_ids_trained_on_are_the_ids_sampled(policy, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    run(policy, tmp_path)
    assert [len(batch) for batch in spy.rollouts] == [12, 12]  # 2 questions x 6, anew for each optimiser step
    sampled = Counter(t.prompt_ids + t.response_ids for batch in spy.rollouts for t in batch)
    assert Counter(row for inputs in spy.inputs for row in rows(inputs)) == sampled
    for inputs in spy.inputs:
        for row, keep, mask in zip(rows(inputs), inputs["completion_mask"].bool(), inputs["tool_mask"], strict=True):
            assert tuple(mask[keep].tolist()) == spy.trajectories[row].action_mask
    assert any(0 in t.action_mask for t in spy.trajectories.values())


def test_observations_get_exactly_no_gradient(policy, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    run(policy, tmp_path)
    learned = observed = 0
    for inputs, hidden in zip(spy.inputs, spy.hidden, strict=True):
        width = inputs["completion_ids"].shape[1]
        at_completion = hidden.grad[:, -width - 1 : -1]  # the position before an id predicts it
        sampled = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        assert not hidden.grad[:, : -width - 1].any()
        assert not at_completion[~sampled].any()
        observed += int((inputs["completion_mask"].bool() & ~sampled).sum())
        learned += int(at_completion[sampled].any(-1).sum())
        taught_something = inputs["advantages"] != 0
        assert at_completion[taught_something][sampled[taught_something]].any(-1).all()
    assert observed > 50
    assert learned > 50


def test_advantages_are_normalised_in_the_group_of_each_question(policy, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    run(policy, tmp_path)
    per_step = len(spy.inputs) // CONFIG.steps
    mixed = 0
    for step, batch in enumerate(spy.rollouts):
        expected = Counter()
        for at in (0, 6):
            group = batch[at : at + 6]
            assert len({t.question_id for t in group}) == 1
            rewards = [t.reward for t in group]
            mean = sum(rewards) / 6
            deviation = (sum((r - mean) ** 2 for r in rewards) / 5) ** 0.5
            mixed += 0 < mean < 1
            for t in group:
                expected[t.prompt_ids + t.response_ids, round((t.reward - mean) / (deviation + 1e-4), 4)] += 1
        found = Counter()
        for inputs in spy.inputs[step * per_step : (step + 1) * per_step]:
            found.update(zip(rows(inputs), (round(a, 4) for a in inputs["advantages"].tolist()), strict=True))
        assert found == expected
    assert mixed >= 2


def test_the_same_seed_gives_the_same_weights_to_the_bit(taught, tmp_path):
    results = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        policy = copy.deepcopy(taught)
        torch.manual_seed(ord(name))  # whatever state the stage finds
        (tmp_path / name).mkdir()
        run(policy, tmp_path / name, seed=seed)
        results.append(weights(policy))
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])
    assert not equal(results[0], taught.model.state_dict())


def test_rewards_go_up(policy, tmp_path):
    rare = [question.model_copy(update={"answers": ("Fen",)}) for question in QUESTIONS]
    config = CONFIG.model_copy(update={"steps": 8, "questions_per_step": 3})
    figures = grpo.train(policy, rare, TinyRetriever(PASSAGES), config, LIMITS, seed=0, out=tmp_path)
    assert figures["reward_last"] > figures["reward_first"] + 0.3
    assert 0 < figures["mixed"] <= 1


def test_steps_are_written_and_told(policy, tmp_path):
    told = []
    figures = run(policy, tmp_path, progress=lambda *args: told.append(args))
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert told == [(i, 2, f"reward {line['reward']:.3f}") for i, line in enumerate(lines, 1)]
    for line in lines:
        assert {"reward", "reward_std", "mixed", "searches", "sampled_tokens", "answered", "loss", "grad_norm"} < set(
            line
        )
        assert line["entropy"] > 0
        assert line["clip_ratio"] == 0  # on-policy: every ratio is 1
        assert line["seconds"] > 0
    assert figures["reward_first"] == pytest.approx(lines[0]["reward"], abs=1e-4)
    assert figures["steps"] == 2


def test_the_saved_policy_is_the_trained_one_and_plain(policy, taught, tmp_path):
    run(policy, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert equal(loaded.state_dict(), weights(policy))
    assert "forward" not in vars(policy.model)
    assert policy.model.config.use_cache is True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "steps.jsonl"]
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(policy.model(ids).logits, loaded(ids).logits)


def test_lora_is_merged_into_a_plain_trainable_model(policy, taught, tmp_path):
    run(policy, tmp_path, CONFIG.model_copy(update={"lora": LoraConfig(rank=4, alpha=8), "learning_rate": 1e-2}))
    assert type(policy.model) is type(taught.model)
    assert all(parameter.requires_grad for parameter in policy.model.parameters())
    before, after = taught.model.state_dict(), policy.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("proj.weight")}
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict(), after)


def test_micro_batches_do_not_change_the_step(taught, tmp_path):
    config = CONFIG.model_copy(update={"steps": 1, "replay": ReplayConfig(examples_per_step=2, weight=0.5)})
    results = []
    for micro in (1, 12):
        policy = copy.deepcopy(taught)
        (tmp_path / str(micro)).mkdir()
        # Plain descent: Adam's first step is the gradient's sign, which rounding can turn.
        run(policy, tmp_path / str(micro), with_trainer(config, per_device_train_batch_size=micro, optim="sgd"))
        results.append(weights(policy))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-5, atol=1e-6)
    assert not equal(results[0], taught.model.state_dict())


def test_a_failing_retriever_stops_training(policy, tmp_path):
    class Failing:
        def search(self, queries, topk):
            raise RetrievalError("http://nowhere: no answer")

    with pytest.raises(RetrievalError, match="nowhere"):
        grpo.train(policy, QUESTIONS, Failing(), CONFIG, LIMITS, seed=0, out=tmp_path)
    assert not (tmp_path / "policy").exists()


def test_a_loss_that_is_not_finite_stops_training_and_leaves_the_batch(policy, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    honest = grpo.GRPOTrainer._compute_loss
    monkeypatch.setattr(grpo.GRPOTrainer, "_compute_loss", lambda *args: honest(*args) * torch.nan)
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan; the batch is in .*bad_batch\.pt"):
        run(policy, tmp_path)
    saved = torch.load(tmp_path / "bad_batch.pt")
    assert rows(saved["inputs"]) == rows(spy.inputs[0])
    assert not (tmp_path / "policy").exists()


def test_a_gradient_that_is_not_finite_stops_training(policy, tmp_path):
    policy.model.model.norm.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingError, match="step 1: the gradient's norm is"):
        run(policy, tmp_path)
    assert (tmp_path / "bad_batch.pt").exists()


def test_no_steps_leave_the_policy_as_it_is(policy, taught, tmp_path):
    assert run(policy, tmp_path, CONFIG.model_copy(update={"steps": 0})) == {"steps": 0}
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict(), taught.model.state_dict())
