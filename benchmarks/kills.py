"""Kill runs at random times, resume them, and compare the results with those of an uninterrupted run.

    python benchmarks/kills.py --kills 60 --json results.json

A small run in the generated world: a cold start, then a round of all stages from the package's policy. Each process is killed
with SIGKILL at a random time within its current stage, and the run is resumed, until it is complete; then the next run starts.
Every file must be bit-identical, apart from times. Processes are forked from one that has loaded the libraries, so that they
start work at once.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess as Process
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; the command line does the same
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.console import Console
from rich.table import Table

from search_e1 import evolve  # noqa: F401  loaded here, for the processes to come
from search_e1.cli import main as cli
from search_e1.data.world import make_world, write

CONFIG = """
run = "{run}"
rounds = 1
[policy]
model = "small"
device = "cpu"
[data]
corpus = "{world}/corpus.jsonl"
train = ["{world}/train.jsonl"]
eval = {{ dev = "{world}/dev.jsonl", test = "{world}/test.jsonl" }}
[rollout]
topk = 2
max_searches = 5
max_action_tokens = 48
max_observation_tokens = 128
max_tokens = 1024
batch_size = 4
[grpo]
steps = 4
questions_per_step = 4
group_size = 4
learning_rate = 3e-4
replay = {{ examples_per_step = 2 }}
[pool]
questions = 12
group_size = 4
[lead]
pairs = 3
enforce = false
[distill]
epochs = 2
batch_size = 4
learning_rate = 3e-4
lora = {{ dropout = 0.1 }}
[evaluation]
latency = 1
[checkpoints]  # after every step, however long that takes: kills are to find them being written
every_seconds = 0
share = 1
[coldstart]
new_policy = {{ hidden_size = 48, layers = 2, vocabulary = 1024 }}
learning_rate = 3e-3
privileged = 0.4
steps = 16
drills = 4
batch_size = 4
"""
VERBS = ("coldstart", "train")
TIMES = {"started", "seconds", "cpu_seconds", "attempts", "trajectories_per_second", "tokens_per_second"}
"""Keys, at any depth, whose values are times, or counts of attempts, which kills change."""
UNCOMPARED = {"timings.json", ".sha256"}
"""Files that hold only times, and checksums of files that hold times; those files are compared themselves."""


@dataclass
class Kill:
    stage: str
    """The stage that was killed."""
    run: int
    identical: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="seed of the times")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--keep", type=Path, help="leave the runs in this new directory")
    arguments = parser.parse_args()
    with TemporaryDirectory() as scratch:
        root = arguments.keep or Path(scratch)
        kills = measure(root, arguments.kills, random.Random(arguments.seed))
    out = Console(width=None if sys.stdout.isatty() else 100)
    out.print(f"{platform.machine()}, {os.cpu_count()} cores; {len(kills)} kills in {kills[-1].run} runs")
    out.print(table(kills))
    if arguments.json:
        arguments.json.write_text(json.dumps([vars(kill) for kill in kills], indent=2) + "\n")
    sys.exit(not all(kill.identical for kill in kills))


def measure(root: Path, count: int, dice: random.Random) -> list[Kill]:
    """Make ``count`` kills, in as many runs as necessary; each run's result is compared with a run without kills."""
    world = root / "world"
    write(make_world(), world, train=48, dev=6, test=6, seed=0)
    add_evidence(world / "train.jsonl")
    whole = Run(root / "whole", world)
    while (status := whole.attempt()) is not None:
        raise SystemExit(f"the run without kills failed: {status}")
    expected, lasts = dict(content(whole.path)), durations(whole.path)
    kills: list[Kill] = []
    for number in range(1, count + 1):
        run, begun = Run(root / f"run-{number}", world), len(kills)
        left = count - len(kills)
        while (stage := run.attempt(dice, lasts) if left else run.attempt()) is not None:
            kills.append(Kill(stage, number))
            left -= 1
            print(f"kill {len(kills)}: run {number}, {stage}", file=sys.stderr)
        found = dict(content(run.path))
        different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        print(f"run {number}: {f'differs in {different}' if different else 'identical'}", file=sys.stderr)
        for kill in kills[begun:]:
            kill.identical = not different
        if len(kills) == count:
            return kills
    raise SystemExit("kills came too late, again and again")


class Run:
    """A run directory and the processes that work in it."""

    def __init__(self, path: Path, world: Path) -> None:
        self.path = path
        path.mkdir(parents=True)
        self.config = path.with_suffix(".toml")
        self.config.write_text(CONFIG.format(run=path, world=world))
        self._log = path.with_suffix(".log")
        self._aimed: set[str] = set()

    def attempt(self, dice: random.Random | None = None, lasts: dict[str, float] | None = None) -> str | None:
        """Start the remaining verbs; returns the stage that was killed, or ``None`` if the run is complete.

        Each stage is targeted once per run, so that the next process reaches the next stage.
        """
        for verb in VERBS:
            if (self.path / verb).exists():  # the cold start is complete
                continue
            process = multiprocessing.get_context("fork").Process(target=self._verb, args=(verb,))
            process.start()
            if dice and lasts and (stage := self._kill(process, dice, lasts)):
                return stage
            process.join()
            if process.exitcode:
                raise SystemExit(f"{verb} failed in {self.path}; see {self._log}")
        return None

    def _verb(self, verb: str) -> None:
        """Run the verb, in the forked process."""
        with self._log.open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.argv = ["search-e1", verb, "--config", str(self.config)]
        cli.main()

    def _kill(self, process: Process, dice: random.Random, lasts: dict[str, float]) -> str | None:
        while process.is_alive():
            stage = self._at_work()
            if stage and stage not in self._aimed:
                self._aimed.add(stage)
                process.join(dice.uniform(0.0, lasts[stage]))
                # If the stage ended early, this kills the next stage, or nothing after the last.
                stage = self._at_work() or stage
                if not process.is_alive():
                    return None
                process.kill()
                process.join()
                return stage
            time.sleep(0.001)
        return None

    def _at_work(self) -> str | None:
        for partial in self.path.glob(".*.partial"):
            if partial.is_dir():
                return partial.name[1:].removesuffix(".partial")
        return None


def add_evidence(questions: Path) -> None:
    """Add the passages that each question needs, for the cold start: those of all entities but the answer."""
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    for row in rows:
        row["metadata"]["gold_passage_ids"] = row["metadata"]["entities"][:-1]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))


def durations(run: Path) -> dict[str, float]:
    """Seconds of each stage."""
    manifests = (json.loads(path.read_text()) for path in run.glob("*/manifest.json"))
    return {manifest["stage"]: manifest["seconds"] for manifest in manifests}


def content(run: Path) -> Iterator[tuple[str, Any]]:
    """Name and content of every file, without times and the run's own path."""
    for path in sorted(run.rglob("*")):
        if path.is_file() and not any(path.name.endswith(name) for name in UNCOMPARED):
            data = path.read_bytes().replace(str(run).encode(), b"RUN")
            timed = path.name in ("steps.jsonl", "manifest.json", "summary.json")
            name = str(path.relative_to(run))
            yield name, [without_times(json.loads(part)) for part in parts(path, data)] if timed else data


def parts(path: Path, data: bytes) -> list[bytes]:
    return data.splitlines() if path.suffix == ".jsonl" else [data]


def without_times(value: Any) -> Any:
    """``value`` without times, and without checksums of files that hold times; those files are compared themselves."""
    if isinstance(value, dict):
        timed = ("steps.jsonl", "timings.json", "manifest.json", ".sha256")
        return {k: without_times(v) for k, v in value.items() if k not in TIMES and not k.endswith(timed)}
    return value


def table(kills: list[Kill]) -> Table:
    made = Table(title="kills, by the stage that was at work")
    for heading in ("stage", "kills", "bit-identical"):
        made.add_column(heading, justify="left" if heading == "stage" else "right")
    killed, identical = (Counter(k.stage for k in kills if k.identical or every) for every in (True, False))
    for stage, count in killed.items():
        made.add_row(stage, str(count), str(identical[stage]))
    made.add_section()
    made.add_row("all", str(len(kills)), str(identical.total()))
    return made


if __name__ == "__main__":
    main()
