"""Rollouts of a random policy in the shape of a real one: how much of its single-turn speed is left over four turns.

    python benchmarks/rollout_shape.py --shape qwen2.5-3b --device cuda --dtype bfloat16

Every trajectory samples ``--action`` tokens, four times, and reads ``--observation`` tokens after each of the first three. The
other side is the same engine with one turn: as many prompt and observation tokens in its prompt, as many sampled after it. Both
take turns. ``plain`` is transformers' own ``generate``, turn by turn.
"""

import argparse
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from unittest.mock import patch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from search_e1.config import PolicyConfig, Prompts, RolloutConfig
from search_e1.lab.plan.shapes import SHAPES
from search_e1.rollout.engines.base import Engine, generate
from search_e1.rollout.engines.torch import PlainEngine, TorchEngine
from search_e1.rollout.loop import Start, rollout
from search_e1.text.protocol import Action, Tags
from search_e1.training import policy as policies
from search_e1.types import ActionKind, Passage, Question

TURNS = 4


class Searching(Tags):
    """Takes whatever was sampled for a search."""

    stop = ()

    def parse(self, text: str) -> Action:
        return Action(ActionKind.SEARCH, "anything")


class Endless:
    """Finds a passage that is longer than any observation may be."""

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        return [[Passage(id="p", title="", text="Gula Purdak is a film. " * 500)] for _ in queries]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-3b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has, for a try")
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
    arguments = parser.parse_args()
    contestants = prepared(arguments)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(arguments.rounds + 1):
        for name, play in contestants.items():
            clock = time.perf_counter()
            sampled = play()
            if number:  # the first is for warming up
                seconds[name].append((time.perf_counter() - clock) / sampled)
            print(f"round {number}, {name}: {sampled} tokens, {time.perf_counter() - clock:.1f} s", file=sys.stderr)
    cuda = arguments.device.startswith("cuda")
    device = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most" if cuda else ""
    out = Console(width=None if sys.stdout.isatty() else 100)
    out.print(f"{platform.machine()}, {device}, torch {torch.__version__}, {vars(arguments)}{memory}", soft_wrap=True)
    out.print(table(seconds))


def prepared(arguments: argparse.Namespace) -> dict[str, Callable[[], int]]:
    small = policies.load(policies.SMALL, PolicyConfig(model=policies.SMALL))
    shape = dict(SHAPES[arguments.shape]) | ({"num_hidden_layers": arguments.layers} if arguments.layers else {})
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, bos_token_id=None, eos_token_id=None)
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype)).eval()
    draw = random.Random(0)
    ids = lambda n: tuple(draw.randrange(len(small.tokenizer) - 10) for _ in range(n))  # noqa: E731
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
        most = TURNS * arguments.action
        return sum(len(g.ids) for g in generate(ours(), longer, max_new_tokens=most, temperature=1.0, stop=()))

    def ours() -> Engine:
        return TorchEngine(model, small.tokenizer, batch_size=arguments.batch_size)

    contestants: dict[str, Callable[[], int]] = {"single turn": single, f"{TURNS} turns": lambda: turns(ours())}
    if arguments.plain:
        plain = PlainEngine(model, small.tokenizer, batch_size=arguments.batch_size)
        contestants[f"{TURNS} turns, plain"] = lambda: turns(plain)
    return contestants


def table(seconds: dict[str, list[float]]) -> Table:
    """A row a contestant; shares are of the same round, and their median is told."""
    shown = Table(title="Sampled tokens a second")
    for column in ("", "median", "min-max", "of the single turn's"):
        shown.add_column(column, justify="left" if not column else "right")
    for name, costs in seconds.items():
        rates = [1 / cost for cost in costs]
        shares = [single / cost for single, cost in zip(seconds["single turn"], costs, strict=True)]
        shown.add_row(name, f"{median(rates):,.0f}", f"{min(rates):,.0f}-{max(rates):,.0f}", f"{median(shares):.2f}")
    return shown


if __name__ == "__main__":
    main()
