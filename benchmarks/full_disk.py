"""Let the disk fill up at random points of a small run, make room, resume the run, and check the result.

    python benchmarks/full_disk.py --levels 20 --json results.json

Each trial has its own in-memory file system (this needs Linux, and root or `unshare -rm`) with a random share of the space that
the run needs. The run must end with one line and status 2; every finished artifact must verify and equal that of a run with
enough space; and with enough space the run must complete, with the same files.
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from search_e1 import evolve  # noqa: F401  loaded once, before processes are forked
from small_run import contents, prepare, search_e1

ROOM = 2**20
"""Minimum free bytes: enough for the lock, the config, and small files."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="seed of the levels")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments = parser.parse_args()
    if os.geteuid():  # mounting is allowed as root of a separate namespace
        sys.exit(subprocess.run(["unshare", "-rm", sys.executable, *sys.argv], check=False).returncode)
    with TemporaryDirectory() as scratch:
        rows = trials(Path(scratch), arguments.levels, random.Random(arguments.seed))
    out = Console(width=None if sys.stdout.isatty() else 100)
    out.print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; {len(rows)} fill levels")
    out.print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    # No message is expected if the space was enough after all.
    told = all(row["one_line"] or row["status"] == 0 for row in rows)
    sys.exit(not (told and all(row["unharmed"] and row["completed"] for row in rows)))


def trials(scratch: Path, count: int, rng: random.Random) -> list[dict[str, Any]]:
    """One row per fill level. A first run with enough space measures how much a run needs."""
    settings = prepare(scratch)
    if search_e1("train", "--config", settings, log=scratch / "log"):
        raise SystemExit((scratch / "log").read_text())
    expected = contents(scratch / "run")
    needed = sum(file.stat().st_size for file in (scratch / "run").rglob("*") if file.is_file())
    shutil.rmtree(scratch / "run")
    disk = scratch / "run"
    disk.mkdir()
    rows = []
    for number in range(count):
        size = 2 * needed
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
        try:
            row = trial(disk, settings, size, int(ROOM + rng.random() * 0.9 * needed), expected, scratch / "log")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        rows.append({"level": number, "free_mib": row["free"] / 2**20, **row})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def trial(disk: Path, settings: Path, size: int, free: int, expected: dict[str, str], log: Path) -> dict[str, Any]:
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size - free)
    status = search_e1("train", "--config", settings, log=log)
    said = [line for line in log.read_text().splitlines() if line.startswith("search-e1: ")]
    one_line = (
        status == 2
        and len(said) == 1
        and ("the disk is full" in said[0] or "make room" in said[0])
        and "Traceback" not in log.read_text()
    )
    made = contents(disk)
    unharmed = all(expected.get(name) == checksum for name, checksum in made.items())
    finished = sorted({name.split("/")[0] for name in made})
    ballast.unlink()
    completed = search_e1("train", "--config", settings, log=log) == 0 and contents(disk) == expected
    return {
        "free": free, "status": status, "said": said, "one_line": one_line, "finished": finished, "unharmed": unharmed,
        "completed": completed, "left": [path.name for path in disk.iterdir() if path.name.endswith(".partial")],
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(box=None, pad_edge=False)
    for heading in (
        "stopped after",
        "levels",
        "free MiB",
        "one line, status 2",
        "earlier unharmed",
        "completed the same",
    ):
        shown.add_column(heading, justify="left" if heading == "stopped after" else "right")
    for count in sorted({len(row["finished"]) for row in rows}):
        of = [row for row in rows if len(row["finished"]) == count]
        room = sorted(row["free_mib"] for row in of)
        shown.add_row(
            f"{count} artifacts", str(len(of)), f"{room[0]:.1f}-{room[-1]:.1f}",
            *(str(sum(row[name] for row in of)) for name in ("one_line", "unharmed", "completed")),
        )  # fmt: skip
    totals = (str(sum(row[name] for row in rows)) for name in ("one_line", "unharmed", "completed"))
    shown.add_row("all", str(len(rows)), "", *totals)
    return shown


if __name__ == "__main__":
    main()
