"""Measure the small policy in the small world, on questions about dev entities.

python scripts/small_policy_figures.py src/search_e1/data/small_policy --questions 300
"""

import argparse
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from search_e1.config import PolicyConfig, RolloutConfig
from search_e1.data.world import make_world
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import Start, starts
from search_e1.text.prompts import privileged_prompt
from search_e1.training.policy import Policy, load
from search_e1.types import ActionKind, Question, Trajectory, Turn

ROLLOUT = RolloutConfig(
    max_searches=5, topk=2, max_action_tokens=48, max_observation_tokens=128, max_tokens=1024, batch_size=128
)
GROUP = 4  # sampled trajectories per question


def figures(policy: Policy, questions: int, index: Path, seed: int = 0) -> dict[str, Any]:
    """Figures of the plain prompt, greedy and sampled, and the lead of the privileged prompt, with references as in a run."""
    torch.manual_seed(seed)
    world = make_world()
    asked = world.questions("dev", questions)
    sampler = _Sampler(policy, Bm25Index.build(world.passages, index))
    greedy = sampler.run(starts(policy.tokenizer, policy.prompts, asked), temperature=0.0)
    pool = sampler.run(starts(policy.tokenizer, policy.prompts, asked, GROUP), temperature=1.0)
    groups = [pool[i : i + GROUP] for i in range(0, len(pool), GROUP)]
    return {
        "questions": questions,
        "plain greedy": _summary(asked, greedy, 1),
        "plain sampled": _summary(asked, pool, GROUP),
        "groups with mixed rewards": _round(sum(0 < sum(t.reward for t in g) < GROUP for g in groups) / questions),
        **_leads(policy, sampler, asked, groups, random.Random(seed)),
    }


class _Sampler:
    def __init__(self, policy: Policy, index: Bm25Index) -> None:
        self.generator = TorchEngine(policy.model, policy.tokenizer, batch_size=ROLLOUT.batch_size)
        self.index = index
        self.prompts = policy.prompts

    def run(self, rows: Sequence[Start], temperature: float) -> list[Trajectory]:
        return rollout(self.generator, self.index, rows, ROLLOUT, seed=0, temperature=temperature, prompts=self.prompts)


def _leads(
    policy: Policy,
    sampler: _Sampler,
    asked: Sequence[Question],
    groups: Sequence[Sequence[Trajectory]],
    rng: random.Random,
) -> dict[str, Any]:
    """EM under both prompts, starting from the question, from the middle of a wrong sibling, and with complete evidence."""
    begins: dict[str, list[tuple[Question, str, Sequence[Turn]]]] = defaultdict(list)
    for question, group in zip(asked, groups, strict=True):
        right = [t for t in group if t.correct]
        if not right:
            continue
        reference = min(right, key=lambda t: (t.searches, t.sampled_tokens)).text
        begins["from the question"].append((question, reference, ()))
        wrong = [t for t in group if not t.correct and len(t.turns) > 1]
        if wrong:
            turns = rng.choice(wrong).turns
            begins["from a wrong sibling"].append((question, reference, turns[: rng.randint(1, len(turns) - 1)]))
        complete = [p for t in group if (p := _complete(question, t))]
        if complete:
            begins["with complete evidence"].append((question, reference, rng.choice(complete)))
    rows: dict[str, Any] = {}
    for name, begin in begins.items():
        prompts = {
            "plain": [s.prompt_ids for s in starts(policy.tokenizer, policy.prompts, [q for q, _, _ in begin])],
            "privileged": [privileged_prompt(policy.tokenizer, policy.prompts, q.text, r) for q, r, _ in begin],
        }
        rows[name] = {"starts": len(begin)}
        for kind, ids in prompts.items():
            lines = [Start(q, p, turns) for (q, _, turns), p in zip(begin, ids, strict=True)]
            ended = sampler.run(lines, temperature=1.0)
            before = [len(turns) for _, _, turns in begin]
            rows[name][kind] = {
                "em": _mean([t.reward for t in ended]),
                "searches": _mean([t.searches for t in ended]),
                "tokens": _mean([sum(len(u.action_ids) for u in t.turns[n:]) for t, n in zip(ended, before, strict=True)]),
                "searches next": _mean([t.turns[n].kind is ActionKind.SEARCH for t, n in zip(ended, before, strict=True)]),
            }
    return rows


def _complete(question: Question, trajectory: Trajectory) -> Sequence[Turn] | None:
    """The turns up to and including the one whose passages complete the gold chain's evidence; None if none does."""
    needed = set(question.metadata["entities"][:-1])
    for n, turn in enumerate(trajectory.turns, 1):
        needed -= set(turn.passage_ids)
        if not needed and n < ROLLOUT.max_searches:
            return trajectory.turns[:n]
    return None


def _summary(asked: Sequence[Question], ended: Sequence[Trajectory], group: int) -> dict[str, Any]:
    by_hops: dict[int, list[float]] = defaultdict(list)
    for i, trajectory in enumerate(ended):
        by_hops[asked[i // group].hops or 0].append(trajectory.reward)
    return {
        "em": _mean([t.reward for t in ended]),
        "searches": _mean([t.searches for t in ended]),
        "tokens": _mean([t.sampled_tokens for t in ended]),
        "by hops": {hops: _mean(rewards) for hops, rewards in sorted(by_hops.items())},
        "stops": {s: _mean([t.stop_reason == s for t in ended]) for s in sorted({t.stop_reason for t in ended})},
    }


def _mean(values: Sequence[float]) -> float:
    return _round(sum(values) / len(values))


def _round(value: float) -> float:
    return round(value, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", type=Path)
    parser.add_argument("--questions", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy = load(arguments.policy, PolicyConfig(model=str(arguments.policy), device="cpu"))
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(figures(policy, arguments.questions, Path(directory) / "dev"), indent=2))


if __name__ == "__main__":
    main()
