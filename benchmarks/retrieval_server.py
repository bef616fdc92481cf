"""The HTTP server's overhead over calling the index, and its gain over a naive server, measured in one run.

    search-e1 index build --corpus wiki_multi.jsonl.gz --out runs/wiki-bm25
    python benchmarks/retrieval_server.py --index runs/wiki-bm25 --questions questions/*.dev.jsonl.gz --json server.json

Every repeat uses new questions, so that the cache is cold, and then the same again for the warm figures. Servers run in
separate processes, clients in this one.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from rich.console import Console
from rich.table import Table

from search_e1.data.questions import load_questions
from search_e1.retrieval.base import Index
from search_e1.retrieval.client import HttpRetriever
from search_e1.retrieval.indexes import open_index

TOPK = 3
Search = Callable[[Sequence[str]], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--questions", type=Path, nargs="+", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--naive", action="store_true", help=argparse.SUPPRESS)  # run as the naive server
    arguments = parser.parse_args()
    if arguments.naive:
        serve_naively(open_index(arguments.index))
        return
    questions = list(dict.fromkeys(q.text for file in arguments.questions for q in load_questions(file)))
    rows = server_rows(arguments.index, questions, arguments.repeats)
    out = Console(width=None if sys.stdout.isatty() else 100)
    out.print(
        f"{platform.machine()}, {os.cpu_count()} cores; {len(questions)} distinct questions, top {TOPK}; fastapi "
        f"{version('fastapi')}, uvicorn {version('uvicorn')}; medians of {arguments.repeats} repeats"
    )
    out.print(server_table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


SHAPES = {
    # name -> concurrent clients, queries per request, number of times that each query is sent
    "1 client, 64 a request": (1, 64, 1),
    "16 clients, 4 a request": (16, 4, 1),
    "64 clients, 1 a request": (64, 1, 1),
    "40 clients, 1 a request, 5 ask the same": (40, 1, 5),
}


def server_rows(index: Path, questions: Sequence[str], repeats: int) -> list[dict]:
    """Queries/s for each load: in this process, with our server's cache cold and warm, and with the naive server."""
    local = open_index(index)
    share = len(questions) // (repeats * len(SHAPES)) // 64 * 64
    if not share:
        raise SystemExit(f"{len(questions)} questions are too few for {repeats} repeats of {len(SHAPES)} loads of 64")
    fresh = iter(questions)
    with ours(index) as our_url, naive(index) as naive_url:
        measured: dict[str, dict[str, list[float]]] = {
            name: {way: [] for way in ("local", "cold", "warm", "naive")} for name in SHAPES
        }
        warm_up(local, (our_url, naive_url), questions)
        for _ in range(repeats):
            for name, (clients, size, times) in SHAPES.items():
                mine = [next(fresh) for _ in range(share)]
                asked = [query for query in mine for _ in range(times)]
                parts = [asked[i : i + size] for i in range(0, len(asked), size)]
                seconds = {
                    "local": timed(lambda q: local.search(q, TOPK), parts, 1),
                    "cold": over_http(our_url, parts, clients),
                    "naive": over_http(naive_url, parts, clients),
                    "warm": over_http(our_url, parts, clients),
                }
                for way, taken in seconds.items():
                    measured[name][way].append(len(asked) / taken)
    return [
        {
            "load": name,
            **{way: median(values) for way, values in rates.items()},
            "cold_of_local": median(c / i for c, i in zip(rates["cold"], rates["local"], strict=True)),
            "warm_of_local": median(w / i for w, i in zip(rates["warm"], rates["local"], strict=True)),
            "naive_of_local": median(n / i for n, i in zip(rates["naive"], rates["local"], strict=True)),
        }
        for name, rates in measured.items()
    ]


def warm_up(local: Index, urls: Sequence[str], questions: Sequence[str]) -> None:
    """Make every process touch the pages of the index, with another topk, which leaves the cache cold."""
    local.search(questions, TOPK + 1)
    for url in urls:
        with HttpRetriever(url) as retriever:
            retriever.search(questions, TOPK + 1)


def over_http(url: str, parts: Sequence[Sequence[str]], clients: int) -> float:
    """Seconds of all requests. One client is ours, with its checks; several are bare connections, to measure the server."""
    if clients == 1:
        with HttpRetriever(url) as retriever:
            retriever.search(["warm up the connection"], 1)
            return timed(lambda queries: retriever.search(queries, TOPK), parts, 1)
    free = [HTTPConnection(url.removeprefix("http://")) for _ in range(clients)]

    def ask(part: Sequence[str]) -> None:
        connection = free.pop()
        body = json.dumps({"queries": part, "topk": TOPK, "return_scores": True})
        connection.request("POST", "/retrieve", body, {"Content-Type": "application/json"})
        assert len(json.loads(connection.getresponse().read())["result"]) == len(part)
        free.append(connection)

    return timed(ask, parts, clients)


def timed(search: Search, parts: Sequence[Sequence[str]], threads: int) -> float:
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(search, parts))
        return time.perf_counter() - started


@contextlib.contextmanager
def ours(index: Path) -> Iterator[str]:
    command = [sys.executable, "-c", "from search_e1.cli.main import main; main()", "serve-retriever"]
    with _running([*command, "--index", str(index), "--port", "0"]) as line:
        yield line.partition(" at ")[2].partition("/retrieve")[0]


@contextlib.contextmanager
def naive(index: Path) -> Iterator[str]:
    with _running([sys.executable, __file__, "--naive", "--index", str(index), "--questions", "none"]) as line:
        yield line


@contextlib.contextmanager
def _running(command: Sequence[str]) -> Iterator[str]:
    """Run a server in a separate process; yields its first line of output."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def serve_naively(index: Index) -> None:
    """A naive server: one request at a time, no batching, no cache."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = index.search(asked["queries"], asked["topk"])
            result = [
                [{"document": {"id": hit.id, "contents": hit.contents}, "score": hit.score} for hit in hits] for hits in found
            ]
            body = json.dumps({"result": result}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    class Server(HTTPServer):
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


def server_table(rows: Sequence[dict]) -> Table:
    table = Table(title="Queries a second", title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("load", "in process", "server", "cache warm", "naive", "server/in process", "naive/in process"):
        table.add_column(heading, justify="left" if heading == "load" else "right")
    for row in rows:
        rates = [f"{row[way]:,.0f}" for way in ("local", "cold", "warm", "naive")]
        table.add_row(row["load"], *rates, f"{row['cold_of_local']:.0%}", f"{row['naive_of_local']:.0%}")
    return table


if __name__ == "__main__":
    main()
