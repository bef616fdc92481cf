"""The GRPO stage on a policy of a few thousand weights that answers rightly now and then."""

import copy
import json
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from search_e1.config import GrpoConfig
from search_e1.errors import ConfigError, DataError, RetrievalError
from search_e1.runs.context import StageContext
from search_e1.stages import grpo as stage
from search_e1.stages.grpo import check, question_order, sample_of
from search_e1.training.objectives.grpo import Grpo, advantages, length_penalties
from search_e1.training.policy import Policy
from search_e1.training.trained import TrainedPolicy
from search_e1.types import ActionKind, Group, Question, Sample, StopReason, Trajectory, Turn
from stages_run import run_grpo
from taught import QUESTIONS, teach
from trained import equal, logprobs, token_logprobs, weights

GRPO = {"steps": 2, "questions_per_step": 2, "group_size": 6, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def taught() -> Policy:
    policy = teach()
    policy.model.eval()
    return policy


@pytest.fixture
def policy(taught) -> Policy:
    return copy.deepcopy(taught)


class Spy:
    """Keeps what was sampled and what was trained on, step by step."""

    def __init__(self, monkeypatch) -> None:
        self.groups: list[list[Group]] = []
        self.samples: list[dict[str, list[Sample]]] = []
        self.batches: list[Any] = []
        honest, run, sampled = stage.GroupSource.next, TrainedPolicy.run, stage.GroupSource._sample

        def next_(source, step):
            self.samples.append(honest(source, step))
            return self.samples[-1]

        def sampling(source, step, asked):
            self.groups.append(sampled(source, step, asked))
            return self.groups[-1]

        def recorded(policy, batch, *args):
            self.batches.append(batch)
            return run(policy, batch, *args)

        monkeypatch.setattr(stage.GroupSource, "next", next_)
        monkeypatch.setattr(stage.GroupSource, "_sample", sampling)
        monkeypatch.setattr(TrainedPolicy, "run", recorded)

    @property
    def trajectories(self) -> list[list[Trajectory]]:
        return [[t for group in step for t in group.trajectories] for step in self.groups]


def lines(out) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


def test_the_ids_trained_on_are_the_ids_sampled(policy, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    run_grpo(policy, tmp_path, grpo={**GRPO, "kl_coefficient": 0.1})  # with it every trajectory makes a pass
    assert [len(step) for step in spy.trajectories] == [12, 12]  # 2 questions x 6, anew for each step
    for trajectories, samples in zip(spy.trajectories, spy.samples, strict=True):
        for t, s in zip(trajectories, samples["grpo"], strict=True):
            assert (s.prompt_ids, s.response_ids, s.action_mask) == (t.prompt_ids, t.response_ids, t.action_mask)
            assert (s.sampling_logprobs, s.weights, s.teacher_prompt_ids) == (None, None, None)
    assert any(0 in t.action_mask for step in spy.trajectories for t in step)
    trained = Counter()
    for batch in spy.batches:
        ids, at = batch.student.input_ids, batch.student.index
        assert torch.equal(ids.flatten()[at + 1], batch.targets)
        trained.update(map(tuple, ids.tolist()))
    padded = Counter()
    for row, count in trained.items():
        while row and row[-1] == 0:
            row = row[:-1]
        padded[row] += count
    sampled = Counter(t.prompt_ids + t.response_ids for step in spy.trajectories for t in step)
    assert set(padded) == set(sampled)


def test_advantages_are_normalised_in_the_group_of_each_question(policy, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    run_grpo(policy, tmp_path, grpo=GRPO)
    mixed = 0
    for groups, samples in zip(spy.groups, spy.samples, strict=True):
        gains = [s.advantages for s in samples["grpo"]]
        assert all(set(gain) == {gain[0]} and len(gain) == len(s.response_ids)
                   for gain, s in zip(gains, samples["grpo"], strict=True))  # fmt: skip
        for i, group in enumerate(groups):
            rewards = torch.tensor([t.reward for t in group.trajectories])
            expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            assert [gain[0] for gain in gains[6 * i : 6 * i + 6]] == pytest.approx(expected.tolist(), abs=1e-5)
            mixed += 0 < rewards.mean() < 1
    assert mixed >= 2


def test_the_first_step_is_the_gradient_of_the_groups_by_hand(policy, taught, tmp_path, monkeypatch):
    """On-policy, with hindsight and replay: every reported figure, from plain logits of the policy as it began."""
    spy = Spy(monkeypatch)
    run_grpo(policy, tmp_path, grpo={
        **GRPO, "steps": 1, "hindsight": {"weight": 0.25}, "replay": {"examples_per_step": 2, "weight": 0.5},
    })  # fmt: skip
    (record,), (samples,), (trajectories,) = lines(tmp_path), spy.samples, spy.trajectories
    assert record["reward"] == pytest.approx(sum(t.reward for t in trajectories) / 12)
    assert record["searches"] == pytest.approx(sum(t.searches for t in trajectories) / 12)
    assert record["sampled_tokens"] == pytest.approx(sum(t.sampled_tokens for t in trajectories) / 12)
    assert record["answered"] == pytest.approx(sum(t.answer is not None for t in trajectories) / 12)
    assert record["mixed"] == pytest.approx(sum(len({t.reward for t in group.trajectories}) > 1 for group in spy.groups[0]) / 2)
    assert "shaped_reward" not in record
    with torch.no_grad():
        replayed = torch.cat([-token_logprobs(taught.model, s)[list(s.positions)] for s in samples["replay"]]).mean()
        terms = []
        for s in samples["hindsight"]:
            student = logprobs(taught.model, s.prompt_ids, s.response_ids)[list(s.positions)]
            teacher = logprobs(taught.model, s.teacher_prompt_ids, s.response_ids)[list(s.positions)]
            mixture = torch.log((student.exp() + teacher.exp()) / 2)
            terms += (0.5 * (teacher.exp() * (teacher - mixture) + student.exp() * (student - mixture)).sum(-1)).unbind()
        divergence = torch.stack(terms).mean().item()
    assert len(samples["replay"]) == 2
    assert len(terms) >= 6
    assert record["replay_cross_entropy"] == pytest.approx(replayed.item(), rel=1e-4)
    assert record["hindsight_divergence"] == pytest.approx(divergence, rel=1e-3)
    # The policy gradient's own loss is minus the mean advantage, since every ratio is 1.
    own = -sum(s.advantages[0] for s in samples["grpo"]) / 12
    assert record["loss"] == pytest.approx(own + 0.25 * divergence + 0.5 * replayed.item(), rel=1e-3, abs=1e-5)
    assert record["entropy"] > 0
    assert {t.question_id for t in trajectories} == {s.question_id for s in samples["grpo"]}


def test_a_length_penalty_shapes_the_advantages_and_not_the_rewards(policy, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    run_grpo(policy, tmp_path, grpo={**GRPO, "steps": 1, "length_penalty": 0.5})
    (record,), (groups,) = lines(tmp_path), spy.groups
    shaped = [
        [t.reward + taken for t, taken in zip(group.trajectories, length_penalties(group.trajectories, 0.5), strict=True)]
        for group in groups
    ]
    assert {t.reward for group in groups for t in group.trajectories} == {0.0, 1.0}
    assert record["reward"] == pytest.approx(sum(t.reward for group in groups for t in group.trajectories) / 12)
    assert record["shaped_reward"] == pytest.approx(sum(map(sum, shaped)) / 12)
    assert record["shaped_reward"] < record["reward"]
    expected = [gain for own in shaped for gain in advantages(own)]
    assert [s.advantages[0] for s in spy.samples[0]["grpo"]] == pytest.approx(expected)


def test_the_same_seed_gives_the_same_weights_to_the_bit(taught, tmp_path):
    results = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        policy = copy.deepcopy(taught)
        torch.manual_seed(ord(name))  # whatever state the stage finds
        run_grpo(policy, tmp_path / name, seed=seed, grpo=GRPO)
        results.append(weights(policy.model))
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])
    assert not equal(results[0], taught.model.state_dict())


def test_what_is_turned_off_changes_no_bit(taught, tmp_path):
    off = {
        "hindsight": {"weight": 0.0}, "evidence": {"strength": 0.0, "bound": 0.5}, "gated": {"weight": 0.0},
        "correction": {"strength": 0.0, "bound": 1.0},
        "replay": {"examples_per_step": 2, "weight": 0},
    }  # fmt: skip
    results = {}
    for name, sections in {
        "plain": {},
        "off": {"grpo": off},
        # A teacher that sees nothing has no lead.
        "null": {"grpo": {"evidence": {"strength": 1.0}}, "reference": {"shows": "none"}},
        "null correction": {"grpo": {"correction": {"strength": 1.0}}, "reference": {"shows": "none"}},
        "on": {"grpo": {"evidence": {"strength": 1.0}}},
        "correction": {"grpo": {"correction": {"strength": 0.2}}},
        "gated": {"grpo": {"gated": {"weight": 0.01}}},
    }.items():
        policy = copy.deepcopy(taught)
        run_grpo(policy, tmp_path / name, **{**sections, "grpo": {**GRPO, "steps": 1, **sections.get("grpo", {})}})
        results[name] = weights(policy.model)
    assert equal(results["plain"], results["off"])
    assert equal(results["plain"], results["null"])
    assert equal(results["plain"], results["null correction"])
    assert not equal(results["plain"], results["on"])
    assert not equal(results["plain"], results["correction"])
    assert not equal(results["plain"], results["gated"])


def test_rewards_go_up(policy, tmp_path):
    rare = [question.model_copy(update={"answers": ("Fen",)}) for question in QUESTIONS]
    figures = run_grpo(policy, tmp_path, seed=0, questions=rare, grpo={**GRPO, "steps": 8, "questions_per_step": 3})
    assert figures["reward_last"] > figures["reward_first"] + 0.3
    assert 0 < figures["mixed"] <= 1


def test_replay_keeps_the_policy_following_references(taught, tmp_path):
    """The policy has never seen a privileged prompt."""
    first, last = {}, {}
    for count in (1, 3):
        run_grpo(copy.deepcopy(taught), tmp_path / str(count), grpo={
            **GRPO, "steps": 8, "questions_per_step": 3, "replay": {"examples_per_step": count},
        })  # fmt: skip
        record = lines(tmp_path / str(count))
        first[count], last[count] = record[0]["replay_cross_entropy"], record[-1]["replay_cross_entropy"]
    assert last[3] < 0.5 * first[3]


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}])
def test_a_kl_penalty_is_to_the_policy_as_the_stage_began(taught, tmp_path, monkeypatch, lora):
    spy = Spy(monkeypatch)
    made: list[Sample] = []
    honest = Grpo.prepare
    monkeypatch.setattr(Grpo, "prepare", lambda *args: made.extend(honest(*args)) or made[-12:])
    policy = copy.deepcopy(taught)
    grpo = {**GRPO, "kl_coefficient": 0.5, "learning_rate": 1e-2, **({"lora": lora} if lora else {})}
    run_grpo(policy, tmp_path, grpo=grpo)
    first, second = lines(tmp_path)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 1e-3
    assert len(made) == sum(map(len, spy.trajectories)) == 24
    for s in made:
        at = list(s.positions)
        expected = token_logprobs(taught.model, s).detach()[at]
        torch.testing.assert_close(torch.tensor(s.ref_logprobs)[at], expected, rtol=1e-3, atol=1e-4)
    assert type(policy.model) is type(taught.model)
    assert all(parameter.requires_grad for parameter in policy.model.parameters())


def test_the_saved_policy_is_the_trained_one_and_plain(policy, tmp_path):
    shown = []
    context = StageContext(tmp_path, seed=3, progress=lambda *args: shown.append(args))
    figures = run_grpo(policy, tmp_path, context=context, grpo={**GRPO, "lora": {"rank": 4, "alpha": 8}})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert equal(loaded.state_dict(), weights(policy.model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "steps.jsonl"]
    assert shown == [(i, 2, f"reward {line['reward']:.4g}") for i, line in enumerate(lines(tmp_path), 1)]
    assert (figures["steps"], figures["halved"]) == (2, 0)
    assert figures["reward_first"] == pytest.approx(lines(tmp_path)[0]["reward"])
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(policy.model(ids).logits, loaded(ids).logits)


def test_no_steps_leave_the_policy_as_it_is(policy, taught, tmp_path):
    assert run_grpo(policy, tmp_path, grpo={**GRPO, "steps": 0}) == {"steps": 0}
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict(), taught.model.state_dict())


def test_a_failing_retriever_stops_training(policy, tmp_path):
    class Failing:
        def search(self, queries, topk):
            raise RetrievalError("http://nowhere: no answer")

    with pytest.raises(RetrievalError, match="nowhere"):
        run_grpo(policy, tmp_path, retriever=Failing(), grpo=GRPO)
    assert not (tmp_path / "policy").exists()


def test_sizes_that_do_not_fit_are_refused(policy, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"grpo\.questions_per_step = 4, but there are 3 training questions; lower it"):
        run_grpo(policy, tmp_path, grpo={**GRPO, "questions_per_step": 4})
    with pytest.raises(DataError, match="same id"):
        check(GrpoConfig(questions_per_step=1), [*QUESTIONS, QUESTIONS[0]])
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(ConfigError, match="= 2 cannot be shared by 5 processes; raise it"):
        check(GrpoConfig(questions_per_step=2), QUESTIONS)


def test_every_pass_asks_every_question_in_an_order_of_its_own():
    questions = [Question(id=str(i), text="?", answers=("a",)) for i in range(10)]
    config = GrpoConfig(steps=5, questions_per_step=5)
    order = [question.id for question in question_order(questions, config, seed=1)]
    assert len(order) == 25
    assert sorted(order[:10]) == sorted(order[10:20]) == sorted(q.id for q in questions)
    assert order[:10] != order[10:20]
    assert order == [question.id for question in question_order(questions, config, seed=1)]


def test_an_engine_of_other_arithmetic_gives_its_log_probabilities():
    search = Turn(action_ids=(1, 2), action_text="s", kind=ActionKind.SEARCH, argument="s", observation_ids=(3, 3, 3),
                  sampling_logprobs=(-0.5, -0.25))  # fmt: skip
    answer = Turn(action_ids=(4,), action_text="a", kind=ActionKind.ANSWER, argument="a", sampling_logprobs=(-2.0,))
    t = Trajectory(question_id="q", prompt_ids=(9,), turns=(search, answer), stop_reason=StopReason.ANSWERED, answer="a")
    made = sample_of(t, 0.5, reweighed=True)
    assert made.sampling_logprobs == (-0.5, -0.25, 0.0, 0.0, 0.0, -2.0)
    assert made.advantages == (0.5,) * 6
    assert sample_of(t, 0.5).sampling_logprobs is None
