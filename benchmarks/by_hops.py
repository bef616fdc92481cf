"""EM of a sweep's policies by the number of hops, and the share of questions that a pool cannot teach.

    python benchmarks/by_hops.py runs/hard runs/hard-gold

One row per variant and stage: greedy EM by hops, as means over the seeds that have finished the stage. For a pool, the share of
questions without a correct trajectory: they have no reference.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from search_e1.rollout import pool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", type=Path, nargs="+", metavar="SWEEP")
    rows: dict[tuple[str, str], list[dict[int, float]]] = defaultdict(list)
    for sweep in parser.parse_args().sweeps:
        for run in sorted(sweep.glob("runs/*/*")):
            for stage, figures in of_run(run):
                rows[run.parent.name, stage].append(figures)
    hops = sorted({number for seeds in rows.values() for figures in seeds for number in figures})
    print(f"{'variant':<14} {'stage':<24} {'seeds':>5} " + " ".join(f"{number:>6}" for number in hops))
    for (variant, stage), seeds in rows.items():
        means = (fmean(figures[number] for figures in seeds if number in figures) for number in hops)
        print(f"{variant:<14} {stage:<24} {len(seeds):>5} " + " ".join(f"{mean:>6.3f}" for mean in means))


def of_run(run: Path) -> Iterator[tuple[str, dict[int, float]]]:
    """Greedy EM by hops of each evaluated policy, in run order, and the figures of its pools."""
    for path in sorted(run.glob("evaluation-*/evaluation.json"), key=lambda path: path.stat().st_mtime):
        by_hops = json.loads(path.read_text("utf-8"))["by_hops"]
        yield path.parent.name.removeprefix("evaluation-"), {int(n): cell["em"] for n, cell in by_hops.items()}
    for path in sorted(run.glob("pool-*/groups.jsonl")):
        never = defaultdict(list)
        for group in pool.read(path):
            never[group.question.hops].append(not any(trajectory.correct for trajectory in group.trajectories))
        yield f"{path.parent.name}, never right", {int(n): fmean(each) for n, each in never.items() if n is not None}


if __name__ == "__main__":
    main()
