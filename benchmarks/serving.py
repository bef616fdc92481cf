"""The overhead of serving over evaluating: the same questions to `search-e1 serve` by OpenAI's client, and to `evaluate`.

    python benchmarks/serving.py --json serving.json

Both answer questions of the small world greedily with the package's policy, in separate processes with the same number of
threads, one after the other, ``--repeats`` times. All questions are sent at once. On a busy machine, the ratio of CPU seconds
is more reliable than that of seconds.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

WARM_UP = 8
"""Questions asked before the clock starts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--evaluate", type=Path, help=argparse.SUPPRESS)  # run as the other side
    arguments = parser.parse_args()
    if arguments.evaluate:
        print(json.dumps(evaluated(arguments.evaluate)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        make(directory, arguments.questions)
        load = os.getloadavg()[0]
        rows = []
        for _ in range(arguments.repeats):
            rows.append(row(by_evaluate(directory), by_serve(directory)))
            print(f"ratio {rows[-1]['ratio']:.2f}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    out = Console(width=None if sys.stdout.isatty() else 128)
    out.print(
        f"{platform.machine()}, {os.cpu_count()} cores, load before {load:.1f}; {arguments.questions} questions at once; torch "
        f"{version('torch')}, fastapi {version('fastapi')}, openai {version('openai')}; {arguments.repeats} runs"
    )
    out.print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def make(directory: Path, questions: int) -> None:
    """Write a bundle to ``directory / "agent"``, and ``questions.json`` beside it."""
    from search_e1.agent.bundle import Bundle
    from search_e1.config import PolicyConfig, load
    from search_e1.data.corpus import Corpus
    from search_e1.data.questions import load_questions
    from search_e1.data.world import make_world, write
    from search_e1.retrieval.bm25 import Bm25Index
    from search_e1.training import policy as policies

    write(make_world(), directory / "world", train=1, dev=1, test=questions + WARM_UP)
    asked = load_questions(directory / "world" / "test.jsonl", "world")
    (directory / "questions.json").write_text(json.dumps([q.model_dump() for q in asked]))
    bundle = directory / "agent"
    policies.load("small", PolicyConfig(model="small", dtype="float32", device="cpu")).save(bundle)
    index = Bm25Index.build(list(Corpus(directory / "world" / "corpus.jsonl")), bundle / "index")
    limits = load(Path(__file__).parent.parent / "configs" / "quickstart.toml", []).rollout
    weights = {file.name: file.stat().st_size for file in bundle.glob("*.safetensors")}
    Bundle(
        name="small", dtype="float32", limits=limits, policy="", weights=weights, index=("index",), checksum=index.checksum,
        made_by=version("search-e1"), trained={},
    ).write(bundle)  # fmt: skip


def evaluated(directory: Path) -> dict[str, Any]:
    """``evaluate``, in this process: seconds of its rollouts, answers, peak memory."""
    from search_e1.agent.bundle import Bundle, open_retriever
    from search_e1.config import EvaluationConfig, PolicyConfig
    from search_e1.evaluation import evaluate as evaluation
    from search_e1.rollout.engines.torch import TorchEngine
    from search_e1.training import policy as policies
    from search_e1.types import Question

    bundle = Bundle.read(directory / "agent")
    policy = policies.load(bundle.directory, PolicyConfig(model=str(bundle.directory), dtype=bundle.dtype, device="cpu"))
    engine = TorchEngine(policy.model, policy.tokenizer, batch_size=bundle.limits.batch_size)
    retriever = open_retriever(bundle)
    questions = [Question.model_validate(q) for q in json.loads((directory / "questions.json").read_text())]
    config = EvaluationConfig(samples=0, latency=0, recall=False)
    with tempfile.TemporaryDirectory() as scratch:
        for name, asked in (("warm", questions[:WARM_UP]), ("world", questions[WARM_UP:])):
            out = Path(scratch) / name
            out.mkdir()
            cpu = time.process_time()
            evaluation.evaluate(engine, retriever, {name: asked}, policy.prompts, config, bundle.limits, seed=0, out=out)
        cpu = time.process_time() - cpu
        timings = json.loads((out / evaluation.TIMINGS).read_text())["world"]
        groups = [json.loads(line) for line in (out / evaluation.TRAJECTORIES).read_text().splitlines()]
    answers = [group["trajectories"][0]["answer"] for group in groups]
    seconds = timings["seconds_a_question"] * len(answers)
    return {"seconds": seconds, "cpu": cpu, "answers": answers, "peak_mib": peak(os.getpid())}


def by_evaluate(directory: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--evaluate", str(directory)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def by_serve(directory: Path) -> dict[str, Any]:
    """``serve``: seconds of all questions at once, answers, seconds of each, peak memory of the server."""
    texts = [question["text"] for question in json.loads((directory / "questions.json").read_text())]
    with served(directory / "agent") as (url, pid):
        asyncio.run(ask(url, texts[:WARM_UP]))
        begun, cpu = time.perf_counter(), cpu_seconds(pid)
        told = asyncio.run(ask(url, texts[WARM_UP:]))
        seconds = time.perf_counter() - begun
        cpu, memory = cpu_seconds(pid) - cpu, peak(pid)
    answers, latencies = zip(*told, strict=True)
    return {"seconds": seconds, "cpu": cpu, "answers": list(answers), "latencies": list(latencies), "peak_mib": memory}


@contextmanager
def served(bundle: Path) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-m", "search_e1.cli", "serve", str(bundle), "--port", "0", "--device", "cpu"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert running.stdout
    try:
        yield running.stdout.readline().split()[3].removesuffix(","), running.pid
    finally:
        running.terminate()
        running.communicate(timeout=60)


async def ask(url: str, texts: Sequence[str]) -> list[tuple[str | None, float]]:
    """Answer and seconds of each question."""
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:

        async def one(text: str) -> tuple[str | None, float]:
            begun = time.perf_counter()
            found = await client.chat.completions.create(model="small", messages=[{"role": "user", "content": text}])
            own: Any = found.choices[0].message.model_extra
            return own["search_e1"]["answer"], time.perf_counter() - begun

        return await asyncio.gather(*map(one, texts))


def cpu_seconds(pid: int) -> float:
    used = psutil.Process(pid).cpu_times()
    return used.user + used.system


def peak(pid: int) -> float:
    """Peak memory of a process, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def row(evaluate: dict[str, Any], serve: dict[str, Any]) -> dict[str, Any]:
    number = len(evaluate["answers"])
    p50, p95 = (quantiles(serve["latencies"], n=20, method="inclusive")[i] for i in (9, 18))
    return {
        "questions": number,
        "answered": len(serve["answers"]),
        "same": sum(a == b for a, b in zip(evaluate["answers"], serve["answers"], strict=True)),
        "evaluate_a_second": number / evaluate["seconds"],
        "serve_a_second": number / serve["seconds"],
        "ratio": evaluate["seconds"] / serve["seconds"],
        "cpu_ratio": evaluate["cpu"] / serve["cpu"],
        "p50_seconds": p50,
        "p95_seconds": p95,
        "evaluate_peak_mib": evaluate["peak_mib"],
        "serve_peak_mib": serve["peak_mib"],
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(
        "run",
        "answered",
        "as evaluate",
        "evaluate/s",
        "serve/s",
        "ratio",
        "of CPU s",
        "p50 s",
        "p95 s",
        "MiB, evaluate",
        "serve",
    )
    for number, one in enumerate(rows, 1):
        shown.add_row(*_cells(str(number), one))
    shown.add_row(*_cells("median", {name: median(one[name] for one in rows) for name in rows[0]}))
    return shown


def _cells(name: str, one: dict[str, Any]) -> list[str]:
    rates = (f"{one[key]:.1f}" for key in ("evaluate_a_second", "serve_a_second"))
    seconds = (f"{one[key]:.2f}" for key in ("ratio", "cpu_ratio", "p50_seconds", "p95_seconds"))
    memory = (f"{one[key]:.0f}" for key in ("evaluate_peak_mib", "serve_peak_mib"))
    return [name, f"{one['answered']:.0f}", f"{one['same']:.0f}", *rates, *seconds, *memory]


if __name__ == "__main__":
    main()
