"""What TRL is given: arguments that fit together, questions in their order, micro-batches."""

import pytest
import torch

from conftest import PASSAGES, TinyRetriever
from search_e1.config import GrpoConfig
from search_e1.errors import ConfigError, DataError
from search_e1.grpo import batching
from search_e1.grpo import trainer as grpo
from search_e1.grpo.arguments import trl_arguments
from search_e1.training.policy import Policy
from search_e1.types import Question
from taught import LIMITS, QUESTIONS, teach
from test_grpo import CONFIG, equal, run, weights, with_trainer


@pytest.fixture(scope="module")
def taught() -> Policy:
    return teach()


@pytest.fixture
def policy() -> Policy:
    return teach()


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
