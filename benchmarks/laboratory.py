"""Experiments in the small world: GRPO to its plateau, then self-distillation, its variants and rivals, as Markdown tables.

    python benchmarks/laboratory.py

Makes the world and runs the sweeps of configs/sweeps one after another; finished runs are not run again. Takes hours on two
cores.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from statistics import fmean

from search_e1.config import LeadConfig
from search_e1.evaluation.compare import Figure
from search_e1.evolve import SUMMARY, Summary
from search_e1.lab.sweep import comparison, results, running, spec
from search_e1.selfdistill.lead import refused

CONFIG = Path("configs/quickstart.toml")
WORLD = Path("runs/laboratory-world")
DEAF = Path("runs/deaf-policies")
SWEEPS = {
    "plateau": "GRPO alone, on development questions",
    "laboratory": "From the plateau, on test questions",
    "ablations": "One thing changed in self-distillation, on test questions, before the GRPO that follows it",
    "rounds": "Several rounds from the plateau, on test questions",
    "alternatives": "What may be added to GRPO instead, on test questions",
    "lead": "The teacher along GRPO, on development questions",
    "deaf": "Policies that ignore their prompt, on test questions",
}
"""Sweep -> heading."""
METRICS = (("em", "EM", 3), ("em_sampled", "sampled EM", 3), ("searches", "searches", 2), ("tokens", "tokens", 1))
ALL_STAGES = {"plateau", "laboratory", "rounds", "deaf"}
"""Sweeps that show every policy, not only the last."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="default: all")
    parser.add_argument("--report", action="store_true", help="run nothing; print what is finished")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments = parser.parse_args()
    if not arguments.report:
        make_world()
    tables = {}
    for name in arguments.sweeps:
        if name == "deaf" and not arguments.report:
            make_deaf()
        file = Path(f"configs/sweeps/{name}.toml")
        if not arguments.report and (status := search_e1("sweep", str(file), "--config", str(CONFIG))):
            sys.exit(status)
        finished = finished_runs(spec.read(file, CONFIG, Path("runs") / name))
        tables[name] = lead_table(finished) if name == "lead" else table(finished, every_stage=name in ALL_STAGES)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}, transformers {version('transformers')}")
    for name, rows in tables.items():
        print(f"\n### {SWEEPS[name]}\n")
        print("\n".join(markdown(rows)))
    if arguments.json:
        arguments.json.write_text(json.dumps(tables, indent=2) + "\n")


def search_e1(*arguments: str) -> int:
    """Run `search-e1` with ``arguments``; its exit status."""
    command = "from search_e1.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", command, *arguments]).returncode


def make_world() -> None:
    """Write what is missing: questions, the easiest and the hardest training questions alone, and demonstrations."""
    if not (WORLD / "train.jsonl").exists() and (
        status := search_e1("world", str(WORLD), "--train", "2000", "--dev", "400", "--test", "400")
    ):
        sys.exit(status)
    lines = (WORLD / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, hops in (("easy", 1), ("hard", 4)):
        if not (path := WORLD / f"train-{name}.jsonl").exists():
            kept = [line for line in lines if json.loads(line)["metadata"]["hops"] == hops]
            path.write_text("".join(kept), encoding="utf-8")
    if not (WORLD / "demonstrations.jsonl").exists():
        subprocess.run([sys.executable, "scripts/world_demonstrations.py", str(WORLD)], check=True)


def make_deaf() -> None:
    """Make the ablations' starting policies deaf to references."""
    for run in sorted(Path("runs/ablations/runs/ofsd").glob("*")):
        if not (out := DEAF / run.name).exists():
            subprocess.run([sys.executable, "benchmarks/deafen.py", str(run), str(out)], check=True)


def finished_runs(sweep: spec.Sweep) -> spec.Sweep:
    """The sweep with only its finished runs."""
    if not (done := [run for run in sweep.runs if running.is_finished(run)]):
        sys.exit(f"{sweep.directory}: no run is finished; run this without --report")
    return replace(sweep, runs=tuple(done))


def table(sweep: spec.Sweep, *, every_stage: bool) -> list[dict[str, str]]:
    """One row per variant's last policy, or per policy: metrics, differences with 95% intervals, costs."""
    found = [result for run in sweep.runs for result in results.read_results(run)]
    compared = comparison.compare_variants(found, sweep.reference)
    passed = passed_gate(sweep, every_stage=every_stage)
    rows = []
    for row in compared.rows:
        if row.benchmark != results.ALL or (row.stage == comparison.LAST) is every_stage:
            continue
        cells = {"variant": row.variant, **({"policy": row.stage} if every_stage else {}), "seeds": str(len(row.seeds))}
        for name, heading, places in METRICS:
            cells[heading] = cell(row.metrics[name], row.differences.get(name), places)
        cells["lead"] = "" if row.lead is None else f"{row.lead:+.3f}"
        if passed:
            cells["teachers past the gate"] = passed.get((row.variant, row.stage), "")
        cells["CPU s"] = f"{row.cost['cpu_seconds']:.0f}"
        rows.append(cells)
    return rows


def passed_gate(sweep: spec.Sweep, *, every_stage: bool) -> dict[tuple[str, str], str]:
    """Variant and policy -> number of measured teachers that pass the gate at its defaults.

    With ``every_stage``, each distilled policy has its own teachers; otherwise the last policy has all of the variant's.
    """
    passed: dict[tuple[str, str], list[bool]] = {}
    for run in sweep.runs:
        for number, round in summary(run).rounds.items():
            if round.lead:
                stage = f"ofsd-{number}" if every_stage else comparison.LAST
                passed.setdefault((run.variant, stage), []).append(not refused(round.lead, LeadConfig()))
    return {policy: f"{sum(teachers)} of {len(teachers)}" for policy, teachers in passed.items()}


def summary(run: spec.Run) -> Summary:
    return Summary.model_validate_json((run.config.run / SUMMARY).read_text("utf-8"))


def lead_table(sweep: spec.Sweep) -> list[dict[str, str]]:
    """One row per variant and policy: EM, and the gain from a reference in the prompt, as means and by seed."""
    rows = []
    for variant, of_variant in groupby(sweep.runs, key=lambda run: run.variant):
        summaries = [summary(run) for run in of_variant]
        for round in summaries[0].rounds:
            policies = [next(p for p in one.policies if p.stage == f"grpo-{round}") for one in summaries]
            measured = [lead for one in summaries if (lead := one.rounds[round].lead)]
            with_it, without = (
                fmean(getattr(one, f"tokens_{prompt}") for one in measured) for prompt in ("privileged", "plain")
            )
            by_seed = ", ".join(f"{one.lead:+.3f}" for one in measured)
            rows.append({
                "variant": variant, "policy": f"grpo-{round}", "seeds": str(len(measured)),
                "EM": f"{fmean(one.em for one in policies):.3f}",
                "sampled EM": f"{fmean(one.em_sampled for one in policies):.3f}",
                "tokens": f"{fmean(one.tokens for one in policies):.1f}",
                "lead in EM (by seed)": f"{fmean(one.lead for one in measured):+.3f} ({by_seed})",
                "tokens with a reference, without, saved": f"{with_it:.1f}, {without:.1f}, {1 - with_it / without:.0%}",
            })  # fmt: skip
    return rows


def cell(figure: Figure, difference: Figure | None, places: int) -> str:
    """``0.912 (+0.010, -0.003 to +0.021)``."""
    if difference is None:
        return f"{figure.mean:.{places}f}"
    low, high = difference.interval
    return f"{figure.mean:.{places}f} ({difference.mean:+.{places}f}, {low:+.{places}f} to {high:+.{places}f})"


def markdown(rows: list[dict[str, str]]) -> list[str]:
    head = list(rows[0])
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *(row.values() for row in rows))]


if __name__ == "__main__":
    main()
