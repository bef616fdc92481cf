"""A tiny policy that was taught to search and answer, rightly now and then: its groups carry mixed rewards."""

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from conftest import PASSAGES, TinyRetriever, make_tiny_policy
from search_e1.config import RolloutConfig
from search_e1.rollout.engines.base import BatchEngine, Generation
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import starts
from search_e1.training.policy import Policy
from search_e1.types import Question, Trajectory

LIMITS = RolloutConfig(max_searches=2, topk=1, max_action_tokens=24, max_observation_tokens=60, max_tokens=300)
QUESTIONS = [
    Question(id="arda", text="capital of Arda?", answers=("Bel",)),
    Question(id="eth", text="capital of Eth?", answers=("Fen",)),
    Question(id="bel", text="mayor of Bel?", answers=("Bel",)),
]
# What the policy is taught to do, whatever the question: every group has a chance of mixed rewards.
HABITS = [
    ["<search>Arda</search>", "<answer>Bel</answer>"],
    ["<search>Eth</search>", "<answer>Fen</answer>"],
    ["<answer>Bel</answer>"],
    ["<search>Eth</search>", "<search>Arda</search>", "<answer>Bel</answer>"],
]


class Script(BatchEngine):
    """A generator that takes each prompt for the next turn of the script it was given."""

    context_length = 1024

    def __init__(self, tokenizer: Any, scripts: list[list[str]]) -> None:
        self.tokenizer = tokenizer
        self._scripts = [list(script) for script in scripts]

    def generate(self, requests, *, temperature, stop):
        turns = [script.pop(0) for script in self._scripts if script]
        assert len(turns) == len(requests)
        return [Generation(tuple(self.tokenizer.encode(turn))) for turn in turns]


def scripted(policy: Policy, question: Question, scripts: list[list[str]], limits: RolloutConfig = LIMITS) -> list[Trajectory]:
    begin = starts(policy.tokenizer, policy.prompts, [question], len(scripts))
    generator = Script(policy.tokenizer, scripts)
    return rollout(generator, TinyRetriever(PASSAGES), begin, limits, temperature=1.0, seed=0, prompts=policy.prompts)


def teach() -> Policy:
    """The tiny policy after a second of teaching it the habits: a copy, since once is enough for all tests."""
    return copy.deepcopy(_taught())


@cache
def _taught() -> Policy:
    policy = make_tiny_policy()
    learn(policy, [t for question in QUESTIONS for t in scripted(policy, question, HABITS)], 90)
    return policy


def learn(policy: Policy, trajectories: Sequence[Trajectory], steps: int) -> None:
    """Train on what was sampled in ``trajectories``, in plain torch."""
    rows = [[*t.prompt_ids, *t.response_ids] for t in trajectories]
    width = max(map(len, rows))
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for i, (row, t) in enumerate(zip(rows, trajectories, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask = torch.tensor([0] * len(t.prompt_ids) + list(t.action_mask)).bool()
        labels[i, : len(row)][mask] = ids[i, : len(row)][mask]
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-2)
    for _ in range(steps):
        policy.model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
