"""The cost of being resumable: the time of checkpoints, chunks on disk, and manifests in the quickstart.

    python benchmarks/overhead.py --run runs/overhead --rounds 1 --json results.json

Takes the quickstart's config (`make quickstart` makes its world) and more flags for it. With `--every 0`, checkpoints are as
frequent as their share of the time allows, which is their maximum cost.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; the command line does the same

from rich.console import Console
from rich.table import Table

from search_e1 import config, evolve, runs
from search_e1.cli.display import watch
from search_e1.runs import artifacts, checkpoints

# The measured parts, and the functions that do them. Manifests include the checksums of all inputs and outputs.
PARTS = (
    ("checkpoints", checkpoints.Checkpointer, "_save"),
    ("chunks", checkpoints.Lines, "append"),
    ("manifests", runs, "checksum"),
    ("manifests", artifacts, "sha256"),
    ("manifests", artifacts, "_begin"),
    ("manifests", artifacts, "write_summed"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.toml"))
    parser.add_argument("--every", default="60", help="checkpoints.every_seconds")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments, overrides = parser.parse_known_args()
    settings = config.load(arguments.config, ["--checkpoints.every_seconds", arguments.every, *overrides])
    spent: dict[str, float] = defaultdict(float)
    for part, owner, name in PARTS:
        setattr(owner, name, timed(getattr(owner, name), part, spent))
    begun = time.perf_counter()
    summary = evolve.train(settings, watch(Console(file=sys.stderr), settings.rounds))
    total = time.perf_counter() - begun
    rows = [{"part": part, "seconds": seconds, "share": seconds / total} for part, seconds in spent.items()]
    rows.append({"part": "all of these", "seconds": sum(spent.values()), "share": sum(spent.values()) / total})
    out = Console(width=None if sys.stdout.isatty() else 100)
    out.print(
        f"{platform.machine()}, {os.cpu_count()} cores; a run of {total:.0f} s, {len(summary.seconds)} stages, a checkpoint "
        f"every {arguments.every} s, at most {settings.checkpoints.share:.0%} of the time"
    )
    table = Table()
    for heading in ("part", "seconds", "share"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for row in rows:
        table.add_row(row["part"], f"{row['seconds']:.2f}", f"{row['share']:.2%}")
    out.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def timed(function: Callable[..., Any], part: str, spent: dict[str, float]) -> Callable[..., Any]:
    """``function``, with its time added to ``part``, less the time of other parts within it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        begun, before = time.perf_counter(), sum(spent.values())
        try:
            return function(*args, **kwargs)
        finally:
            spent[part] += time.perf_counter() - begun - (sum(spent.values()) - before)

    return call


if __name__ == "__main__":
    main()
