"""Compare EM and F1 with an independent implementation, and answers found in a corpus with the files' metadata.

    python benchmarks/judging.py questions/*.dev.jsonl.gz
    python benchmarks/judging.py questions/*.dev.jsonl.gz --corpus corpus.jsonl.gz

The first command compares EM and F1 with torchmetrics' SQuAD on perturbed answers of the files. With a corpus, it also compares
whether the corpus holds each question's answer with ``metadata.answer_in_corpus``.
"""

import argparse
import json
import os
import platform
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table
from torchmetrics.functional.text import squad

from search_e1.data.answers import exact_match, f1
from search_e1.data.corpus import Corpus
from search_e1.data.questions import load_questions
from search_e1.evaluation.recall import in_corpus, patterns
from search_e1.types import Question

Perturb = Callable[[str, random.Random], str]


def _somewhere(text: str, piece: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + piece + text[at:]


def _without_a_word(text: str, rng: random.Random) -> str:
    words = text.split()
    del words[rng.randrange(len(words))]
    return " ".join(words)


def _shuffled(text: str, rng: random.Random) -> str:
    words = text.split()
    return " ".join(rng.sample(words, len(words)))


PERTURBATIONS: dict[str, Perturb] = {
    "as it is": lambda text, rng: text,
    "other case": lambda text, rng: rng.choice([str.upper, str.lower, str.title, str.swapcase])(text),
    "an article": lambda text, rng: f"{rng.choice(['the', 'The', 'A', 'an'])} {text}",
    "ASCII punctuation": lambda text, rng: _somewhere(text, rng.choice("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"), rng),
    "other punctuation": lambda text, rng: _somewhere(text, rng.choice("\u2019\u2013\u2014\u201c\u00b7\u00bf\u3002"), rng),
    "white space": lambda text, rng: _somewhere(text, rng.choice(["  ", "\t", "\n", "\u00a0", "\u2003"]), rng),
    "a word less": _without_a_word,
    "a word more": lambda text, rng: f"{text} {rng.choice(['city', '1', 'a', 'of', 'yes', 'U.S.'])}",
    "words shuffled": _shuffled,
    "yes or no": lambda text, rng: rng.choice(["yes", "no", "No.", "noanswer", ""]),
}
OTHER = "another's answer"


def pairs(questions: Sequence[Question], count: int, seed: int) -> list[tuple[str, str, tuple[str, ...]]]:
    """``count`` triples of kind, answer and gold answers. Kinds are equally frequent; each triple draws a new question."""
    rng = random.Random(seed)
    kinds = [*PERTURBATIONS, OTHER]
    made = []
    for i in range(count):
        kind, question = kinds[i % len(kinds)], rng.choice(questions)
        text = rng.choice(rng.choice(questions).answers if kind == OTHER else question.answers)
        made.append((kind, text if kind == OTHER else PERTURBATIONS[kind](text, rng), question.answers))
    return made


def theirs(answer: str, gold: Sequence[str]) -> tuple[float, float]:
    """EM and F1 by torchmetrics, from 0 to 1."""
    target = {"answers": {"answer_start": [0] * len(gold), "text": list(gold)}, "id": "q"}
    found = squad({"prediction_text": answer, "id": "q"}, target)
    return float(found["exact_match"]) / 100, float(found["f1"]) / 100


def agreement(made: Sequence[tuple[str, str, tuple[str, ...]]]) -> tuple[list[dict], list[dict]]:
    """One row per kind of pair, and every pair on which EM or F1 differ."""
    rows: dict[str, Counter] = {}
    differing = []
    for kind, answer, gold in made:
        ours, other = (exact_match(answer, gold), f1(answer, gold)), theirs(answer, gold)
        row = rows.setdefault(kind, Counter())
        em_agrees, f1_agrees = ours[0] == other[0], abs(ours[1] - other[1]) < 1e-6
        row.update(pairs=1, right=int(ours[0]), em_agrees=em_agrees, f1_agrees=f1_agrees)
        if not (em_agrees and f1_agrees):
            differing.append({"kind": kind, "answer": answer, "gold": list(gold), "ours": ours, "theirs": other})
    return [{"kind": kind, **row} for kind, row in rows.items()], differing


def found_in(corpus: Path, questions: Sequence[Question]) -> tuple[list[bool | None], float]:
    """Whether the corpus holds an answer to each question (``None``: nothing to search for), and the seconds taken."""
    clock = time.perf_counter()
    texts = (f"{passage.title} {passage.text}" for passage in Corpus(corpus))
    return in_corpus(texts, [patterns(question) for question in questions]), time.perf_counter() - clock


def corpus_rows(questions: Sequence[Question], found: Sequence[bool | None]) -> tuple[list[dict], list[dict]]:
    """One row per benchmark, and every question on which the file's metadata differs."""
    rows: dict[str, Counter] = {}
    differing = []
    for question, here in zip(questions, found, strict=True):
        row = rows.setdefault(question.benchmark, Counter())
        said = question.metadata.get("answer_in_corpus")
        row.update(questions=1, apart=here is None, here=bool(here), said=bool(said) and here is not None)
        if here is not None and said is not None and here != said:
            differing.append({"id": question.id, "answers": list(question.answers), "here": here, "said": said})
    return [{"benchmark": name, **row} for name, row in rows.items()], differing


def table(rows: Sequence[dict]) -> Table:
    made = Table(box=None, pad_edge=False)
    for name in rows[0]:
        made.add_column(name, justify="left" if name in ("kind", "benchmark") else "right")
    for row in rows:
        made.add_row(*(str(row[name]) for name in rows[0]))
    total = [sum(row[name] for row in rows) for name in list(rows[0])[1:]]
    made.add_row("all", *map(str, total))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="question files")
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write rows and all differences here as well")
    arguments = parser.parse_args()
    console = Console(width=80, highlight=False)
    questions = [q for path in arguments.files for q in load_questions(path, path.name.partition(".")[0])]
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torchmetrics "
        f"{version('torchmetrics')}; {len(questions)} questions of {len(arguments.files)} files; one run"
    )
    rows, differing = agreement(pairs(questions, arguments.pairs, arguments.seed))
    console.print(table(rows))
    _examples(console, differing)
    written = {"agreement": rows, "differing": differing}
    if arguments.corpus:
        found, seconds = found_in(arguments.corpus, questions)
        rows, differing = corpus_rows(questions, found)
        console.print(f"\nAnswers in {arguments.corpus.name}: one pass, {seconds:.1f} s")
        console.print(table(rows))
        _examples(console, differing)
        written |= {"corpus": rows, "corpus_differing": differing, "corpus_seconds": seconds}
    if arguments.json:
        arguments.json.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")


def _examples(console: Console, differing: Sequence[dict], most: int = 6) -> None:
    console.print(f"{len(differing)} differ")
    for row in differing[:most]:
        console.print(f"  {row}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
