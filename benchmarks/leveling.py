"""GRPO updates of several processes, with samples shared out by their tokens and with each rank's own.

    python benchmarks/leveling.py --updates 60      # two processes, the package's policy

In each update a group has mixed rewards with probability ``--mixed``; only these teach. Both ways get the same samples, in
turn. Time runs from barrier to barrier. One thread a process.
"""

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; the command line does the same

import torch
from rich.console import Console
from rich.table import Table

from search_e1.config import GrpoConfig, PolicyConfig, TrainingConfig
from search_e1.runs import ranks
from search_e1.runs.allocation import keep_freed_memory
from search_e1.runs.context import StageContext
from search_e1.training import policy as policies
from search_e1.training.loop import Schedule, train
from search_e1.training.objectives.grpo import Grpo
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Sample
from shapes import ALL, GROUP, random_model, samples_of  # beside this file

MAX_TOKENS = 4096
WAYS: dict[str, Callable[..., list[Any]]] = {"each rank's own": lambda items, costs: list(items), "shared out": ranks.leveled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["small", *ALL], default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--groups", type=int, default=8, help="groups per rank, of eight trajectories each")
    parser.add_argument("--mixed", type=float, default=0.45, help="probability that a group has mixed rewards")
    parser.add_argument("--updates", type=int, default=12)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        with ranks.joined("cpu"):
            compare(arguments)
        return
    launch = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", str(arguments.processes)]
    subprocess.run([*launch, __file__, *sys.argv[1:]], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def compare(arguments: argparse.Namespace) -> None:
    keep_freed_memory()
    small, mine = arguments.shape == "small", GROUP * arguments.groups
    if small:
        model = policies.load("small", PolicyConfig(model="small", device="cpu")).model
    else:
        model = random_model(arguments.shape, "cpu", torch.float32)
    config = TrainingConfig()
    trained = TrainedPolicy(model, config, frozen_start=False, dtype=getattr(torch, arguments.dtype))
    samples = samples_of(mine * ranks.count(), model.config.vocab_size, scale=0.25 if small else 1.0)
    source = Updates(samples[mine * ranks.rank() :][:mine], arguments)
    objective, schedule = Grpo(GrpoConfig(training=config), MAX_TOKENS), Schedule(len(WAYS) * (1 + arguments.updates), 1e-6)
    with tempfile.TemporaryDirectory() as out:
        train(trained, source, {"grpo": objective}, config, schedule, StageContext(Path(out)))
    source.clock()
    if ranks.is_first():
        show(arguments, source.seconds)


class Updates:
    """Supplies the same samples twice, once for each of ``WAYS``, and times the updates."""

    figures: Mapping[str, float] = {}

    def __init__(self, samples: Sequence[Sample], arguments: argparse.Namespace) -> None:
        self.seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        self._samples, self._arguments, self._begun = samples, arguments, None

    def next(self, step: int) -> Mapping[str, Sequence[Sample]]:
        self.clock()
        number, self._way = step // len(WAYS), list(WAYS)[step % len(WAYS)]
        ranks.leveled = WAYS[self._way]
        chooser = random.Random(1000 * number + ranks.rank())
        teaches = [chooser.random() < self._arguments.mixed for _ in range(self._arguments.groups)]
        self._warm = number > 0
        ranks.barrier()
        self._begun = time.perf_counter()
        return {"grpo": [s if teaches[i // GROUP] else silent(s) for i, s in enumerate(self._samples)]}

    def clock(self) -> None:
        """End the update that is being timed, if there is one."""
        ranks.barrier()
        if self._begun is not None and self._warm:
            self.seconds[self._way].append(time.perf_counter() - self._begun)


def silent(sample: Sample) -> Sample:
    """The sample in a group with equal rewards."""
    return sample.model_copy(update={"advantages": (0.0,) * len(sample.response_ids)})


def show(arguments: argparse.Namespace, seconds: Mapping[str, Sequence[float]]) -> None:
    own, _ = seconds.values()
    out = Console(width=None if sys.stdout.isatty() else 100)
    out.print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {arguments.processes} processes, "
        f"{arguments.shape}, {arguments.dtype}, {arguments.groups} groups of {GROUP} a rank, {arguments.mixed:.0%} mixed"
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("samples", "s, median", "mean", "ratio of sums"):
        table.add_column(heading, justify="left" if heading == "samples" else "right")
    for way, spent in seconds.items():
        figures = statistics.median(spent), statistics.fmean(spent), sum(spent) / sum(own)
        table.add_row(way, *(f"{figure:.2f}" for figure in figures))
    out.print(table)


if __name__ == "__main__":
    main()
