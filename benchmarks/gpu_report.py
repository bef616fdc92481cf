"""The measurements of `gpu.py` as tables and as the planner's constants.

    python benchmarks/gpu_report.py gpu.json                                   # the tables, in the terminal
    python benchmarks/gpu_report.py gpu.json --docs docs/performance.md        # the tables between the markers there
    python benchmarks/gpu_report.py gpu.json --constants src/search_e1/lab/plan/measured.toml

The table of a part that was not measured says so, with the command. Constants are shares of the GPU's data sheet: the median
over updates, and the best fit to the decoding steps; their error is the largest over all measurements.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from gpu import PARTS  # beside this file
from search_e1.lab.plan.constants import Gpu, load_constants

Rows = list[dict[str, Any]]
Cells = list[list[str]]
_MARKS = "<!-- gpu: {name} -->", "<!-- /gpu: {name} -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, nargs="?", help="gpu.py's file; without it, nothing is measured")
    parser.add_argument("--docs", type=Path, help="fill the tables of this file")
    parser.add_argument("--constants", type=Path, help="write the planner's constants here")
    arguments = parser.parse_args()
    report = json.loads(arguments.report.read_text(encoding="utf-8")) if arguments.report else {"machine": None, "parts": {}}
    if arguments.docs:
        arguments.docs.write_text(fill(arguments.docs.read_text(encoding="utf-8"), report), encoding="utf-8")
    if arguments.constants:
        made = constants_of(report)
        if made is None:
            sys.exit(f"{arguments.report}: updates and decoding of a GPU that the planner knows are needed for its constants")
        import tomli_w  # not installed on a bare machine

        arguments.constants.write_text(tomli_w.dumps(made), encoding="utf-8")
    if not arguments.docs and not arguments.constants:
        show(report)


def show(report: dict[str, Any]) -> None:
    """Print the tables in the terminal."""
    out = Console(width=None if sys.stdout.isatty() else 110)
    out.print(described(report["machine"]))
    for name, part in PARTS.items():
        out.print(f"[bold]{part.title}[/bold]")
        table = Table(box=None, pad_edge=False)
        heads, *rows = cells_of(name, report) or [["not measured"]]
        for i, head in enumerate(heads):
            table.add_column(head, justify="right" if i and rows else "left")
        for row in rows:
            table.add_row(*row)
        out.print(table, *notes_of(name, report), "", sep="\n")
    if made := constants_of(report):
        out.print(f"planner: {made['hours']}, error {made['measured']['hours_error']:.0%}")


def described(machine: dict[str, Any] | None) -> str:
    if machine is None:
        return "not measured"
    versions = ", ".join(f"{name} {found or 'not installed'}" for name, found in machine["versions"].items())
    return f"{machine['device']}; {versions}"


def fill(text: str, report: dict[str, Any]) -> str:
    """``text`` with each part's table between its markers. Exits if a marker is missing."""
    for name in PARTS:
        begin, end = (mark.format(name=name) for mark in _MARKS)
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            sys.exit(f"{begin} ... {end}: needed once in the text")
        made = f"{begin}\n\n{markdown(name, report)}\n\n{end}"
        text = pattern.sub(lambda _, made=made: made, text)
    return text


def markdown(name: str, report: dict[str, Any]) -> str:
    cells = cells_of(name, report)
    if not cells:
        return f"Not measured yet: `python benchmarks/gpu.py --parts {name}`."
    heads, *rows = cells
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    rest = "" if report["parts"][name]["complete"] else f" Incomplete: `python benchmarks/gpu.py --parts {name}` goes on."
    notes = "".join(f"\n\n{note}" for note in notes_of(name, report))
    return f"{table}{notes}\n\n{described(report['machine'])}.{rest}"


# Tables: a row of headings, then the rows.


def cells_of(name: str, report: dict[str, Any]) -> Cells:
    """The table of a part; empty if it was not measured."""
    rows = report["parts"].get(name, {}).get("rows", [])
    if not rows:
        return []
    columns = _COLUMNS[name]
    heads = [*rows[0]["of"], *columns]
    cells: Cells = []
    for row in rows:
        first = [str(value) for value in row["of"].values()]
        if "failed" in row:
            cells.append([*first, row["failed"], *[""] * (len(columns) - 1)])
        else:
            cells.append([*first, *(column(row, report) for column in columns.values())])
    return [heads, *cells]


def notes_of(name: str, report: dict[str, Any]) -> list[str]:
    """Measurements that fell back to a slower path, and why."""
    rows = report["parts"].get(name, {}).get("rows", [])
    return [f"{', '.join(map(str, row['of'].values()))}: {said}" for row in rows for said in row.get("slower", [])]


def _figure(key: str, form: str, times: float = 1.0) -> Callable[[dict[str, Any], dict[str, Any]], str]:
    """A column of figures; empty if a row lacks the figure."""
    return lambda row, report: "" if row.get(key) is None else format(row[key] * times, form)


def _plain(key: str) -> Callable[[dict[str, Any], dict[str, Any]], str]:
    return lambda row, report: str(row.get(key, ""))


def _of_ceiling(row: dict[str, Any], report: dict[str, Any]) -> str:
    """Operations/s as a share of those of large products on the same GPU."""
    found = _ceilings(report)
    return f"{row['flops'] / row['seconds'] / found['tflops_bfloat16'] / 1e12:.0%}" if found else ""


def _of_copy(row: dict[str, Any], report: dict[str, Any]) -> str:
    """Bytes/s that a step has to read, as a share of those of a large copy."""
    found = _ceilings(report)
    return f"{row['bytes'] / row['ms'] / found['copy_gb_s'] / 1e6:.0%}" if found else ""


def _ceilings(report: dict[str, Any]) -> dict[str, Any] | None:
    rows = report["parts"].get("ceilings", {}).get("rows", [])
    return next((row for row in rows if "failed" not in row), None)


_UPDATE = {
    "s": _figure("seconds", ".2f"), "tokens/s": _figure("tokens_s", ",.0f"), "of the ceiling": _of_ceiling,
    "head's share": _figure("head_share", ".0%"), "GiB beside weights and optimizer": _figure("mib", ".1f", 1 / 1024),
    "loss": _figure("loss", ".5f"), "norm": _figure("norm", ".4f"), "tokens a pass": _figure("pass_tokens", ",.0f"),
}  # fmt: skip
_COLUMNS: dict[str, dict[str, Callable[[dict[str, Any], dict[str, Any]], str]]] = {
    "ceilings": {
        "bfloat16, TFLOP/s": _figure("tflops_bfloat16", ",.1f"), "float32, TFLOP/s": _figure("tflops_float32", ",.1f"),
        "copy, GB/s": _figure("copy_gb_s", ",.0f"),
    },
    "tests": {
        "passed": _plain("passed"), "failed": _plain("broken"), "errors": _plain("errors"), "skipped": _plain("skipped"),
    },
    "divergence": {
        "ms": _figure("seconds", ",.1f", 1000), "peak MiB": _figure("peak_mib", ",.0f"), "loss": _figure("loss", ".6f"),
        "gradient's norm": _figure("gradient_norm", ".6f"),
    },
    "decoding": {
        "ms a step": _figure("ms", ",.2f"), "tokens/s": _figure("tokens_s", ",.0f"), "of a copy's bytes/s": _of_copy,
        "peak GiB": _figure("gib", ".1f"),
    },
    "rollouts": {
        "sampled": _plain("tokens"), "tokens/s": _figure("tokens_s", ",.0f"), "peak GiB": _figure("gib", ".1f"),
    },
    "updates": _UPDATE,
    "coldstart": _UPDATE,
    "plan": {
        "MiB measured": _figure("MiB measured", ",.0f"), "computed": _figure("computed", ",.0f"),
        "ratio": _figure("ratio", ".2f"), "s measured": _figure("s", ".3f"), "s computed": _figure("s computed", ".3f"),
        "s ratio": _figure("s ratio", ".2f"),
    },
}  # fmt: skip


# The planner's constants.


def constants_of(report: dict[str, Any]) -> dict[str, Any] | None:
    """The constants for the planner's ``--constants``; ``None`` if not measured, or for a GPU without a data sheet."""
    machine, known = report["machine"], load_constants()
    gpu = known.gpus.get((machine or {}).get("gpu") or "")
    updates, steps, plans = (_good(report, name) for name in ("updates", "decoding", "plan"))
    updates = [row for row in updates if row["of"]["contestant"] == "ours"]
    if gpu is None or not updates or len(steps) < 2:
        return None
    training = median(_share(row, gpu) for row in updates)
    scoring = [row["scoring"] for row in plans]
    forward = median(scoring) if scoring else known.hours["forward"]
    bandwidth, layer_ms = _decoding(steps, gpu)
    errors = [abs(_share(row, gpu) / training - 1) for row in updates]
    errors += [abs(_step_ms(row, gpu, bandwidth, layer_ms) / row["ms"] - 1) for row in steps]
    hours = {"training": training, "forward": forward, "bandwidth": bandwidth, "layer_ms_torch": layer_ms}
    measured = {"device": machine["device"], "origin": f"benchmarks/gpu.py; {described(machine)}", "hours_error": max(errors)}
    if plans:
        measured["memory_error"] = max(abs(row["ratio"] - 1) for row in plans)
    return {"hours": {key: float(f"{value:.3g}") for key, value in hours.items()}, "measured": measured}


def _good(report: dict[str, Any], name: str) -> Rows:
    return [row for row in report["parts"].get(name, {}).get("rows", []) if "failed" not in row]


def _share(row: dict[str, Any], gpu: Gpu) -> float:
    return row["flops"] / row["seconds"] / gpu.tflops / 1e12


def _decoding(steps: Sequence[dict[str, Any]], gpu: Gpu) -> tuple[float, float]:
    """Share of the bandwidth, and milliseconds per layer: least squares fit of the steps' relative errors."""
    by_memory = [row["bytes"] / gpu.gb_per_second / 1e6 / row["ms"] for row in steps]
    by_layers = [row["layers"] / row["ms"] for row in steps]
    (slowness, layer_ms), *_ = np.linalg.lstsq(np.array([by_memory, by_layers]).T, np.ones(len(steps)), rcond=None)
    if slowness <= 0:  # only short rows: launches dominate their time
        return 1.0, 1 / median(by_layers)
    return 1 / slowness, max(1e-4, layer_ms)


def _step_ms(row: dict[str, Any], gpu: Gpu, bandwidth: float, layer_ms: float) -> float:
    return row["bytes"] / gpu.gb_per_second / 1e6 / bandwidth + row["layers"] * layer_ms


if __name__ == "__main__":
    main()
