"""Size of a run's report, and the time until a browser shows it.

    python benchmarks/report.py --run runs/quickstart --json report.json

Headless Chromium opens the report of the given run, if any, and of a generated run with 5,000 trajectories (1,000 questions
under five policies, three passages per search, about as long as Wikipedia's), each several times with a new profile. First
paint is the browser's own figure, from the start of the navigation; "ready" is when trajectories can be searched.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from rich.console import Console
from rich.table import Table

import chromium
from made_run import make_run
from search_e1.evaluation.report import page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run directory")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--questions", type=int, default=1_000, help="questions of the generated run, under five policies")
    parser.add_argument("--words", type=int, default=100, help="words per passage of the generated run")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments = parser.parse_args()
    if chromium.MISSING:
        sys.exit(chromium.MISSING)
    with tempfile.TemporaryDirectory() as scratch:
        made = make_run(Path(scratch) / "run", questions=arguments.questions, words=arguments.words)
        runs = {"made": made} | ({arguments.run.name: arguments.run} if arguments.run else {})
        rows = [measure(name, run, Path(scratch), arguments.repeats) for name, run in runs.items()]
    version = subprocess.run([str(chromium.BROWSER), "--version"], capture_output=True, text=True).stdout.strip()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {version}; median and greatest of {arguments.repeats} openings")
    Console(width=None if sys.stdout.isatty() else 100).print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(name: str, run: Path, scratch: Path, repeats: int) -> dict[str, Any]:
    """Figures in milliseconds, except ``write_s``."""
    out = scratch / f"{name}.html"
    begun = time.perf_counter()
    shown = page.write(run, out)
    written = time.perf_counter() - begun
    paints, readies = [], []
    for repeat in range(repeats):
        with chromium.opened(scratch / f"{name}-{repeat}") as driver:
            driver.get(out.as_uri())
            while not driver.execute_script("return document.body.dataset.ready"):
                time.sleep(0.005)
            readies.append(driver.execute_script("return performance.now()"))
            entries = driver.execute_script("return performance.getEntriesByType('paint').map((one) => one.startTime)")
            paints.append(min(entries))
    return {
        "run": name, "trajectories": shown["trajectories"], "pairs": shown["pairs"], "bytes": shown["bytes"],
        "write_s": written, "first_paint_ms": paints, "ready_ms": readies,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table()
    for heading in ("run", "trajectories", "pairs", "MB", "write s", "first paint ms", "ready ms"):
        made.add_column(heading, justify="left" if heading == "run" else "right")
    for row in rows:
        times = [f"{median(row[key]):.0f} ({max(row[key]):.0f})" for key in ("first_paint_ms", "ready_ms")]
        figures = [f"{row['trajectories']:,}", str(row["pairs"]), f"{row['bytes'] / 1e6:.1f}", f"{row['write_s']:.1f}"]
        made.add_row(row["run"], *figures, *times)
    return made


if __name__ == "__main__":
    main()
