"""Kill the retrieval server within a stage, restart it later, and check the run's result.

    python benchmarks/outage.py --seconds 60 --json results.json

In one run the server stays up; in the other it is killed with SIGKILL in the middle of GRPO and again in the middle of the
pool, and stays down for ``--seconds`` each time. The second run must complete by itself with bit-identical files: the outages
then changed no trajectory and no weight.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import torch
from rich.console import Console

from search_e1 import evolve  # noqa: F401  loaded once, before processes are forked
from search_e1.data.corpus import Corpus
from search_e1.retrieval.bm25 import Bm25Index
from small_run import contents, prepare, search_e1

STAGES = ("grpo-1", "pool-1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of each outage")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    arguments = parser.parse_args()
    with TemporaryDirectory() as scratch:
        result = measure(Path(scratch), arguments.seconds)
    out = Console(width=None if sys.stdout.isatty() else 100)
    out.print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; outages of {arguments.seconds:g} s")
    for name, value in result.items():
        out.print(f"{name:<28} {value}", highlight=False)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(not (result["completed"] and result["same files"] == result["files"]))


class Server:
    """``search-e1 serve-retriever`` over the small world."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        command = [
            Path(sys.executable).with_name("search-e1"),
            "serve-retriever",
            "--index",
            self.root / "given",
            "--port",
            self.port,
        ]
        with (self.root / "server.log").open("a") as log:
            self.process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
        for _ in range(600):
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/healthz", trust_env=False).is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise SystemExit((self.root / "server.log").read_text())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def measure(root: Path, seconds: float) -> dict[str, Any]:
    prepare(root)
    Bm25Index.build(Corpus(root / "world" / "corpus.jsonl"), root / "given")
    server = Server(root)
    try:
        settings = prepare(root, f'url = "http://127.0.0.1:{server.port}"\ncache = false', steps=3)
        began = time.monotonic()
        if search_e1("train", "--config", settings, log=root / "log"):
            raise SystemExit((root / "log").read_text())
        took, expected = time.monotonic() - began, contents(root / "run")
        shutil.rmtree(root / "run")
        outages: list[str] = []
        breaker = threading.Thread(target=interrupt, args=(server, root / "run", seconds, outages), daemon=True)
        began = time.monotonic()
        breaker.start()
        status = search_e1("train", "--config", settings, log=root / "log")
        took_with = time.monotonic() - began
        found = contents(root / "run")
    finally:
        server.kill()
    said = [line for line in (root / "log").read_text().splitlines() if "tried again" in line or "answers again" in line]
    return {
        "outages": ", ".join(outages), "completed": status == 0, "files": len(expected),
        "same files": sum(found.get(name) == checksum for name, checksum in expected.items()),
        "failed retrievals": failed(root / "run"), "seconds without outage": round(took, 1),
        "seconds with outages": round(took_with, 1), "said": said,
    }  # fmt: skip


def interrupt(server: Server, run: Path, seconds: float, outages: list[str]) -> None:
    """Cause an outage in each of ``STAGES``, as soon as its directory exists."""
    for stage in STAGES:
        while not (run / f".{stage}.partial").exists():
            time.sleep(0.05)
        server.kill()
        time.sleep(seconds)
        server.start()
        outages.append(f"{stage} {'still at work' if (run / f'.{stage}.partial').exists() else 'over'}")


def failed(run: Path) -> int:
    """Number of served searches without passages, over all stored trajectories of the run."""
    count = 0
    for path in run.glob("*/*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            for trajectory in record.get("trajectories", ()):
                count += sum(bool(turn["observation_ids"]) and turn["kind"] == "search" and not turn["passage_ids"]
                             for turn in trajectory["turns"])  # fmt: skip
    return count


if __name__ == "__main__":
    main()
