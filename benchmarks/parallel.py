"""Speed and cost of two processes under torchrun compared with one, stage by stage.

    python benchmarks/parallel.py --questions 60 --repeats 1 --json results.json

Runs a round of the quickstart's config (its world: `search-e1 world runs/quickstart-world`; other flags are passed on) with one
process, with two (strong scaling), and with two and twice the questions (weak scaling). Seconds and CPU seconds are from the
stages' manifests, over all processes, including checkpoints and checksums; the start is the rest of the command's time:
importing, joining and checking. One OpenMP thread per process.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

BIN = Path(sys.executable).parent
STAGES = ("evaluation-base", "grpo-1", "pool-1", "lead-1", "ofsd-1")
KINDS = {"one": (1, 1), "strong": (2, 1), "weak": (2, 2)}
"""Kind -> number of processes, and factor of the number of questions."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.toml"))
    parser.add_argument("--runs", type=Path, default=Path("runs/parallel-benchmark"), help="directory of the runs, recreated")
    parser.add_argument("--questions", type=int, default=60, help="questions of pool and evaluation with one process")
    parser.add_argument("--steps", type=int, default=4, help="GRPO steps")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments, overrides = parser.parse_known_args()
    rows = [row for repeat in range(arguments.repeats) for kind in KINDS for row in measure(kind, arguments, overrides, repeat)]
    out = Console(width=None if sys.stdout.isatty() else 100)
    out.print(
        f"{platform.machine()}, {os.cpu_count()} cores, one thread a process, load {os.getloadavg()[0]:.1f}; "
        f"{arguments.questions} questions, {arguments.repeats} repeats"
    )
    out.print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(kind: str, arguments: argparse.Namespace, overrides: list[str], repeat: int) -> list[dict[str, Any]]:
    """One row per stage, and one for the start."""
    processes, times = KINDS[kind]
    run, asked = arguments.runs / kind, arguments.questions * times
    shutil.rmtree(run, ignore_errors=True)
    flags = {
        "run": run, "rounds": 1, "pool.questions": asked, "data.max_eval": asked, "grpo.steps": arguments.steps,
        "grpo.questions_per_step": 6 * times, "lead.enforce": "false",
    }  # fmt: skip
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    command = [BIN / "search-e1", "train", "--config", arguments.config, *overrides, *words]
    if processes > 1:
        command = [BIN / "torchrun", "--standalone", "--nproc-per-node", str(processes), "--no-python", "--", *command]
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    whole = time.perf_counter() - begun
    manifests = {path.parent.name: json.loads(path.read_text()) for path in run.glob("*/manifest.json")}
    own = {"kind": kind, "processes": processes, "repeat": repeat}
    rows = [
        {**own, "stage": name, "seconds": manifests[name]["seconds"], "cpu": manifests[name]["cpu_seconds"]}
        for name in STAGES
        if name in manifests
    ]
    start = whole - sum(manifest["seconds"] for manifest in manifests.values())
    return [*rows, {**own, "stage": "start", "seconds": start, "cpu": None}]


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(box=None, pad_edge=False)
    headings = ("stage", "1 process s", "2 processes s", "speed-up", "CPU", "2, twice the questions s", "efficiency")
    for heading in headings:
        shown.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in dict.fromkeys(row["stage"] for row in rows):
        of = {kind: [row for row in rows if (row["stage"], row["kind"]) == (stage, kind)] for kind in KINDS}
        if not all(of.values()):
            continue
        one, strong, weak = (median(row["seconds"] for row in own) for own in of.values())
        used = [median(row["cpu"] for row in of[kind]) for kind in ("one", "strong")] if stage != "start" else None
        shown.add_row(
            stage, f"{one:.1f}", f"{strong:.1f}", f"{one / strong:.2f}", f"x {used[1] / used[0]:.2f}" if used else "",
            f"{weak:.1f}", f"{one / weak:.0%}",
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    main()
