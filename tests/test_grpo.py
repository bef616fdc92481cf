"""GRPO end to end on a policy of a few thousand weights that answers rightly now and then."""

import copy
import json
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import PASSAGES, TinyRetriever
from search_e1.config import GrpoConfig, LoraConfig, ReplayConfig
from search_e1.errors import ConfigError, DataError, RetrievalError, TrainingError
from search_e1.grpo import batching, replay, rollouts
from search_e1.grpo import trainer as grpo
from search_e1.grpo.arguments import trl_arguments
from search_e1.policy import Policy
from search_e1.prompts import privileged_prompt
from search_e1.rollout.loop import rollout
from search_e1.types import Group, Question, Trajectory
from taught import HABITS, LIMITS, QUESTIONS, scripted, teach

CONFIG = GrpoConfig(steps=2, questions_per_step=2, group_size=6, learning_rate=3e-3)


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


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"epsilonn": 0.1}, r"unknown key grpo\.trainer\.epsilonn; did you mean 'epsilon'\?"),
        ({"num_generations": 4}, r"grpo\.trainer\.num_generations: set `grpo\.group_size`"),
        ({"use_vllm": True}, r"grpo\.trainer\.use_vllm: set `rollout\.engine"),
        ({"mask_truncated_completions": True}, r"grpo\.trainer\.mask_truncated_completions: it would drop"),
        ({"beta": "none"}, r"grpo\.trainer\.beta = 'none': Input should be a valid number"),
        ({"optim": "adamm"}, r"grpo\.trainer.*adamm"),
        ({"per_device_train_batch_size": 5}, r"batch_size = 5 does not divide the 12 trajectories of a step; use 4"),
        ({"per_device_train_batch_size": 0}, r"batch_size = 0 does not divide"),
    ],
)
def test_a_trainer_key_that_cannot_be_used_is_refused(policy, taught, tmp_path, trainer, message):
    with pytest.raises(ConfigError, match=message) as error:
        run(policy, tmp_path, with_trainer(CONFIG, **trainer))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    assert equal(weights(policy), taught.model.state_dict())


def test_sizes_that_do_not_fit_are_refused(policy, tmp_path, monkeypatch):
    with pytest.raises(
        ConfigError, match=r"grpo\.questions_per_step = 4, but there are 3 training questions; lower it"
    ):
        run(policy, tmp_path, CONFIG.model_copy(update={"questions_per_step": 4}))
    with pytest.raises(DataError, match="same id"):
        grpo.train(policy, QUESTIONS * 2, TinyRetriever(PASSAGES), CONFIG, LIMITS, seed=0, out=tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(ConfigError, match="= 12 trajectories cannot be shared by 5 processes"):
        run(policy, tmp_path)


@pytest.mark.parametrize(
    ("questions", "group", "trainer", "micro", "micro_batches"),
    [(64, 5, {}, 16, 20), (3, 5, {}, 15, 1), (2, 17, {}, 2, 17), (16, 8, {"per_device_train_batch_size": 64}, 64, 2)],
)
def test_one_optimiser_step_is_one_generation_batch(tmp_path, questions, group, trainer, micro, micro_batches):
    config = GrpoConfig(questions_per_step=questions, group_size=group, trainer=trainer)
    arguments = trl_arguments(config, LIMITS, 100, seed=0, out=tmp_path, device=torch.device("cpu"))
    assert arguments.per_device_train_batch_size == micro
    assert arguments.gradient_accumulation_steps == arguments.steps_per_generation == micro_batches
    assert arguments.generation_batch_size == questions * group
    assert (arguments.loss_type, arguments.scale_rewards, arguments.beta, arguments.epsilon) == (
        "grpo",
        "group",
        0.0,
        0.2,
    )
    assert (arguments.bf16, arguments.max_steps, arguments.learning_rate) == (False, 200, 1e-6)


def test_micro_batches_are_dealt_by_length_and_cut():
    def batch(*rows: tuple[list[int], list[int], float]) -> dict[str, torch.Tensor]:
        prompts = torch.tensor([[0] * (3 - len(p)) + p for p, _, _ in rows])
        completions = torch.tensor([c + [0] * (4 - len(c)) for _, c, _ in rows])
        advantages = torch.tensor([a for _, _, a in rows])
        masks = dict(prompt_mask=(prompts > 0).long(), completion_mask=(completions > 0).long())
        ids = dict(prompt_ids=prompts, completion_ids=completions)
        return dict(**ids, **masks, advantages=advantages, num_items_in_batch=torch.tensor(9))

    first, second = batching.by_length(
        [
            batch(([1, 2], [3], 0.1), ([4, 5, 6], [7, 8, 9, 10], 0.2)),
            batch(([11], [12, 13], 0.3), ([14], [15, 16, 17], 0.4)),
        ]
    )
    assert first["prompt_ids"].tolist() == [[4, 5, 6], [0, 0, 14]]
    assert first["completion_ids"].tolist() == [[7, 8, 9, 10], [15, 16, 17, 0]]
    assert first["advantages"].tolist() == pytest.approx([0.2, 0.4])
    assert second["prompt_ids"].tolist() == [[0, 11], [1, 2]]
    assert second["prompt_mask"].tolist() == [[0, 1], [1, 1]]
    assert second["completion_ids"].tolist() == [[12, 13], [3, 0]]
    assert second["completion_mask"].tolist() == [[1, 1], [1, 0]]
    assert second["num_items_in_batch"] == 9


def test_every_pass_asks_every_question_in_an_order_of_its_own():
    questions = [Question(id=str(i), text="?", answers=("a",)) for i in range(10)]
    order = batching.order(questions, GrpoConfig(steps=5, questions_per_step=5), seed=1)
    assert len(order) == 25
    assert sorted(order[:10]) == sorted(order[10:20]) == sorted(q.id for q in questions)
    assert order[:10] != order[10:20]
    assert order == batching.order(questions, GrpoConfig(steps=5, questions_per_step=5), seed=1)


def test_no_steps_leave_the_policy_as_it_is(policy, taught, tmp_path):
    assert run(policy, tmp_path, CONFIG.model_copy(update={"steps": 0})) == {"steps": 0}
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict(), taught.model.state_dict())


# Replay


def group_of(policy: Policy, *scripts: list[str]) -> Group:
    return Group(question=QUESTIONS[0], trajectories=tuple(scripted(policy, QUESTIONS[0], list(scripts))))


def test_an_example_shows_the_reference_and_asks_for_its_own_ids(policy):
    group = group_of(policy, HABITS[3], HABITS[1], HABITS[0], HABITS[2])
    reference = group.trajectories[3]  # correct without a search
    assert group.reference == reference
    (example,) = replay.examples(
        policy.tokenizer, policy.prompts, [group], ReplayConfig(examples_per_step=3, detours=0), 1024
    )
    assert example.prompt_ids == privileged_prompt(
        policy.tokenizer, policy.prompts, QUESTIONS[0].text, "<answer>Bel</answer>"
    )
    assert example.response_ids == tuple(policy.tokenizer.encode("<answer>Bel</answer>"))
    assert example.loss_mask == (1,) * len(example.response_ids)


def test_a_detour_precedes_the_reference_and_carries_no_loss(policy):
    group = group_of(policy, HABITS[0], HABITS[1])
    config = ReplayConfig(examples_per_step=1, detours=1)
    (example,) = replay.examples(policy.tokenizer, policy.prompts, [group], config, 1024)
    reference, sibling = group.trajectories
    detour = sibling.turns[0].action_ids + sibling.turns[0].observation_ids
    assert example.response_ids == detour + reference.response_ids
    assert example.loss_mask == (0,) * len(detour) + reference.action_mask
    assert 0 in reference.action_mask


def test_examples_are_as_many_as_asked_for_where_there_is_a_reference(policy):
    right, wrong = group_of(policy, HABITS[0]), group_of(policy, HABITS[1])

    def count(groups: list[Group], context_length: int = 1024, **config) -> int:
        return len(replay.examples(policy.tokenizer, policy.prompts, groups, ReplayConfig(**config), context_length))

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
