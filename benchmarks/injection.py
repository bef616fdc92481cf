"""The effect of hostile passages, questions and answers, with and without the defenses.

    python benchmarks/injection.py --texts 1000 --json injection.json

Each generated text (tags, control tokens of chat templates, whole messages; plain, or disguised by invisible, full-width or
nested characters) is used as a passage's title and text, a question, and a gold answer, in a rollout whose policy quotes every
passage verbatim. Counts the rollouts in which it changed an action or the answer, the passages or tags of the observation, or
the special ids (under tools: all added ids) of observation and prompt.
"""

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from rich.console import Console
from rich.table import Table

from attacks import PROTOCOLS, breaches, hostile_texts, tokenizers

KINDS = ("action", "observation", "ids")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments = parser.parse_args()
    texts = hostile_texts(arguments.texts, arguments.seed)
    rows = [
        {"tokenizer": name, "protocol": protocol, "raw": raw, "texts": len(texts)} | counted(tokenizer, protocol, texts, raw)
        for name, tokenizer in tokenizers().items()
        for protocol in PROTOCOLS
        for raw in (True, False)
    ]
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "tokenizers"))
    print(f"{platform.machine()}, {packages}; {len(texts)} texts, seed {arguments.seed}: rollouts that they changed")
    Console(width=None if sys.stdout.isatty() else 100).print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def counted(tokenizer: Any, protocol: str, texts: list[str], raw: bool) -> dict[str, int]:
    if not raw:
        found = breaches(tokenizer, protocol, texts)
    else:
        with patch("search_e1.text.prompts.neutralize", _raw), patch("search_e1.text.tool_calls.neutralize", _raw):
            found = breaches(tokenizer, protocol, texts)
    return {kind: sum(kind in changed for changed in found) for kind in KINDS} | {"any": sum(map(bool, found))}


def _raw(tokenizer: Any, text: str, *_: Any, **__: Any) -> str:
    return text.encode("utf-8", "replace").decode()  # tokenizers refuse surrogates


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(box=None, pad_edge=False)
    for heading in ("tokenizer", "protocol", "text", *KINDS, "any"):
        shown.add_column(heading, justify="right" if heading in (*KINDS, "any") else "left")
    for row in rows:
        text = "raw" if row["raw"] else "as shown"
        shown.add_row(row["tokenizer"], row["protocol"], text, *(str(row[kind]) for kind in (*KINDS, "any")))
    return shown


if __name__ == "__main__":
    main()
