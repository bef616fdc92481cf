"""Measurements of `gpu.py` that have no script of their own: the machine, its ceilings, decoding, and the CUDA tests.

    python benchmarks/gpu_measure.py ceilings --device cuda
    python benchmarks/gpu_measure.py decoding --shape qwen2.5-3b --rows 320 --positions 1500 --device cuda --dtype bfloat16

Prints one JSON object. Decoding is measured in the engine's own session: the clock starts once all rows have joined and the
first steps are over.
"""

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from contest import installed  # beside this file

if TYPE_CHECKING:
    from search_e1.lab.plan.constants import Gpu

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "triton", "trl", "liger-kernel")
_GROUP = 5  # rows of one prompt
TESTS = Path(__file__).parent.parent / "tests"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["machine", "ceilings", "decoding", "tests"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--size", type=int, default=8192, help="size of matrices; copies have four times the elements")
    parser.add_argument("--shape", default="qwen2.5-3b")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--positions", type=int, default=1000, help="tokens per row when the clock starts")
    parser.add_argument("--tokens", type=int, default=64, help="tokens sampled per row while the clock runs")
    arguments = parser.parse_args()
    print(json.dumps(globals()[arguments.what](arguments)))


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """The device, the planner's name for it if there is one, and versions."""
    versions = {name: installed(name) for name in _PACKAGES} | {"python": platform.python_version()}
    if arguments.device == "cpu":
        device = {"device": f"{os.cpu_count()} cores {platform.machine()}", "gpu": None}
    else:
        properties = torch.cuda.get_device_properties(0)
        known = sheet_of(properties.name, properties.total_memory / 2**30)
        device = {
            "device": properties.name,
            "gpu": known and known.name,
            "gib": properties.total_memory / 2**30,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return {**device, "versions": versions}


def sheet_of(name: str, memory_gib: float) -> "Gpu | None":
    """The planner's data sheet for a GPU's driver name; if a model has several, the one closest in memory."""
    from search_e1.lab.plan.constants import load_constants

    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    known = [gpu for gpu in load_constants().gpus.values() if gpu.name.split("-")[0] in words]
    known = [gpu for gpu in known if ("pcie" in gpu.name) == ("pcie" in words)] or known
    return min(known, key=lambda gpu: abs(gpu.memory_gib - memory_gib), default=None)


def ceilings(arguments: argparse.Namespace) -> dict[str, float]:
    """Matrix products in 10^12 operations/s, and a copy in 10^9 bytes/s (read plus written); best of ten."""
    size, found = arguments.size, {}
    for name in ("bfloat16", "float32"):
        left, right = (torch.randn(size, size, device=arguments.device, dtype=getattr(torch, name)) for _ in range(2))
        out = torch.empty_like(left)
        found[f"tflops_{name}"] = 2 * size**3 / _best(arguments, lambda a=left, b=right, c=out: torch.mm(a, b, out=c)) / 1e12
    source = torch.empty(4 * size * size, device=arguments.device, dtype=torch.float32)
    target = torch.empty_like(source)
    seconds = _best(arguments, lambda: target.copy_(source))
    return {**found, "copy_gb_s": 2 * source.nbytes / seconds / 1e9}


def _best(arguments: argparse.Namespace, work: Any) -> float:
    """Seconds of one call of ``work``: best of ten batches, of ten calls each on a GPU to hide launch latency."""
    seconds = []
    repeats = 10 if arguments.device != "cpu" else 1
    for _ in range(10):
        begun = _now(arguments)
        for _ in range(repeats):
            work()
        seconds.append((_now(arguments) - begun) / repeats)
    return min(seconds)


def _now(arguments: argparse.Namespace) -> float:
    if arguments.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def decoding(arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a decoding step (one token per row), and bytes that a step has to read: weights, keys and values."""
    from search_e1.config import PolicyConfig
    from search_e1.lab.plan.shapes import shape_of
    from search_e1.rollout.engines.base import Request
    from search_e1.rollout.engines.torch import TorchEngine
    from search_e1.training import policy as policies
    from shapes import random_model

    dtype = getattr(torch, arguments.dtype)
    model = random_model(arguments.shape, arguments.device, dtype).eval()
    tokenizer = policies.load_reader("small", PolicyConfig(model="small")).tokenizer
    draw, rows = random.Random(0), arguments.rows
    most = min(model.config.vocab_size, len(tokenizer)) - 10
    prompts = [tuple(draw.randrange(most) for _ in range(arguments.positions)) for _ in range(-(-rows // _GROUP))]
    engine, room = TorchEngine(model, tokenizer, batch_size=rows), 3 * arguments.tokens
    with engine.session(temperature=1.0, stop=(), max_tokens=arguments.positions + room) as session:
        ended: list[int] = []  # lengths of rows that drew an end token

        def step() -> None:
            ended.extend(len(generation.ids) for _, generation in session.step())
            if len(ended) > rows // 10 + 1:
                raise SystemExit("rows came to their end before all had joined: their cache does not fit side by side")

        def sampled() -> int:
            return sum(ended) + sum(len(generation.ids) for generation in session.begun().values())

        for key in range(rows):
            session.submit(Request(key=key, prompt=prompts[key // _GROUP], max_new_tokens=room, seed=key))
        while len(session.begun()) + len(ended) < rows:
            step()
        for _ in range(2):
            step()
        rates, begun = [], sampled()  # the median excludes steps that recorded a graph or ended a row
        while sampled() - begun < arguments.tokens * (rows - len(ended)):
            before, clock = sampled(), _now(arguments)
            step()
            seconds = _now(arguments) - clock
            rates.append((sampled() - before) / seconds)
        held = session.rows if hasattr(session, "rows") else rows
    shape = shape_of(model.config)
    read = dtype.itemsize * (shape.active + shape.head + rows * arguments.positions * shape.cached)
    gib = torch.cuda.max_memory_allocated() / 2**30 if arguments.device != "cpu" else None
    return {
        "ms": 1000 * rows / median(rates), "tokens_s": median(rates), "bytes": read, "layers": shape.layers,
        "rows_held": held, "gib": gib,
    }  # fmt: skip


def tests(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run `pytest -m gpu` over the files that have such tests."""
    files = [str(path) for path in sorted(TESTS.glob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, check=False)
    if "No module named pytest" in done.stderr:
        return {"failed": "pytest is not installed"}
    if done.returncode > 1:  # not failed tests: no test ran
        return {"failed": f"pytest: {((done.stderr or done.stdout).strip() or f'status {done.returncode}').splitlines()[-1]}"}
    dots = re.findall(r"^([.sFE]+)\s+\[", done.stdout, re.MULTILINE)  # the project's `-q` plus this one leave no summary
    by_letter = {"passed": ".", "skipped": "s", "broken": "F", "errors": "E"}
    counts = {word: sum(line.count(letter) for line in dots) for word, letter in by_letter.items()}
    names = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return {**counts, "status": done.returncode, "names": names}


if __name__ == "__main__":
    main()
