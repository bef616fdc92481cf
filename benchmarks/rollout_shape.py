"""Rollouts of a random policy in the shape of a real one: the share of single-turn speed kept over four turns.

    python benchmarks/rollout_shape.py --shape qwen2.5-3b --device cuda --dtype bfloat16

Every trajectory samples ``--action`` tokens four times, and reads ``--observation`` tokens after each of the first three. The
comparison is the same engine with a single turn: all prompt and observation tokens in its prompt, and as many sampled tokens.
``plain`` is transformers' own ``generate``, turn by turn. Each contestant is a separate process.
"""

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table

from contest import measured  # beside this file
from search_e1.config import PolicyConfig, Prompts, RolloutConfig
from search_e1.rollout.engines.base import Engine, Request
from search_e1.rollout.engines.torch import PlainEngine, TorchEngine
from search_e1.rollout.loop import rollout
from search_e1.rollout.starts import Start
from search_e1.text.protocol import Action, Tags
from search_e1.training import policy as policies
from search_e1.types import ActionKind, Passage, Question
from shapes import ALL, random_model

TURNS = 4
CONTESTANTS = ("single turn", f"{TURNS} turns", f"{TURNS} turns, plain")


class Searching(Tags):
    """Parses any text as a search."""

    stop = ()

    def parse(self, text: str) -> Action:
        return Action(ActionKind.SEARCH, "anything")


class Endless:
    """Retriever that finds a passage longer than the observation limit."""

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        return [[Passage(id="p", title="", text="Gula Purdak is a film. " * 500)] for _ in queries]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=ALL, default="qwen2.5-3b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--group", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=320)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--action", type=int, default=60)
    parser.add_argument("--observation", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="time transformers' own generate as well")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        print(json.dumps(measure(arguments)))
        return
    rows: list[dict[str, Any]] = []
    for name in CONTESTANTS[: 3 if arguments.plain else 2]:
        row = measured([sys.executable, __file__, *sys.argv[1:], "--contestant", name])
        rows.append({"contestant": name, **row})
        print(json.dumps(rows[-1]), file=sys.stderr)
    cuda = arguments.device.startswith("cuda")
    device = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    out = Console(width=None if sys.stdout.isatty() else 100)
    out.print(f"{platform.machine()}, {device}, torch {torch.__version__}, {vars(arguments)}", soft_wrap=True)
    out.print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one contestant in this process; the first round warms up."""
    play, rates = prepared(arguments), []
    for number in range(arguments.rounds + 1):
        clock = time.perf_counter()
        sampled = play()
        if number:
            rates.append(sampled / (time.perf_counter() - clock))
    gib = torch.cuda.max_memory_allocated() / 2**30 if arguments.device.startswith("cuda") else None
    return {"tokens": sampled, "tokens_s": median(rates), "least": min(rates), "most": max(rates), "gib": gib}


def prepared(arguments: argparse.Namespace) -> Callable[[], int]:
    """A function that samples all trajectories of the contestant and returns the number of sampled tokens."""
    small = policies.load("small", PolicyConfig(model="small"))
    model = random_model(arguments.shape, arguments.device, getattr(torch, arguments.dtype)).eval()
    most = min(model.config.vocab_size, len(small.tokenizer)) - 10
    draw = random.Random(0)
    ids = lambda n: tuple(draw.randrange(most) for _ in range(n))  # noqa: E731
    prompts = [ids(arguments.prompt) for _ in range(arguments.questions)]
    begun = [
        Start(Question(id=str(i), text="?", answers=("x",)), prompt, sample=sample)
        for i, prompt in enumerate(prompts)
        for sample in range(arguments.group)
    ]
    longer = [start.prompt_ids + ids((TURNS - 1) * arguments.observation) for start in begun]
    limits = RolloutConfig(
        max_searches=TURNS - 1, topk=1, max_action_tokens=arguments.action, max_observation_tokens=arguments.observation,
        max_tokens=arguments.prompt + TURNS * (arguments.action + arguments.observation),
    )  # fmt: skip

    def turns(generator: Engine) -> int:
        with patch("search_e1.rollout.loop.protocol_of", Searching):
            done = rollout(generator, Endless(), begun, limits, temperature=1.0, seed=0, prompts=Prompts())
        return sum(t.sampled_tokens for t in done)

    def single() -> int:
        action = TURNS * arguments.action
        most, sampled, waiting = max(map(len, longer)) + action, 0, len(longer)
        with ours().session(temperature=1.0, stop=(), max_tokens=most) as session:
            for key, prompt in enumerate(longer):
                session.submit(Request(key, prompt, action, key))
            while waiting:
                for key, generation in session.step():
                    sampled, waiting = sampled + len(generation.ids), waiting - 1
                    session.release(key)
        return sampled

    def ours() -> Engine:
        return TorchEngine(model, small.tokenizer, batch_size=arguments.batch_size)

    plain = PlainEngine(model, small.tokenizer, batch_size=arguments.batch_size)
    return dict(zip(CONTESTANTS, (single, lambda: turns(ours()), lambda: turns(plain)), strict=True))[arguments.contestant]


def table(rows: list[dict[str, Any]]) -> Table:
    """One row per contestant; shares are of the single turn's median."""
    shown = Table(title="Sampled tokens a second")
    for column in ("", "median", "min-max", "of the single turn's"):
        shown.add_column(column, justify="left" if not column else "right")
    single = rows[0].get("tokens_s")
    for row in rows:
        if "failed" in row:
            shown.add_row(row["contestant"], row["failed"])
            continue
        share = f"{row['tokens_s'] / single:.2f}" if single else ""
        shown.add_row(row["contestant"], f"{row['tokens_s']:,.0f}", f"{row['least']:,.0f}-{row['most']:,.0f}", share)
    return shown


if __name__ == "__main__":
    main()
