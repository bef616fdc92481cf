"""What working in several processes costs and gives: the loop's overhead by stage, and how stages scale.

    python benchmarks/launch.py                                  # the quickstart with two processes: overhead
    python benchmarks/launch.py --scaling                        # pool, evaluation, GRPO, distillation with 1 and 2 processes

Takes the quickstart's config (its world: `search-e1 world runs/quickstart-world`) and further flags for it. Work is what a
stage's own function takes on the first process, less checkpoints and chunks on disk. All else is overhead: start and end of the
group, policy, questions and index read by each process, checkpoints, manifests, checksums, and the program's own start. Shares
are also given of CPU time, of all processes, which other work on the machine disturbs less. Strong scaling: the same questions
with two processes as with one. Weak scaling: twice as many.
"""

import os
import time

BEGUN = time.time()
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from search_e1 import worker
from search_e1.config import Config, load
from search_e1.launch import processes
from search_e1.runs import checkpoints, cpu, opening, ranks
from search_e1.stages import all as stage_module
from search_e1.stages.all import Stages
from search_e1.stages.runner import Maker, StageSpec

TIMES = "LAUNCH_BENCHMARK_TIMES"
"""Directory where each process leaves what its stages took."""


def rank() -> None:
    """One process of a group: a worker whose stage is timed."""
    timed_stages()
    worker.main()


def timed_stages() -> None:
    """Note wall and CPU time of each stage's own function, and what of it went into files."""
    saved = [0.0]
    for owner, name in ((checkpoints.Work, "_save"), (checkpoints.Lines, "append")):
        setattr(owner, name, adding(getattr(owner, name), saved))
    for owner, name in (
        (stage_module.grpo_trainer, "train"),
        (stage_module.pool, "sample"),
        (stage_module.teacher, "measure"),
        (stage_module.distill_trainer, "train"),
        (stage_module, "evaluate"),
    ):
        setattr(owner, name, noted(getattr(owner, name), saved))


def adding(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - begun

    return call


def noted(function: Callable[..., Any], saved: list[float]) -> Callable[..., Any]:
    def call(*args: Any, out: Path | None = None, **kwargs: Any) -> Any:
        wall, used, before = time.perf_counter(), time.process_time(), saved[0]
        try:
            return function(*args, **({} if out is None else {"out": out}), **kwargs)
        finally:
            row = {
                "rank": ranks.rank(), "seconds": time.perf_counter() - wall - (saved[0] - before),
                "cpu": time.process_time() - used,
            }  # fmt: skip
            place = Path(os.environ[TIMES]) / f"{time.time():.6f}-{ranks.rank()}.json"
            place.write_text(json.dumps(row))

    return call


def taken() -> list[dict[str, float]]:
    """What was noted since, in order; gone then."""
    files = sorted(Path(os.environ[TIMES]).iterdir())
    rows = [json.loads(file.read_text()) for file in files]
    for file in files:
        file.unlink()
    return rows


def overhead(config: Config) -> list[dict[str, Any]]:
    """The whole loop, stage by stage."""
    from search_e1 import evolve

    rows: list[dict[str, Any]] = []
    make = Maker.artifact

    def artifact(self: Maker, stage: StageSpec) -> Any:
        taken()
        begun, used = time.time(), cpu.seconds()
        made = make(self, stage)
        whole, of = time.time() - begun, taken()
        if whole < made.manifest.seconds:  # made before
            return made
        first = [row["seconds"] for row in of if not row["rank"]]
        work, busy = (
            (sum(first), sum(row["cpu"] for row in of)) if of else (made.manifest.seconds, made.manifest.cpu_seconds)
        )
        rows.append(
            {"stage": stage.name, "seconds": whole, "work": work, "cpu": cpu.seconds() - used, "cpu_work": busy}
        )
        return made

    Maker.artifact = artifact  # type: ignore[method-assign]
    evolve.train(config)
    rest = {
        "seconds": time.time() - BEGUN - sum(r["seconds"] for r in rows),
        "cpu": cpu.seconds() - sum(r["cpu"] for r in rows),
    }
    rows.append({"stage": "start, check", **rest, "work": 0.0, "cpu_work": 0.0})
    rows.append(
        {"stage": "all", **{key: sum(row[key] for row in rows) for key in ("seconds", "work", "cpu", "cpu_work")}}
    )
    return rows


def scaling(arguments: argparse.Namespace, overrides: list[str]) -> list[dict[str, Any]]:
    """The stages with one process, with two, and with two and twice the questions."""
    rows = []
    for kind, count, times in (("one", 1, 1), ("strong", 2, 1), ("weak", 2, 2)):
        asked = arguments.questions * times
        flags = {
            "run": f"{arguments.run}-{kind}", "launch.processes": count, "pool.questions": asked, "data.max_eval": asked,
            "grpo.steps": 4, "grpo.questions_per_step": 6 * times, "lead.enforce": "false",
        }  # fmt: skip
        shutil.rmtree(flags["run"], ignore_errors=True)
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        config = load(arguments.config, [*overrides, *words])
        for name, seconds in stage_by_stage(config):
            rows.append({"stage": name, "kind": kind, "processes": count, "times": times, "seconds": seconds})
    return rows


def stage_by_stage(config: Config) -> Iterator[tuple[str, float]]:
    """Seconds of work of the first process in each stage of a run."""
    policy = config.policy.model
    with opening.opened(config.run, config.binding()) as root:
        made = Stages(config, root)
        made.check(policy)
        for name, work in (
            ("evaluation", lambda: made.evaluate(policy, "base")),
            ("GRPO", lambda: made.grpo(policy, 1)),
            ("pool", lambda: made.pool(policy, 1)),
            ("distillation", lambda: distilled(made, policy)),
        ):
            taken()
            work()
            yield name, [row["seconds"] for row in taken() if not row["rank"]][-1]


def distilled(stages: Stages, policy: str) -> None:
    pairs = stages.pairs(policy, stages.root / "pool-1", 1).path
    stages.distill(policy, pairs, stages.lead(policy, pairs, 1).path, 1)


def show(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    load_now = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread a process, load {load_now}")
    if not arguments.scaling:
        print(
            "| stage | seconds | work | overhead | CPU-s | CPU-s of work | overhead |\n|---|---:|---:|---:|---:|---:|---:|"
        )
        for r in rows:
            wall, used = 1 - r["work"] / r["seconds"], 1 - r["cpu_work"] / r["cpu"] if r["cpu"] else 0.0
            print(
                f"| {r['stage']} | {r['seconds']:.1f} | {r['work']:.1f} | {wall:.0%} | {r['cpu']:.1f} | {r['cpu_work']:.1f} | "
                f"{used:.0%} |"
            )
        return
    print("| stage | 1 process s | 2 processes s | speed-up | 2 processes, twice the questions s | efficiency |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in dict.fromkeys(row["stage"] for row in rows):
        one, strong, weak = (row["seconds"] for row in rows if row["stage"] == name)
        print(f"| {name} | {one:.1f} | {strong:.1f} | {one / strong:.2f} | {weak:.1f} | {one / weak:.0%} |")


def main() -> None:
    if "RANK" in os.environ:
        rank()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.toml"))
    parser.add_argument("--run", default="runs/launch-benchmark", help="made anew")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--questions", type=int, default=60, help="with --scaling, for one process")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments, overrides = parser.parse_known_args()
    times = Path(f"{arguments.run}-times").absolute()
    times.mkdir(parents=True, exist_ok=True)
    os.environ[TIMES] = str(times)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    processes.MODULE = Path(__file__).stem
    timed_stages()  # of the stages in this process
    shutil.rmtree(arguments.run, ignore_errors=True)
    if arguments.scaling:
        rows = scaling(arguments, overrides)
    else:
        rows = overhead(load(arguments.config, ["--launch.processes", "2", *overrides, "--run", arguments.run]))
    show(rows, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
