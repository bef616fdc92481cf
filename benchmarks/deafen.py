"""Make a policy deaf to references: what it does under the plain prompt it learns to do under the privileged one as well.

    python benchmarks/deafen.py runs/ablations/runs/ofsd/0 runs/deaf-policies/0

RUN has a pool that was sampled from the policy it began with. Every trajectory of the pool, right or wrong, is imitated under
both prompts, whatever the reference shows.
"""

import argparse
import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from search_e1.config import PolicyConfig
from search_e1.evolve import SUMMARY, Summary
from search_e1.rollout import pool
from search_e1.text.prompts import privileged_prompt
from search_e1.training.policy import Policy, load
from search_e1.warmstart.trainer import Demonstration, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--trajectories", type=int, default=16, help="a step, each under both prompts")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = Summary.model_validate_json((arguments.run / SUMMARY).read_text("utf-8")).policies[0].path
    policy = load(base, PolicyConfig(model=base, device="cpu"))
    both = under_both(policy, arguments.run / "pool-1" / "groups.jsonl")
    drawn = batches(both, arguments.trajectories)
    losses = train(policy, drawn, steps=arguments.steps, learning_rate=arguments.learning_rate)
    print(f"{arguments.out}: {len(both)} trajectories, {losses[0]:.3f} -> {losses[-1]:.3f} nats a token")
    unfinished = arguments.out.with_name(f".{arguments.out.name}")
    policy.save(unfinished)
    unfinished.rename(arguments.out)


def under_both(policy: Policy, groups: Path) -> list[list[Demonstration]]:
    """Each trajectory of a group that has a reference, under the plain prompt and under the privileged one."""
    both = []
    for group in pool.read(groups):
        if group.reference is None:
            continue
        shown = privileged_prompt(policy.tokenizer, policy.prompts, group.question.text, group.reference.text)
        for one in group.trajectories:
            both.append([Demonstration(p, one.response_ids, one.action_mask) for p in (one.prompt_ids, shown)])
    return both


def batches(both: list[list[Demonstration]], size: int) -> Iterator[list[Demonstration]]:
    """Without end."""
    shuffle = random.Random(0)
    while True:
        shuffle.shuffle(both)
        for begin in range(0, len(both) - size + 1, size):
            yield [one for pair in both[begin : begin + size] for one in pair]


if __name__ == "__main__":
    main()
