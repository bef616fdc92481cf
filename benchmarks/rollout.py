"""Rollouts of one policy by several implementations: completed trajectories per second, and where the time goes.

    python benchmarks/rollout.py                        # the package's policy, in the small world

``ours`` is the engine of GRPO, pools and evaluation. ``plain`` is transformers' own ``generate``, turn by turn over the whole
batch. ``TRL`` is the loop of ``trl.GRPOTrainer`` with an ``environment_factory``, which parses calls, searches and generates
again; it stops at the closing tags because they are single tokens of this policy's tokenizer. All use the same model,
questions, passages and limits, and alternate, so that other load on the machine affects all. The share outside ``forward``
is of the main thread's CPU time.
"""

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from trl import GRPOConfig, GRPOTrainer

from search_e1.config import PolicyConfig, RolloutConfig
from search_e1.data.answers import exact_match
from search_e1.data.world import make_world
from search_e1.retrieval.indexes import build_index, open_index
from search_e1.rollout.engines.base import Engine
from search_e1.rollout.engines.torch import PlainEngine, TorchEngine
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import starts
from search_e1.runs.allocation import keep_freed_memory
from search_e1.text.prompts import INFORMATION_CLOSE, INFORMATION_OPEN
from search_e1.text.protocol import parse_action
from search_e1.text.protocols import protocol_of
from search_e1.training import memory
from search_e1.training import policy as policies
from search_e1.training.policy import Policy
from search_e1.types import ActionKind, Question

LIMITS = RolloutConfig(
    topk=2, max_searches=5, max_action_tokens=48, max_observation_tokens=128, max_tokens=1024, batch_size=512
)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|><|assistant|>"
    "{% elif m.role == 'assistant' %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<search>{{ c.function.name }}{{ c.function.arguments | tojson }}</search>{% endfor %}<|end|>"
    "{% else %}" + INFORMATION_OPEN + "{{ m.content }}\n" + INFORMATION_CLOSE + "{% endif %}{% endfor %}"
)
SEARCH = re.compile(r"<search>((?:(?!<search>).)*?)</search>", re.DOTALL)


@dataclass
class Run:
    """One contestant's result in one round."""

    trajectories: int
    sampled: float
    """Sampled tokens per trajectory."""
    searches: float
    em: float
    seconds: float
    outside: float
    """Share of the main thread's CPU time spent outside ``forward``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--group", type=int, default=8, help="trajectories per question")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # for all contestants, as the command line does
    with tempfile.TemporaryDirectory() as directory:
        contestants = small_world(arguments, Path(directory))
        rounds: dict[str, list[Run]] = {name: [] for name in contestants}
        for number in range(arguments.rounds + 1):
            for name, play in list(contestants.items()):
                try:
                    played = play()
                except (RuntimeError, MemoryError) as error:
                    if not memory.ran_out(error):
                        raise
                    del contestants[name]  # it would fail again
                    rounds[name].clear()
                    print(f"round {number}, {name}: out of memory", file=sys.stderr)
                    continue
                if number:  # the first round warms up
                    rounds[name].append(played)
                print(f"round {number}, {name}: {played}", file=sys.stderr)
    out = Console(width=None if sys.stdout.isatty() else 100)
    out.print(
        f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}; {arguments.questions} questions x "
        f"{arguments.group}, {arguments.rounds} rounds"
    )
    out.print(table(rounds))
    if arguments.json:
        rows = {name: [vars(run) for run in runs] for name, runs in rounds.items()}
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def small_world(arguments: argparse.Namespace, directory: Path) -> dict[str, Callable[[], Run]]:
    world = make_world(0)
    build_index(world.passages, directory / "index")
    retriever = open_index(directory / "index")
    policy = policies.load("small", PolicyConfig(model="small"))
    questions = world.questions("train", arguments.questions)
    begun = starts(policy.tokenizer, policy.prompts, questions, arguments.group)

    def with_generator(make: Callable[[], Engine]) -> Callable[[], Run]:
        def play() -> Run:
            generator = make()
            with forward_timed(policy.model) as forward:
                clock, own = time.perf_counter(), time.thread_time()
                done = rollout(
                    generator,
                    retriever,
                    begun,
                    LIMITS,
                    temperature=arguments.temperature,
                    seed=0,
                    prompts=policy.prompts,
                )
                seconds, own = time.perf_counter() - clock, time.thread_time() - own
            mean = lambda values: sum(values) / len(done)  # noqa: E731
            return Run(
                len(done), mean(t.sampled_tokens for t in done), mean(t.searches for t in done),
                mean(t.reward for t in done), seconds, 1 - forward[0] / own,
            )  # fmt: skip

        return play

    size = arguments.questions * arguments.group
    return {
        "ours": with_generator(lambda: TorchEngine(policy.model, policy.tokenizer, batch_size=size)),
        "ours, 128 at a time": with_generator(lambda: TorchEngine(policy.model, policy.tokenizer, batch_size=128)),
        "plain": with_generator(lambda: PlainEngine(policy.model, policy.tokenizer, batch_size=size)),
        "TRL": trl_loop(policy, retriever, questions, arguments, directory),
    }


@contextmanager
def forward_timed(model: Any) -> Iterator[list[float]]:
    """Yields a list whose only element counts the main thread's CPU seconds in the model's forward passes."""
    spent, forward = [0.0], model.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        clock = time.thread_time()
        output = forward(*args, **kwargs)
        spent[0] += time.thread_time() - clock
        return output

    model.forward = timed
    try:
        yield spent
    finally:
        model.forward = forward


def trl_loop(
    policy: Policy, retriever: Any, questions: Sequence[Question], arguments: argparse.Namespace, directory: Path
) -> Callable[[], Run]:
    """TRL's own loop over the same ids: its chat template writes what our protocol writes."""
    own = policies.load("small", PolicyConfig(model="small"))
    tokenizer, model, protocol = own.tokenizer, own.model, protocol_of(policy.tokenizer, policy.prompts)

    class Environment:
        def reset(self, **_: Any) -> None:
            """Begin anew."""

        def search(self, query: str) -> str:
            """Search.

            Args:
                query: What to look for.
            """
            [found] = retriever.search([query], LIMITS.topk)
            text, _ = protocol.observe("", found, LIMITS.max_observation_tokens)
            return text.removeprefix(INFORMATION_OPEN).removesuffix(INFORMATION_CLOSE).removesuffix("\n")

    def parsed(ids: Sequence[int], **_: Any) -> dict[str, Any]:
        text = tokenizer.decode(ids)
        message = {"role": "assistant", "content": text}
        called = SEARCH.search(text)
        if called and called[1].strip():
            function = {"name": "search", "arguments": {"query": called[1].strip()}}
            message["tool_calls"] = [{"type": "function", "function": function}]
        return message

    tokenizer.chat_template, tokenizer.response_schema, tokenizer.parse_response = TEMPLATE, {"type": "object"}, parsed
    ends = {"</search>", "</answer>", tokenizer.eos_token}
    model.generation_config.eos_token_id = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip() in ends]
    size = arguments.questions * arguments.group
    answers = {question.text: question for question in questions}
    settings = GRPOConfig(
        output_dir=str(directory / "trl"), per_device_train_batch_size=size, num_generations=arguments.group, max_steps=1,
        max_completion_length=LIMITS.max_tokens, max_tool_calling_iterations=LIMITS.max_searches, use_cpu=True, bf16=False,
        temperature=arguments.temperature, generation_kwargs={"max_new_tokens": LIMITS.max_action_tokens},
        gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    prompts = [[{"role": "user", "content": question.text}] for question in questions]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = GRPOTrainer(
            model=model, args=settings, processing_class=tokenizer, environment_factory=Environment,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
        )  # fmt: skip
    inputs = [{"prompt": prompt} for prompt in prompts for _ in range(arguments.group)]
    generate = trainer._generate
    kept: list[Any] = []

    def timed(asked: Any) -> Any:
        with forward_timed(trainer.model) as forward:
            clock, cpu = time.perf_counter(), time.thread_time()
            made = generate(asked)
            kept[:] = made, time.perf_counter() - clock, 1 - forward[0] / (time.thread_time() - cpu)
        return made

    trainer._generate = timed

    def play() -> Run:
        trainer._generate_and_score_completions([dict(row) for row in inputs])
        made, seconds, outside = kept
        return judged(made, seconds, outside, answers, tokenizer, inputs)

    return play


def judged(
    made: Any, seconds: float, outside: float, answers: dict[str, Question], tokenizer: Any, inputs: Sequence[dict]
) -> Run:
    """Figures of TRL's trajectories, whose turns are recovered from the masks."""
    ids, masks = made[1], made[2]
    sampled = sum(map(sum, masks))
    searches, right = 0, 0.0
    for row, row_ids, mask in zip(inputs, ids, masks, strict=True):
        searches += sum(a and not b for a, b in pairwise(mask))
        last = len(mask) - mask[::-1].index(0) if 0 in mask else 0
        action = parse_action(tokenizer.decode(row_ids[last:]))
        gold = answers[row["prompt"][0]["content"]].answers
        right += exact_match(action.argument if action.kind is ActionKind.ANSWER else None, gold)
    n = len(ids)
    return Run(n, sampled / n, searches / n, right / n, seconds, outside)


def table(rounds: dict[str, list[Run]]) -> Table:
    """One row per contestant; ratios are per round, shown as their median."""
    shown = Table(title="Completed trajectories a second")
    for column in ("", "a second, median", "min-max", "tokens", "searches", "EM", "outside forward", "ours is"):
        shown.add_column(column, justify="left" if not column else "right")
    for name, runs in rounds.items():
        if not runs:
            shown.add_row(name, "out of memory")
            continue
        rates = [run.trajectories / run.seconds for run in runs]
        ratios = [run.seconds / ours.seconds for run, ours in zip(runs, rounds["ours"], strict=False)]
        first = runs[0]
        shown.add_row(
            name, f"{median(rates):.1f}", f"{min(rates):.1f}-{max(rates):.1f}", f"{first.sampled:.1f}", f"{first.searches:.2f}",
            f"{median(run.em for run in runs):.3f}", f"{median(run.outside for run in runs):.0%}",
            "" if name == "ours" or not rounds["ours"] else f"{median(ratios):.2f}x",
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    main()
