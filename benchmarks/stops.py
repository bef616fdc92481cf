"""The time that a stage takes to stop on SIGTERM, and what it keeps.

    python benchmarks/stops.py evaluate rollout grpo --config configs/quickstart.toml
    python benchmarks/stops.py evaluate --config FILE --delays 30 60 -- --policy.model DIR

Each verb is started, sent SIGTERM after each delay (seconds since the first file of its artifact), and started again. A row
gives the time until it ended, its exit status, and what was on disk then: sampled ids of interrupted trajectories, complete
trajectories, steps, and passes of the current step. Arguments after ``--`` go to the command.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from search_e1.config import load

STAGES = {"evaluate": "evaluation-base", "rollout": "pool-1", "grpo": "grpo-1"}
_WAIT = 600.0
"""Seconds that a stage may take to start or to end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="+", choices=STAGES)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--delays", type=float, nargs="+", default=[3.0, 3.0])
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    own, more = (
        (sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]) if "--" in sys.argv else (sys.argv[1:], [])
    )
    arguments = parser.parse_args(own)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for verb in arguments.verbs:
            run = Path(directory) / verb
            for attempt, delay in enumerate(arguments.delays, 1):
                rows.append(stop(verb, arguments.config, run, more, delay, attempt))
                print(rows[-1], file=sys.stderr)
            shutil.rmtree(run)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, justify="right" if name != "stage" else "left")
    for row in rows:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=100).print(f"{os.cpu_count()} cores, torch {torch.__version__}", table)


def stop(verb: str, config: Path, run: Path, more: list[str], delay: float, attempt: int) -> dict[str, Any]:
    """Start the verb's stage for the ``attempt``-th time, send SIGTERM after ``delay`` seconds, and examine what is left."""
    command = [str(Path(sys.executable).parent / "search-e1"), verb, "--config", str(config), "--run", str(run), *more]
    if verb in ("rollout", "grpo"):  # no earlier stage of this run made a policy
        command += ["--policy", value_of(more, "--policy.model") or load(config).policy.model]
        command += ["--evaluation.recall", "false"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    partial = run / f".{STAGES[verb]}.partial"
    begun = partial / ".work" / "begun.json"
    wait_for(process, lambda: begun.exists() and json.loads(begun.read_text())["attempts"] == attempt)
    time.sleep(delay)
    clock = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=_WAIT)
    seconds = time.perf_counter() - clock
    if process.returncode != 75:
        print(errors, file=sys.stderr)
    return {"stage": verb, "after s": delay, "ended in s": seconds, "status": process.returncode, **kept(partial)}


def value_of(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


def wait_for(process: subprocess.Popen, ready: Any) -> None:
    end = time.monotonic() + _WAIT
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"the stage did not begin: {process.stderr.read() if process.stderr else ''}")
        time.sleep(0.05)


def kept(partial: Path) -> dict[str, int]:
    """Counts of what the unfinished artifact holds."""
    ids = whole = steps = passes = 0
    for path in (partial / ".work").glob("unfinished-*.json"):
        for row in json.loads(path.read_text())["rows"].values():
            ids += len(row["ids"]) + sum(len(turn["action_ids"]) for turn in row["turns"])
            whole += row["stop"] is not None
    for path in sorted((partial / ".work").glob("step-*"))[-1:]:
        steps = len(json.loads((path / "steps.json").read_text()))
        state = torch.load(path / "rank-0.pt", weights_only=True)
        passes = state["unfinished"]["passes"] if "unfinished" in state else 0
    return {"sampled ids": ids, "ended rows": whole, "steps": steps, "passes": passes}


if __name__ == "__main__":
    main()
