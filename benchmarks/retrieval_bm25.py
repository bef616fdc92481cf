"""BM25 compared with bm25s itself: building, opening, memory and speed, at the corpus's size and above.

    python benchmarks/retrieval_bm25.py --corpus wiki_multi.jsonl.gz --questions questions/*.dev.jsonl.gz --passages 1000000

A larger corpus is the real one, repeated with variations. Each build and each search runs in a separate process, to measure its
memory: `anonymous` excludes mapped files. Both search the same files in batches of 64 queries, alternating, and their results
are compared. Seconds are of one build; queries/s are of the median repeat.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import Stemmer
from rich.console import Console
from rich.table import Table

from search_e1.data.corpus import Corpus
from search_e1.data.questions import load_questions
from search_e1.retrieval.bm25 import K1, B, Bm25Index
from search_e1.retrieval.bm25s_import import bm25s  # a plain import would also import JAX
from search_e1.types import Passage

BATCH, TOPK = 64, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--questions", type=Path, nargs="+", required=True)
    parser.add_argument("--passages", type=int, nargs="+", default=[1_000_000], help="sizes")
    parser.add_argument("--own", type=int, default=200_000, help="build bm25s's own index up to this many passages")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/retrieval-bm25"), help="directory for the indexes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=["ours", "theirs", "search"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part = {"ours": build_ours, "theirs": build_theirs, "search": search}[arguments.part]
        print(json.dumps(part(arguments, arguments.passages[0])))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = [row for passages in arguments.passages for row in measured(arguments, passages)]
    out = Console(width=None if sys.stdout.isatty() else 120)
    out.print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; bm25s {version('bm25s')}, numpy "
        f"{np.__version__}; {arguments.processes} processes count words; searches repeated {arguments.repeats} times"
    )
    out.print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def table(rows: Sequence[dict]) -> Table:
    made = Table(box=None, pad_edge=False)
    for name in rows[0]:
        made.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        made.add_row(
            *(
                "" if v is None else f"{v:,.1f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v
                for v in row.values()
            )
        )
    return made


def measured(arguments: argparse.Namespace, passages: int) -> Iterator[dict]:
    """One row for search-e1 and one for bm25s."""
    corpus_file(arguments, passages)  # made here, so that no measured process holds the real passages
    ours = child("ours", passages)
    theirs = child("theirs", passages) if passages <= arguments.own else {}
    found = child("search", passages)
    for name, built in (("search-e1", ours), ("bm25s", theirs)):
        yield {
            "by": name,
            "passages": passages,
            "build s": built.get("seconds"),
            "CPU s": built.get("cpu"),
            "peak MiB": built.get("peak"),
            "disk MiB": ours["disk"],
            "open ms": found[name]["open"],
            "anonymous MiB": found[name]["anonymous"],
            "queries/s": found[name]["speed"],
        }


def child(part: str, passages: int) -> dict:
    command = [sys.executable, *sys.argv, "--part", part, "--passages", str(passages)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def varied(passages: Sequence[Passage], number: int) -> Iterator[Passage]:
    """``number`` passages: the real ones, then repeatedly with the second half taken from another one.

    All are distinct up to ``len(passages)`` squared; word frequencies stay the same.
    """
    n = len(passages)
    for i in range(number):
        here = passages[i % n]
        if i < n:
            yield here
            continue
        words, others = here.text.split(), passages[(i + 7919 * (i // n)) % n].text.split()
        text = " ".join(words[: len(words) // 2] + others[len(others) // 2 :])
        yield Passage(id=f"varied-{i}", title=here.title, text=text)


def corpus_file(arguments: argparse.Namespace, number: int) -> Path:
    path = arguments.work / f"{number}.jsonl"
    if not path.exists():
        real = list(Corpus(arguments.corpus))
        partial = path.with_suffix(".partial")
        with partial.open("w") as file:
            for passage in varied(real, number):
                file.write(json.dumps({"id": passage.id, "contents": passage.contents}) + "\n")
        partial.rename(path)
    return path


def build_ours(arguments: argparse.Namespace, number: int) -> dict:
    corpus, out = corpus_file(arguments, number), arguments.work / f"{number}.index"
    return built(lambda: Bm25Index.build(Corpus(corpus), out, processes=arguments.processes), out, number)


def build_theirs(arguments: argparse.Namespace, number: int) -> dict:
    """Build with bm25s's own means for a streamed corpus: its tokenizer, its builder, its files."""
    corpus, out = corpus_file(arguments, number), arguments.work / f"{number}.bm25s"

    def build() -> None:
        tokenizer = bm25s.tokenization.Tokenizer(stopwords="english", stemmer=Stemmer.Stemmer("english"))
        texts = (f"{passage.title} {passage.text}" for passage in Corpus(corpus))
        ids = list(tokenizer.streaming_tokenize(texts, allow_empty=False))
        index = bm25s.BM25(k1=K1, b=B)
        index.index((ids, tokenizer.get_vocab_dict()), show_progress=False)
        index.save(out, show_progress=False)

    return built(build, out, number)


def built(build: Callable[[], object], out: Path, number: int) -> dict:
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    before = sum(os.times()[:4])
    build()
    return {
        "seconds": time.perf_counter() - start,
        "cpu": sum(os.times()[:4]) - before,
        "peak": sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) // 1024,
        "disk": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) // 2**20,
    }


def search(arguments: argparse.Namespace, number: int) -> dict:
    """Search with both on the same files and queries, alternating; each one's memory is measured as it is opened."""
    path = arguments.work / f"{number}.index"
    queries = [question.text for file in arguments.questions for question in load_questions(file)]
    batches = [queries[i : i + BATCH] for i in range(0, len(queries), BATCH)]
    stemmer = Stemmer.Stemmer("english")
    found: dict[str, dict] = {"search-e1": {}, "bm25s": {}}
    before = anonymous()
    start = time.perf_counter()
    ours = Bm25Index.open(path)
    found["search-e1"]["open"] = 1000 * (time.perf_counter() - start)
    hits = [row for batch in batches for row in ours.search(batch, TOPK)]
    found["search-e1"]["anonymous"] = anonymous() - before
    before = anonymous()
    start = time.perf_counter()
    theirs = bm25s.BM25.load(path / "bm25", mmap=True, show_progress=False)
    found["bm25s"]["open"] = 1000 * (time.perf_counter() - start)

    def retrieve(batch: list[str]) -> np.ndarray:
        tokens = bm25s.tokenize(batch, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)
        return theirs.retrieve(tokens, k=TOPK, show_progress=False).scores

    scores = np.concatenate([retrieve(batch) for batch in batches])
    found["bm25s"]["anonymous"] = anonymous() - before
    for row, expected in zip(hits, scores, strict=True):
        assert np.array_equal(np.float32([hit.score for hit in row]), expected[expected > 0])
    times: dict[str, list[float]] = {"search-e1": [], "bm25s": []}
    for _ in range(arguments.repeats):
        for name, call in (("search-e1", lambda batch: ours.search(batch, TOPK)), ("bm25s", retrieve)):
            start = time.perf_counter()
            for batch in batches:
                call(batch)
            times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        found[name]["speed"] = len(queries) / median(seconds)
    return found


def anonymous() -> int:
    """MiB of anonymous memory (not backed by files)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
