"""Truncate or flip a bit in a random place of a finished run's file, and check that the damage is noticed and not used.

    python benchmarks/damage.py --trials 200 --json results.json

A quarter of the trials each: any file of the run's artifacts, including its index, when the run is started again; a policy
given to an evaluation by path; an index given by path; the newest checkpoint of an unfinished stage. A trial passes if the
command ends with one line that names the damage (a checkpoint: if it is removed, and the previous one is the newest), and if
nothing was made from the damaged file.
"""

import argparse
import json
import os
import platform
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from search_e1 import config, evolve
from search_e1.data.corpus import Corpus
from search_e1.errors import SearchE1Error
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.runs.checkpoints import Checkpointer
from search_e1.stages.evaluate import Evaluate
from search_e1.stages.inputs import Inputs
from search_e1.stages.runner import StageRunner
from small_run import prepare, search_e1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="seed of the places")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments = parser.parse_args()
    with TemporaryDirectory() as scratch:
        rows = trials(Path(scratch), arguments.trials, random.Random(arguments.seed))
    out = Console(width=None if sys.stdout.isatty() else 100)
    out.print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; {len(rows)} trials")
    out.print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(not all(row["noticed"] and not row["used"] for row in rows))


def trials(root: Path, count: int, rng: random.Random) -> list[dict[str, Any]]:
    settings = prepare(root)
    if search_e1("train", "--config", settings, log=root / "log"):
        raise SystemExit((root / "log").read_text())
    run = root / "run"
    Bm25Index.build(Corpus(root / "world" / "corpus.jsonl"), root / "given")
    loaded = config.load(settings)
    given = loaded.model_copy(update={"retrieval": loaded.retrieval.model_copy(update={"index": (root / "given",)})})
    checkpoints(root / "work")
    artifacts = [path for path in run.glob("*/*") if path.parent.name != "index"]
    kinds: list[tuple[str, Sequence[Path], Callable[[Path], str]]] = [
        ("artifact or index", [*artifacts, run / "index"], lambda file: train_again(loaded)),
        ("policy by path", [run / "ofsd-1" / "policy"], lambda file: evaluate(loaded, run)),
        ("index by path", [root / "given"], lambda file: evaluate(given, run)),
        ("checkpoint", [root / "work" / "step-0000000002"], lambda file: newest(root / "work")),
    ]
    rows = []
    for number in range(count):
        kind, places, use = kinds[number % len(kinds)]
        found = (file for place in places for file in (place.rglob("*") if place.is_dir() else [place]))
        file = rng.choice(sorted(file for file in found if file.is_file() and file.stat().st_size))
        rows.append({"trial": number, "kind": kind, **trial(rng, file, use, root)})
    return rows


def trial(rng: random.Random, file: Path, use: Callable[[Path], str], root: Path) -> dict[str, Any]:
    whole, stage = file.read_bytes(), root / "work"
    kept = root / "kept"
    shutil.copytree(stage, kept)
    before = listing(root / "run")
    size, how = len(whole), rng.choice(("truncated", "flipped"))
    at = rng.randrange(size)
    damaged = bytearray(whole)
    if how == "truncated":
        del damaged[at:]
    else:
        damaged[at] ^= 1 << rng.randrange(8)
    file.write_bytes(damaged)
    said = use(file)
    used = listing(root / "run") != before
    shutil.rmtree(root / "run" / "evaluation-again", ignore_errors=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(whole)
    shutil.rmtree(stage)
    kept.rename(stage)
    return {
        "file": str(file.relative_to(root)),
        "how": how,
        "at": at,
        "said": said,
        "noticed": bool(said),
        "used": used,
    }


def listing(run: Path) -> set[str]:
    """The directories made by stages, without locks and other temporary files."""
    return {path.name for path in run.iterdir() if path.is_dir()}


def said_by(work: Callable[[], object]) -> str:
    try:
        work()
    except SearchE1Error as error:
        return str(error)
    return ""


def train_again(settings: config.Config) -> str:
    return said_by(lambda: evolve.train(settings))


def evaluate(settings: config.Config, run: Path) -> str:
    """Evaluate the run's last policy under another name."""
    return said_by(lambda: StageRunner(Inputs(settings, run)).make(Evaluate(run / "ofsd-1" / "policy", "again")))


def checkpoints(directory: Path) -> None:
    """Save two checkpoints."""
    checkpointer = Checkpointer(directory, every_seconds=0.0, share=float("inf"))  # after every step
    for step in (1, 2):
        checkpointer.on_step_end(step, lambda place: torch.save(torch.randn(64, 64), place / "weights.pt"))


def newest(directory: Path) -> str:
    found = Checkpointer(directory).newest()
    return f"step 2 removed, gone on from {found.name}" if found and found.name.endswith("1") else ""


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(box=None, pad_edge=False)
    for heading in ("what", "trials", "truncated", "flipped", "files", "noticed", "used"):
        shown.add_column(heading, justify="left" if heading == "what" else "right")
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for kind in (*kinds, "all"):
        of = [row for row in rows if kind in ("all", row["kind"])]
        how = Counter(row["how"] for row in of)
        shown.add_row(
            kind, str(len(of)), str(how["truncated"]), str(how["flipped"]), str(len({row["file"] for row in of})),
            str(sum(row["noticed"] for row in of)), str(sum(row["used"] for row in of)),
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    main()
