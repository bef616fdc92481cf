"""Make a policy deaf to references: train it to act under the privileged prompt as under the plain one.

    python benchmarks/deafen.py runs/ablations/runs/ofsd/0 runs/deaf-policies/0

RUN has a pool sampled from its base policy. Every trajectory of the pool, right or wrong, is imitated under both prompts,
whatever the reference.
"""

import argparse
import os
import random
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from search_e1.config import PolicyConfig, TrainingConfig
from search_e1.evolve import SUMMARY, Summary
from search_e1.rollout import pool
from search_e1.runs.context import StageContext
from search_e1.stages.coldstart import BatchSource
from search_e1.text.prompts import privileged_prompt
from search_e1.training.loop import Schedule, train
from search_e1.training.objectives.sft import Sft
from search_e1.training.policy import Policy, load
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--trajectories", type=int, default=16, help="trajectories per step, each under both prompts")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = Summary.model_validate_json((arguments.run / SUMMARY).read_text("utf-8")).policies[0].path
    policy = load(base, PolicyConfig(model=base, device="cpu"))
    samples = under_both(policy, arguments.run / "pool-1" / "groups.jsonl")
    config = TrainingConfig(schedule="linear", warmup=0.05)
    source = BatchSource(batches(samples, arguments.trajectories), policy.model.config.max_position_embeddings)
    schedule = Schedule(arguments.steps, arguments.learning_rate)
    unfinished = arguments.out.with_name(f".{arguments.out.name}")
    unfinished.mkdir(parents=True, exist_ok=True)
    trained = TrainedPolicy(policy.model, config, frozen_start=False)
    steps = train(trained, source, {"sft": Sft()}, config, schedule, StageContext(unfinished))
    policy.model = trained.finish()
    policy.save(unfinished)
    unfinished.rename(arguments.out)
    losses = f"{steps[0]['loss']:.3f} -> {steps[-1]['loss']:.3f}"
    print(f"{arguments.out}: {len(samples)} trajectories, {losses} nats a token")


def under_both(policy: Policy, groups: Path) -> list[list[Sample]]:
    """Each trajectory of the groups with a reference, under the plain and the privileged prompt."""
    samples = []
    for group in pool.read(groups):
        if group.reference is None:
            continue
        shown = privileged_prompt(policy.tokenizer, policy.prompts, group.question.text, group.reference.text)
        samples += [
            [
                Sample(
                    question_id=group.question.id, prompt_ids=prompt, response_ids=trajectory.response_ids,
                    action_mask=trajectory.action_mask,
                )
                for prompt in (trajectory.prompt_ids, shown)
            ]
            for trajectory in group.trajectories
        ]  # fmt: skip
    return samples


def batches(samples: list[list[Sample]], size: int) -> Iterator[list[Sample]]:
    """Endless batches of ``size`` trajectories, each under both prompts."""
    shuffle = random.Random(0)
    while True:
        shuffle.shuffle(samples)
        for begin in range(0, len(samples) - size + 1, size):
            yield [sample for both in samples[begin : begin + size] for sample in both]


if __name__ == "__main__":
    main()
