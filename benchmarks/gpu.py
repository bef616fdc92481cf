"""All measurements on a GPU: one command, one table, one JSON file.

    python benchmarks/gpu.py                                   # at most 20 minutes; gpu.json
    python benchmarks/gpu.py --parts ceilings divergence       # some parts, in their order; the file keeps the others
    python benchmarks/gpu.py --again updates                   # measure a part again
    python benchmarks/gpu.py --tiny --json tiny.json           # small sizes on a CPU, as a test

Needs a GPU, torch, transformers, peft, accelerate and triton, and PYTHONPATH=src if the package is not installed; rows of TRL,
Liger and pytest say so if these are not installed. Each measurement is a separate process, and each row is written to the file
at once: an interrupted command resumes where it stopped. A contestant that runs out of memory becomes a row. Jobs that do not
start within a part's time are left to the next call. `gpu_report.py` makes the tables of docs/performance.md and the planner's
constants from the file.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contest import measured  # beside this file

HERE = Path(__file__).parent
_LONGEST_JOB = 400.0  # seconds


@dataclass(frozen=True)
class Job:
    """One measurement."""

    row: dict[str, Any]
    """Identifies the measurement; first part of its row, which also holds the command with all sizes."""
    command: Sequence[str]
    """A script in this directory and its arguments."""
    spare: bool = False
    """Run only if the previous job failed."""


@dataclass(frozen=True)
class Part:
    """Measurements that belong together."""

    title: str
    seconds: float
    """Time within which its jobs may start."""
    jobs: Callable[["Sizes"], list[Job]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements."""

    place: tuple[str, ...] = ("--device", "cuda", "--dtype", "bfloat16")
    matrices: int = 8192
    divergence: tuple[str, ...] = ("--positions", "8192", "--width", "2048", "--repeats", "1")
    shape: str = "qwen2.5-3b"
    decoding: tuple[tuple[int, int], ...] = ((320, 1500), (320, 500), (320, 3500), (64, 1500), (8, 1500), (1, 1500))
    """Rows and positions."""
    decoded: int = 64
    rollouts: tuple[str, ...] = ("--rounds", "1")
    updated: tuple[str, ...] = ("qwen2.5-3b", "qwen2.5-1.5b", "qwen2.5-0.5b")
    update: tuple[str, ...] = ("--trajectories", "64", "--longest", "4096", "--steps", "2")
    micro_batches: tuple[int, int] = (8, 2)
    """TRL's default, and the fallback if that fails."""
    coldstart: tuple[str, ...] = ("--shape", "smollm2-135m", "--trajectories", "256", "--steps", "3")
    planned: tuple[tuple[str, str, int, int, bool], ...] = (
        ("grpo-lora", "qwen2.5-3b", 4, 4096, True), ("distill", "qwen2.5-3b", 2, 4096, True),
        ("grpo-lora", "qwen2.5-1.5b", 2, 4096, False), ("grpo", "qwen2.5-1.5b", 2, 4096, True),
        ("distill", "qwen2.5-0.5b", 2, 4096, False),
    )  # fmt: skip
    """Stage, shape, rows, tokens per row, activation checkpointing."""


TINY = Sizes(
    place=("--device", "cpu", "--dtype", "bfloat16"), matrices=64, shape="tiny", decoding=((4, 20), (2, 10)), decoded=4,
    divergence=("--positions", "16", "--width", "8", "--vocabulary", "300", "--repeats", "1"), updated=("tiny",),
    rollouts=("--rounds", "1", "--questions", "1", "--group", "2", "--batch-size", "2", "--prompt", "8", "--action", "3",
              "--observation", "12"),
    update=("--trajectories", "8", "--longest", "60"), micro_batches=(4, 2),
    coldstart=("--shape", "tiny", "--trajectories", "8", "--longest", "60"), planned=(("grpo-lora", "45m", 1, 32, False),),
)  # fmt: skip


def _ceilings(sizes: Sizes) -> list[Job]:
    return [
        Job({"what": "large products, copies"}, ["gpu_measure.py", "ceilings", *sizes.place, "--size", str(sizes.matrices)])
    ]


def _tests(sizes: Sizes) -> list[Job]:
    return [Job({"what": "pytest -m gpu"}, ["gpu_measure.py", "tests"])]


def _divergence(sizes: Sizes) -> list[Job]:
    return [
        Job({"case": case, "candidate": name}, ["divergence.py", *sizes.place, *sizes.divergence, "--child", name, case])
        for case in ("all positions", "30% sampled")
        for name in ("ours", "TRL", "Liger, default", "Liger", "naive")
    ]


def _decoding(sizes: Sizes) -> list[Job]:
    return [
        Job(
            {"shape": sizes.shape, "rows": rows, "positions": positions},
            ["gpu_measure.py", "decoding", *sizes.place, "--shape", sizes.shape, "--rows", str(rows),
             "--positions", str(positions), "--tokens", str(sizes.decoded)],
        )
        for rows, positions in sizes.decoding
    ]  # fmt: skip


def _rollouts(sizes: Sizes) -> list[Job]:
    return [
        Job(
            {"shape": sizes.shape, "contestant": name},
            ["rollout_shape.py", *sizes.place, "--shape", sizes.shape, *sizes.rollouts, "--contestant", name],
        )
        for name in ("single turn", "4 turns", "4 turns, plain")
    ]


def _updates(sizes: Sizes) -> list[Job]:
    """Most important first: adapters, then large shapes."""
    made = []
    for weights in ("lora", "all"):
        for shape in sizes.updated:
            for objective in ("grpo", "distill"):
                common = ["update.py", *sizes.place, *sizes.update, "--objective", objective, "--shape", shape]
                common += ["--weights", weights, "--contestant"]
                row = {"objective": objective, "shape": shape, "weights": weights}
                default, fewer = (["--micro-batch", str(count)] for count in sizes.micro_batches)
                made += [
                    Job({**row, "contestant": "ours"}, [*common, "ours"]),
                    Job({**row, "contestant": f"TRL, {default[1]} rows a pass"}, [*common, "TRL", *default]),
                    Job({**row, "contestant": f"TRL, {fewer[1]} rows a pass, checkpointing"},
                        [*common, "TRL", *fewer, "--checkpointing"], spare=True),
                ]  # fmt: skip
    return made


def _coldstart(sizes: Sizes) -> list[Job]:
    command = ["update.py", *sizes.place, *sizes.coldstart, "--objective", "sft", "--contestant", "ours"]
    return [Job({"shape": sizes.coldstart[1], "contestant": "ours"}, command)]


def _plan(sizes: Sizes) -> list[Job]:
    return [
        Job(
            {"stage": stage, "shape": shape, "rows": rows, "tokens": tokens, "checkpointing": recomputed},
            ["plan.py", *sizes.place, "--rows", str(rows), "--tokens", str(tokens), *["--checkpointing"] * recomputed,
             *["--mixed"] * (stage in ("grpo", "distill-all")), "--measure", stage, "--shapes", shape],
        )
        for stage, shape, rows, tokens, recomputed in sizes.planned
    ]  # fmt: skip


PARTS = {
    "ceilings": Part("Ceilings: large products and copies", 30, _ceilings),
    "tests": Part("Tests of the CUDA paths", 100, _tests),
    "divergence": Part("The divergence: loss and gradient", 130, _divergence),
    "decoding": Part("Decoding by rows and positions", 170, _decoding),
    "rollouts": Part("Rollouts of four turns, and one turn of as many tokens", 150, _rollouts),
    "updates": Part("Updates of GRPO and of distillation", 360, _updates),
    "coldstart": Part("Cold start", 40, _coldstart),
    "plan": Part("The plan beside the measured", 130, _plan),
}
"""Most important first; 18.5 minutes in total."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--again", nargs="+", choices=PARTS, default=[], help="forget what the file has of these")
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU")
    parser.add_argument("--minutes", type=float, default=20, help="time limit for starting jobs")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    arguments = parser.parse_args()
    sizes = TINY if arguments.tiny else Sizes()
    report = Report.read(arguments.json, sizes)
    for name in arguments.again:
        report.parts.pop(name, None)
    end = time.monotonic() + 60 * arguments.minutes
    for name in PARTS:
        if name in {*arguments.parts, *arguments.again}:
            report.measure(name, sizes, end)
    from gpu_report import show

    show(json.loads(arguments.json.read_text(encoding="utf-8")))


@dataclass
class Report:
    """The content of the JSON file."""

    path: Path
    machine: dict[str, Any]
    parts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, sizes: Sizes) -> "Report":
        """The content of ``path`` so far. Exits if it is from another machine."""
        machine = run(["gpu_measure.py", "machine", *sizes.place], 300)
        if "failed" in machine:
            sys.exit(f"nothing can be measured on {sizes.place[1]}: {machine['failed']}")
        if not path.exists():
            return cls(path, machine)
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["machine"]["device"] != machine["device"]:
            sys.exit(f"{path} is of {found['machine']['device']}, and this is {machine['device']}; give another --json FILE")
        return cls(path, machine, found["parts"])

    def measure(self, name: str, sizes: Sizes, end: float) -> None:
        """Run a part's jobs that the file lacks, until the part's time or the total time is over."""
        part, begun = PARTS[name], time.monotonic()
        kept = self.parts.setdefault(name, {"seconds": 0.0, "rows": [], "complete": False})
        rows, failed = {_key(row["of"]): row for row in kept["rows"]}, False
        kept["complete"] = False
        for job in part.jobs(sizes):
            row = rows.get(_key(job.row))
            if row is None and not (job.spare and not failed):
                left = min(part.seconds - (time.monotonic() - begun), end - time.monotonic())
                if left <= 0:
                    break
                started = time.monotonic()
                row = {
                    "of": job.row,
                    "command": " ".join(job.command),
                    **run([*job.command, *self._gpu(job)], min(_LONGEST_JOB, left + 60)),
                }
                kept["rows"].append(row)
                kept["seconds"] += time.monotonic() - started
                self.write()
                print(f"{name}: {json.dumps(row)}", file=sys.stderr, flush=True)
            failed = row is not None and "failed" in row
        else:
            kept["complete"] = True
        self.write()

    def _gpu(self, job: Job) -> list[str]:
        """The option that names this machine's GPU for the planner, if the planner knows it."""
        known = job.command[0] == "plan.py" and self.machine["gpu"]
        return ["--gpu", self.machine["gpu"]] if known else []

    def write(self) -> None:
        ordered = {name: self.parts[name] for name in PARTS if name in self.parts}
        text = json.dumps({"machine": self.machine, "parts": ordered}, indent=1)
        temporary = self.path.with_name(f".{self.path.name}.part")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(self.path)


def _key(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True)


def run(command: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run a script in this directory; returns its row."""
    return measured([sys.executable, str(HERE / command[0]), *command[1:]], seconds=seconds)


if __name__ == "__main__":
    main()
