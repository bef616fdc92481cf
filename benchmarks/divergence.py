"""The fused forward KL compared with a naive one, TRL's and Liger's: peak memory and time of loss and gradient.

    python benchmarks/divergence.py --repeats 5 --json divergence.json
    python benchmarks/divergence.py --device cuda --dtype bfloat16 --positions 8192 --width 2048

Every measurement runs in a separate process on the same tensors, and the candidates alternate, so that neither leftovers nor a
busy machine favor one. Memory is what the process needs beyond its inputs: on a CPU the rise of its peak resident size (VmHWM,
reset before), on a GPU of the allocator's peak. If only a share of the positions is sampled, each candidate masks the others as
its library does, unless positions are selected beforehand.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; the command line does the same

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from contest import measured, versions  # beside this file

CASES = {  # share of sampled positions, and whether they are selected before the loss
    "all positions": (1.0, False),
    "30% sampled": (0.3, False),
    "30% sampled, selected before": (0.3, True),
}
# Targets: at most this share of the other's peak memory and time.
ASKED = {"naive": (1 / 40, 0.8), "TRL": (1 / 10, 0.75), "Liger": (1 / 4, 1.0)}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # student [N, H], teacher [N, H], head [V, H], mask [N]


def ours(student: Tensor, teacher: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    from search_e1.training.divergence import fused_divergence
    from search_e1.training.head import Head

    return fused_divergence(student[mask], teacher[mask], Head(weight), tau=10.0)[0]


def naive(student: Tensor, teacher: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    s = torch.log_softmax((student @ weight.T).float(), -1)
    with torch.no_grad():
        t = torch.log_softmax((teacher @ weight.T).float(), -1)
    terms = torch.nn.functional.kl_div(s, t, log_target=True, reduction="none").clamp(max=10.0)
    return terms.sum(-1)[mask].mean()


def trl(student: Tensor, teacher: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    return _chunked_divergence_loss(student[None], teacher[None], weight, weight.detach(), mask[None], beta=0.0)[0]


def liger(**options: Any) -> Callable[..., Tensor]:
    def function(student: Tensor, teacher: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, **options)
        return loss(student, weight, teacher, weight.detach(), torch.where(mask, 0, -100))

    return function


CANDIDATES: dict[str, Callable[..., Tensor]] = {
    "ours": ours,
    "naive": naive,
    "TRL": trl,
    "Liger": liger(chunk_size=64, compiled=False),  # least memory: smaller chunks make no difference
    "Liger, default": liger(),
}


def main() -> None:
    arguments = parse()
    if arguments.child:
        print(json.dumps(measure(arguments, *arguments.child)))
        return
    rows = run(arguments)
    out = Console(width=None if sys.stdout.isatty() else 100)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{os.cpu_count()} cores {platform.machine()}"
    out.print(
        f"{device}, {arguments.threads} thread(s); {versions('torch', 'trl', 'liger-kernel')}; "
        f"{arguments.positions} positions, vocabulary {arguments.vocabulary}, width "
        f"{arguments.width}, {arguments.dtype}, {'trained' if arguments.trained_head else 'frozen'} head; "
        f"{arguments.repeats} repeats in turn"
    )
    for case in dict.fromkeys(row["case"] for row in rows):
        out.print(table(case, [row for row in rows if row["case"] == case]))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=256, help="hidden size")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trained-head", action="store_true", help="the head's weight also gets a gradient")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--child", nargs=2, metavar=("CANDIDATE", "CASE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> list[dict]:
    """One row per case and candidate."""
    found: dict[tuple[str, str], list[dict]] = {}
    for repeat in range(arguments.repeats):
        for case, name in product(arguments.cases, arguments.candidates):
            one = measured([sys.executable, __file__, *sys.argv[1:], "--child", name, case])
            found.setdefault((case, name), []).append(one)
            figures = one.get("failed") or f"{one['peak_mib']:,.0f} MiB, {one['seconds']:.2f} s"
            print(f"repeat {repeat + 1} of {arguments.repeats}: {case}, {name}: {figures}", file=sys.stderr)
    return [{"case": case, "candidate": name, **summary(ones)} for (case, name), ones in found.items()]


def summary(ones: list[dict]) -> dict[str, Any]:
    """Figures over the repeats of one candidate."""
    if failed := next((one["failed"] for one in ones if "failed" in one), None):
        return {"failed": failed}
    return {
        "peak_mib": max(one["peak_mib"] for one in ones),
        "seconds_min": min(one["seconds"] for one in ones),
        "seconds_median": median(one["seconds"] for one in ones),
        "wall_min": min(one["wall"] for one in ones),
        "loss": ones[0]["loss"],
        "gradient_norm": ones[0]["gradient_norm"],
        "repeats": len(ones),
    }


def table(case: str, rows: list[dict]) -> Table:
    good = [row for row in rows if "failed" not in row]
    own = next((row for row in good if row["candidate"] == "ours"), None)
    norms, losses = ([row[key] for row in good] or [math.nan] for key in ("gradient_norm", "loss"))
    made = Table(
        title=case,
        caption=f"memory, time: what ours takes of the other's (at most, as asked)\nlosses {min(losses):.6f} to "
        f"{max(losses):.6f}, norms of gradients within {max(norms) / min(norms) - 1:.0e}",
    )
    for heading in ("", "peak MiB", "s, min", "s, median", "memory", "time"):
        made.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in rows:
        if "failed" in row:
            made.add_row(row["candidate"], row["failed"])
            continue
        cells = ["", ""]
        if own and own is not row:
            memory, seconds = own["peak_mib"] / row["peak_mib"], own["seconds_min"] / row["seconds_min"]
            cells = [f"1/{1 / memory:.1f}", f"{seconds:.2f}"]
            if asked := ASKED.get(row["candidate"]):
                cells = [f"{cells[0]} (1/{1 / asked[0]:.0f})", f"{cells[1]} ({asked[1]:.2f})"]
        figures = (f"{row['peak_mib']:,.0f}", f"{row['seconds_min']:.2f}", f"{row['seconds_median']:.2f}")
        made.add_row(row["candidate"], *figures, *cells)
    return made


def measure(arguments: argparse.Namespace, name: str, case: str) -> dict[str, float]:
    """Run one measurement in this process. ``seconds``: CPU time on a CPU, else wall-clock time."""
    torch.set_num_threads(arguments.threads)
    share, selected = CASES[case]
    tensors = inputs(arguments, share, selected)
    function = CANDIDATES[name]
    on_gpu = arguments.device == "cuda"
    # Warm-up: loads and compiles everything, with the measured shapes if compilation depends on them.
    whole = on_gpu or "default" in name
    step(function, tensors if whole else tuple(t[:8] if t.shape[0] == len(tensors[0]) else t for t in tensors))
    begin_memory = reset_peak(on_gpu)
    begin_cpu, begin_wall = time.process_time(), time.perf_counter()
    loss, norm = step(function, tensors)
    wall, cpu = time.perf_counter() - begin_wall, time.process_time() - begin_cpu
    return {
        "peak_mib": peak(on_gpu) - begin_memory,
        "seconds": wall if on_gpu else cpu,
        "wall": wall,
        "loss": loss,
        "gradient_norm": norm,
    }


def inputs(arguments: argparse.Namespace, share: float, selected: bool) -> Inputs:
    """Inputs, the same for all candidates. The teacher is the student plus noise, as before a distillation's first step."""
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.positions, arguments.width)
    student = torch.randn(shape, generator=generator)
    teacher = student + 0.3 * torch.randn(shape, generator=generator)
    weight = torch.randn(arguments.vocabulary, arguments.width, generator=generator) * 2.4 / arguments.width**0.5
    mask = torch.rand(arguments.positions, generator=generator) < share
    if selected:
        student, teacher, mask = student[mask], teacher[mask], mask[mask]
    place = dict(device=arguments.device, dtype=getattr(torch, arguments.dtype))
    student, teacher, weight = (t.to(**place) for t in (student, teacher, weight))
    return student.requires_grad_(), teacher, weight.requires_grad_(arguments.trained_head), mask.to(arguments.device)


def step(function: Callable[..., Tensor], tensors: Inputs) -> tuple[float, float]:
    """The loss, and the norm of its gradient with respect to the student's hidden states; leaves no gradient."""
    student, teacher, weight, mask = tensors
    leaf = student.detach().requires_grad_()
    loss = function(leaf, teacher, weight, mask)
    loss.backward()
    assert leaf.grad is not None
    norm = leaf.grad.float().norm().item()  # waits for a GPU
    weight.grad = None
    return loss.item(), norm


def reset_peak(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else freed memory that is still held would not count as new
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak(on_gpu: bool) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if on_gpu else status("VmHWM")


def status(key: str) -> float:
    """A size of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) / 1024


if __name__ == "__main__":
    main()
