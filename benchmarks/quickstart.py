"""The quickstart with several seeds: the effect and cost of each stage.

    python benchmarks/quickstart.py --seeds 0 1 2 --json results.json

Complete runs are not run again. Seeds run one after another, so that each has the whole machine.
"""

import argparse
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; the command line does the same

import torch
from rich.console import Console
from rich.table import Table

from search_e1 import config, evolve
from search_e1.cli.display import watch
from search_e1.runs.allocation import keep_freed_memory

FIGURES = ("em", "em_sampled", "searches", "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.toml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/quickstart-seeds"), help="directory with one run per seed")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments, overrides = parser.parse_known_args()
    keep_freed_memory()  # as the command line does
    console = Console(file=sys.stderr)
    rows = []
    for seed in arguments.seeds:
        flags = ["--seed", str(seed), "--run", str(arguments.runs / str(seed)), *overrides]
        settings = config.load(arguments.config, flags)
        rows += seed_rows(evolve.train(settings, watch(console, settings.rounds)))
    out = Console(width=None if sys.stdout.isatty() else 100)
    out.print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, transformers {version('transformers')}; "
        f"{len(arguments.seeds)} seeds, one run each"
    )
    out.print(table(rows, arguments.seeds))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def seed_rows(summary: evolve.Summary) -> list[dict]:
    """One row per evaluated policy; ``lead`` was measured before it, ``seconds`` are of the whole run."""
    rows = []
    for policy in summary.policies:
        row = {"seed": summary.seed, "stage": policy.stage, **{name: getattr(policy, name) for name in FIGURES}}
        kind, _, number = policy.stage.rpartition("-")
        row["lead"] = summary.lead[number] if kind == "ofsd" else None
        rows.append(row | {"by_hops": policy.by_hops, "seconds": sum(summary.seconds.values())})
    return rows


def table(rows: list[dict], seeds: list[int]) -> Table:
    made = Table(title="greedy EM by seed; the other columns are means over seeds")
    for heading in ("policy", *(f"seed {seed}" for seed in seeds), "EM", "sampled", "searches", "tokens", "lead"):
        made.add_column(heading, justify="left" if heading == "policy" else "right")
    for stage in dict.fromkeys(row["stage"] for row in rows):
        here = {row["seed"]: row for row in rows if row["stage"] == stage}
        leads = [row["lead"] for row in here.values() if row["lead"] is not None]
        made.add_row(
            stage,
            *(f"{here[seed]['em']:.3f}" if seed in here else "" for seed in seeds),
            *(f"{fmean(row[name] for row in here.values()):.3f}" for name in FIGURES),
            f"{fmean(leads):+.3f}" if leads else "",
        )
    seconds = {row["seed"]: row["seconds"] for row in rows}
    made.caption = "seconds of the stages: " + ", ".join(f"seed {seed}: {seconds[seed]:.0f}" for seed in seeds)
    return made


if __name__ == "__main__":
    main()
