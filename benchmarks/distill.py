"""The cost of a distillation step compared with its bare forward and backward passes.

    python benchmarks/distill.py --repeats 7 --json results.json

Trains the small policy on pairs of the small world with the training loop and, alternating with it, runs only the passes of the
same batches: the teacher's forward pass, the student's forward and backward pass, both heads at the sampled positions. The
ratio is taken per repeat; the target is at most 1.05.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; the command line does the same

import torch
from rich.console import Console
from rich.table import Table

import search_e1.training.policy as policies
from search_e1.config import DistillConfig, PairsConfig, PolicyConfig, PoolConfig, ReferenceConfig, RolloutConfig
from search_e1.data.world import make_world, write
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.rollout import pool
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.runs.allocation import keep_freed_memory
from search_e1.runs.context import StageContext
from search_e1.selfdistill import pairs as mining
from search_e1.stages.distill import EpochSource, make_samples
from search_e1.text.reference import prompt_budget, render_reference
from search_e1.training.batch import Batch, make_batch, micro_batches
from search_e1.training.head import split_head
from search_e1.training.loop import Schedule, train
from search_e1.training.objectives.self_distillation import SelfDistillation
from search_e1.training.policy import Policy, with_adapter
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Pair, Sample

ASKED = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per step")
    parser.add_argument("--steps", type=int, default=8, help="steps of one repeat")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command line does
    rows = measure(arguments)
    out = Console(width=None if sys.stdout.isatty() else 100)
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else f"{os.cpu_count()} cores"
    out.print(
        f"{platform.machine()}, {device}, torch {torch.__version__} ({torch.get_num_threads()} threads), transformers "
        f"{version('transformers')}; {arguments.repeats} repeats of {arguments.steps} steps of {arguments.batch_size} pairs; "
        f"asked for: at most {ASKED}"
    )
    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    out.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(arguments: argparse.Namespace) -> list[dict[str, str | float]]:
    """Milliseconds of a step and of its bare passes, measured alternately: medians over steps and repeats."""
    config = DistillConfig(batch_size=arguments.batch_size, learning_rate=3e-4)
    steps, bare = [], []
    with tempfile.TemporaryDirectory() as scratch:
        pairs = world_pairs(Path(scratch), arguments.batch_size * arguments.steps)
        for repeat in range(arguments.repeats + 1):  # the first one warms up
            policy = small_policy(arguments.device)
            source = EpochSource(make_samples(policy, pairs, config), config.batch_size, repeat)
            trained = TrainedPolicy(with_adapter(policy.model, config.lora), config.training, frozen_start=False)
            schedule, objective = Schedule(source.steps, config.learning_rate), SelfDistillation(config)
            context = StageContext(Path(scratch), repeat)
            records = train(trained, source, {"distill": objective}, config.training, schedule, context)
            # The loop's first step includes its startup.
            steps.append(statistics.median(record["seconds"] for record in records[1:]))
            passes = [bare_passes(trained, source.next(step)["distill"]) for step in range(source.steps)]
            bare.append(statistics.median(passes[1:]))
    ratios = [a / b for a, b in zip(steps, bare, strict=True)][1:]
    return [
        {"what": "a step of the loop", "ms": 1000 * statistics.median(steps[1:]), "ratio": statistics.median(ratios)},
        {"what": "its bare passes", "ms": 1000 * statistics.median(bare[1:]), "ratio": 1.0},
    ]


def bare_passes(policy: TrainedPolicy, samples: Sequence[Sample]) -> float:
    """Seconds of a step's bare passes."""
    groups = micro_batches(samples, policy.micro_batch_tokens, packed=policy.packed)
    batches = [batch_of([samples[i] for i in group], policy) for group in groups]
    model = policy.model.train()
    decoder, head = split_head(model)
    started = now(policy.device)
    for batch in batches:
        assert batch.teacher
        with torch.no_grad(), model.disable_adapter():
            head.logits(batch.teacher.hidden(decoder))
        logits = head.logits(batch.student.hidden(decoder))
        logits.backward(torch.full_like(logits, 1e-6))
    seconds = now(policy.device) - started
    model.zero_grad()
    return seconds


def batch_of(samples: Sequence[Sample], policy: TrainedPolicy) -> Batch:
    return make_batch(samples, [[1.0] * len(s.positions) for s in samples], packed=policy.packed).to(policy.device)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def small_policy(device: str) -> Policy:
    return policies.load("small", PolicyConfig(model="small", device=device))


def world_pairs(directory: Path, count: int) -> list[Pair]:
    """Pairs of the small world, mined from a pool as in a run."""
    from search_e1.data.corpus import Corpus
    from search_e1.data.questions import load_questions

    write(make_world(), directory / "world", train=300, dev=1, test=1, seed=0)
    index = Bm25Index.build(Corpus(directory / "world" / "corpus.jsonl"), directory / "index")
    policy = small_policy("cpu")
    limits = RolloutConfig(
        topk=2, max_searches=5, max_action_tokens=48, max_observation_tokens=128, max_tokens=1024, batch_size=128
    )
    questions = load_questions(directory / "world" / "train.jsonl")[: 4 * count]
    (directory / "pool").mkdir()
    pool.sample(
        TorchEngine(policy.model, policy.tokenizer, batch_size=128), index, questions, policy.prompts,
        PoolConfig(group_size=8), limits, seed=0, out=directory / "pool",
    )  # fmt: skip
    length = policy.model.config.max_position_embeddings

    def render(question, reference, student):
        budget = prompt_budget(ReferenceConfig(), length, len(student.response_ids))
        return render_reference(policy.tokenizer, policy.prompts, question.text, reference, ReferenceConfig(), budget)

    found, _ = mining.select(pool.read(directory / "pool" / pool.FILE), PairsConfig(students=2), render, seed=0)
    if len(found) < count:
        raise SystemExit(f"{len(found)} pairs found, {count} needed; ask for fewer --steps")
    return found[:count]


if __name__ == "__main__":
    main()
