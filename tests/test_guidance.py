"""Hindsight and evidence: the policy's own teacher within a GRPO step."""

import copy
import json
import math
from typing import Any

import pytest
import torch

from conftest import PASSAGES, TinyRetriever
from search_e1.config import EvidenceConfig, GrpoConfig, HindsightConfig, LoraConfig, ReferenceConfig
from search_e1.grpo import guidance, rollouts
from search_e1.grpo import trainer as grpo
from search_e1.rollout.loop import rollout
from search_e1.text.prompts import privileged_prompt
from search_e1.training.policy import Policy
from search_e1.types import Group, Trajectory
from taught import HABITS, LIMITS, QUESTIONS, scripted, teach

CONFIG = GrpoConfig(steps=1, questions_per_step=2, group_size=6, learning_rate=0.1).model_copy(
    update={"trainer": {"optim": "sgd", "max_grad_norm": 0.0, "per_device_train_batch_size": 4}}
)


@pytest.fixture(scope="module")
def taught() -> Policy:
    return teach()


class Run:
    """One training, and what went into its losses."""

    def __init__(
        self, taught: Policy, out, monkeypatch, *, shown: ReferenceConfig | None = None, silent: bool = False, **changes
    ) -> None:
        """``silent``: GRPO's own loss counts for nothing."""
        self.trajectories: list[Trajectory] = []
        self.inputs: list[dict[str, Any]] = []
        self.hidden: list[torch.Tensor] = []
        honest = grpo.GRPOTrainer._compute_loss

        def sampling(*args: Any, **kwargs: Any) -> list[Trajectory]:
            self.trajectories = rollout(*args, **kwargs)
            return self.trajectories

        def loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            self.inputs.append(inputs)

            def keep(_: Any, __: Any, output: Any) -> None:
                output.last_hidden_state.retain_grad()
                self.hidden.append(output.last_hidden_state)

            decoder = trainer.model.get_decoder()
            handle = decoder.register_forward_hook(keep)
            try:
                return honest(trainer, model, inputs) * (0 if silent else 1)
            finally:
                handle.remove()

        out.mkdir()
        self.policy = copy.deepcopy(taught)
        with monkeypatch.context() as patch:
            patch.setattr(rollouts, "rollout", sampling)
            patch.setattr(grpo.GRPOTrainer, "_compute_loss", loss)
            grpo.train(
                self.policy, QUESTIONS, TinyRetriever(PASSAGES), CONFIG.model_copy(update=changes), LIMITS,
                shown or ReferenceConfig(), seed=3, out=out,
            )  # fmt: skip
        self.lines = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]

    def weights(self) -> dict[str, torch.Tensor]:
        return self.policy.model.state_dict()

    def siblings(self) -> list[tuple[Trajectory, tuple[int, ...]]]:
        """Those with a teacher, and its prompt."""
        made = []
        for question in QUESTIONS:
            group = tuple(t for t in self.trajectories if t.question_id == question.id)
            reference = Group(question=question, trajectories=group).reference if group else None
            if reference is not None:
                policy = self.policy
                prompt = privileged_prompt(policy.tokenizer, policy.prompts, question.text, reference.text)
                made += [(t, prompt) for t in group if t != reference]
        return made


def logprobs(model: Any, prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
    """[response, V]"""
    return torch.log_softmax(model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1], -1)


def queries(policy: Policy, trajectory: Trajectory) -> list[int]:
    """Places of the ids inside <search>, for a tokenizer that has an id for each tag."""
    found, at = [], 0
    opened, closed = policy.tokenizer.convert_tokens_to_ids(["<search>", "</search>"])
    for turn in trajectory.turns:
        inside = False
        for place, one in enumerate(turn.action_ids, at):
            inside = inside and one != closed
            found += [place] * inside
            inside = inside or one == opened
        at += len(turn.action_ids) + len(turn.observation_ids)
    return found


def test_the_correction_by_hand():
    two = math.log(2)
    lead = torch.tensor([[0.0, two, -two, 0.1]] * 3)
    made = guidance.corrected(torch.tensor([2.0, -1.0, 0.0]), lead, strength=0.5, bound=0.2)
    expected = [[2.0, 2.2, 1.8, 2.105171], [-1.0, -0.9, -1.1, -0.952419], [0.0] * 4]
    torch.testing.assert_close(made, torch.tensor(expected), atol=1e-6, rtol=0)


def test_the_correction_is_bounded_and_keeps_signs():
    lead = torch.tensor([[1e4, -1e4, 3.0, -3.0]] * 2)
    made = guidance.corrected(torch.tensor([1.5, -0.5]), lead, strength=1.0, bound=0.99)
    torch.testing.assert_close(made / torch.tensor([[1.5], [-0.5]]), torch.tensor(
        [[1.99, 0.01, 1.99, math.exp(-3)], [0.01, 1.99, math.exp(-3), 1.99]]
    ))  # fmt: skip
    same = torch.tensor([1.5, -0.5])
    assert torch.equal(guidance.corrected(same, lead, strength=0.0, bound=0.5), same[:, None].expand(2, 4))


def test_a_reference_and_groups_without_one_have_no_teacher(taught):
    right = Group(question=QUESTIONS[0], trajectories=tuple(scripted(taught, QUESTIONS[0], [HABITS[0], HABITS[1]])))
    wrong = Group(question=QUESTIONS[1], trajectories=tuple(scripted(taught, QUESTIONS[1], [HABITS[0], HABITS[0]])))
    everyone = right.trajectories + wrong.trajectories
    rows = guidance.siblings(taught.tokenizer, taught.prompts, [right, wrong], everyone, 1024, ReferenceConfig())
    assert [row is None for row in rows] == [True, False, True, True]
    assert rows[1].response_ids == right.trajectories[1].response_ids
    assert rows[1].loss_mask == right.trajectories[1].action_mask
    assert rows[1].prompt_ids == privileged_prompt(
        taught.tokenizer, taught.prompts, QUESTIONS[0].text, right.trajectories[0].text
    )
    assert (
        guidance.siblings(taught.tokenizer, taught.prompts, [right], everyone[:2], 100, ReferenceConfig()) == [None] * 2
    )


def test_the_mask_of_queries(taught):
    (trajectory,) = scripted(taught, QUESTIONS[0], [HABITS[0]])
    mask = guidance.class_mask(taught.tokenizer, taught.prompts, trajectory, ["search"])
    assert [i for i, one in enumerate(mask) if one] == queries(taught, trajectory)
    assert taught.tokenizer.decode([i for i, one in zip(trajectory.response_ids, mask, strict=True) if one]) == "Arda"
    acting = guidance.class_mask(taught.tokenizer, taught.prompts, trajectory, ["search", "answer", "tag", "thought"])
    assert tuple(acting) == trajectory.action_mask


def test_turned_off_they_change_no_bit(taught, tmp_path, monkeypatch):
    plain = Run(taught, tmp_path / "plain", monkeypatch)
    off = Run(
        taught, tmp_path / "off", monkeypatch,
        hindsight=HindsightConfig(teacher_temperature=0.5), evidence=EvidenceConfig(bound=0.5),
    )  # fmt: skip
    # A teacher that sees nothing has no lead.
    null = Run(
        taught, tmp_path / "null", monkeypatch, shown=ReferenceConfig(shows="none"),
        evidence=EvidenceConfig(strength=1.0),
    )  # fmt: skip
    for other in (off, null):
        assert all(torch.equal(tensor, other.weights()[name]) for name, tensor in plain.weights().items())
    assert off.lines[0].keys() == plain.lines[0].keys()
    assert (null.lines[0]["evidence_lead"], null.lines[0]["evidence_correction"]) == (0, 0)
    assert null.lines[0]["evidence_siblings"] > 0


def test_evidence_weighs_each_token_by_the_lead_of_the_teacher(taught, tmp_path, monkeypatch):
    run = Run(taught, tmp_path / "run", monkeypatch, evidence=EvidenceConfig(strength=0.5, bound=0.3))
    with torch.no_grad():
        leads = {
            t.prompt_ids + t.response_ids: (
                logprobs(taught.model, prompt, t.response_ids) - logprobs(taught.model, t.prompt_ids, t.response_ids)
            ).gather(1, torch.tensor(t.response_ids)[:, None])[:, 0] * torch.tensor(t.action_mask)
            for t, prompt in run.siblings()
        }  # fmt: skip
    rewards = {t.prompt_ids + t.response_ids: t for t in run.trajectories}
    checked = changed = 0
    for inputs in run.inputs:
        for i in range(len(inputs["completion_ids"])):
            ids = torch.cat([inputs["prompt_ids"][i], inputs["completion_ids"][i]])
            kept = torch.cat([inputs["prompt_mask"][i], inputs["completion_mask"][i]]).bool()
            key = tuple(ids[kept].tolist())
            found = inputs["advantages"][i, : len(rewards[key].response_ids)]
            group = [t.reward for t in run.trajectories if t.question_id == rewards[key].question_id]
            deviation = torch.tensor(group).std().item()
            plain = (rewards[key].reward - sum(group) / 6) / (deviation + 1e-4)
            lead = leads.get(key, torch.zeros(len(found)))
            weight = (math.copysign(1, plain) * lead).exp().clamp(0.7, 1.3)
            torch.testing.assert_close(found, plain * (0.5 + 0.5 * weight), atol=1e-3, rtol=1e-3)
            checked += 1
            changed += bool((found != found[0]).any())
    assert checked == 12
    assert changed >= 2
    sampled = [(t, row) for t, _ in run.siblings() if (row := leads[t.prompt_ids + t.response_ids]) is not None]
    tokens = sum(t.sampled_tokens for t, _ in sampled)
    assert run.lines[0]["evidence_lead"] == pytest.approx(sum(r.sum().item() for _, r in sampled) / tokens, rel=1e-3)
    assert run.lines[0]["evidence_siblings"] == len(sampled)
    assert 0 < run.lines[0]["evidence_correction"] <= 0.5 * 0.3


def test_hindsight_teaches_the_queries_of_siblings_and_nothing_else(taught, tmp_path, monkeypatch):
    """One step of plain descent, without GRPO's loss, is learning rate x weight x gradient of the mean divergence."""
    run = Run(
        taught, tmp_path / "run", monkeypatch, silent=True, hindsight=HindsightConfig(weight=0.25),
    )  # fmt: skip
    model = copy.deepcopy(taught).model
    terms = []
    for t, prompt in run.siblings():
        at = queries(taught, t)
        student = logprobs(model, t.prompt_ids, t.response_ids)[at]
        teacher = logprobs(model, prompt, t.response_ids)[at].detach()
        mixture = torch.log((student.exp() + teacher.exp()) / 2)
        terms += (0.5 * (teacher.exp() * (teacher - mixture) + student.exp() * (student - mixture)).sum(-1)).unbind()
    assert len(terms) >= 6
    loss = torch.stack(terms).mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        moved = taught.model.get_parameter(name) - run.policy.model.get_parameter(name)
        torch.testing.assert_close(moved, 0.1 * 0.25 * parameter.grad, rtol=1e-3, atol=1e-6)
    assert run.lines[0]["hindsight_divergence"] == pytest.approx(loss.item(), rel=1e-4)
    assert run.lines[0]["hindsight_siblings"] == sum(bool(queries(taught, t)) for t, _ in run.siblings())
    learned = 0
    for inputs, hidden in zip(run.inputs, run.hidden, strict=True):
        width = inputs["completion_ids"].shape[1]
        at_completion = hidden.grad[:, -width - 1 : -1]
        chosen = inputs["hindsight_mask"].bool()
        assert not hidden.grad[:, : -width - 1].any()
        assert not at_completion[~chosen].any()
        assert not (chosen & ~(inputs["completion_mask"] * inputs["tool_mask"]).bool()).any()
        learned += int(at_completion[chosen].any(-1).sum())
    assert learned == len(terms)


def test_with_adapters_and_both_at_once(taught, tmp_path, monkeypatch):
    run = Run(
        taught, tmp_path / "run", monkeypatch, lora=LoraConfig(rank=4, alpha=8), steps=2,
        hindsight=HindsightConfig(weight=0.5, classes=("search", "tag")), evidence=EvidenceConfig(strength=1.0),
    )  # fmt: skip
    assert run.lines[0]["hindsight_divergence"] > 0
    assert run.lines[0]["evidence_correction"] > 0
    assert type(run.policy.model) is type(taught.model)
    assert not torch.equal(
        run.policy.model.model.layers[0].self_attn.q_proj.weight, taught.model.model.layers[0].self_attn.q_proj.weight
    )
