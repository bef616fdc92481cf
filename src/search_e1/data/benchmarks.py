"""The seven benchmarks, from the Hub or from local files in its layout.

The questions come from the FlashRAG collection (arXiv:2405.13576), which Search-R1 and its successors train and evaluate on:
one directory per benchmark, one JSON lines file per split.
"""

import difflib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from search_e1.data import hub
from search_e1.data.lines import checksum, read_lines
from search_e1.data.questions import Loaded, to_question
from search_e1.errors import ConfigError, DataError
from search_e1.types import Question

REPOSITORY = "RUC-NLPIR/FlashRAG_datasets"
SIZES = {
    "nq": {"train": 79168, "dev": 8757, "test": 3610},
    "triviaqa": {"train": 78785, "dev": 8837, "test": 11313},
    "popqa": {"test": 14267},
    "hotpotqa": {"train": 90447, "dev": 7405},
    "2wikimultihopqa": {"train": 15000, "dev": 12576},
    "musique": {"train": 19938, "dev": 2417},
    "bamboogle": {"test": 125},
}
"""Benchmark -> split -> number of questions, from the collection's own table."""
BENCHMARKS = tuple(SIZES)
TEST_SPLITS = {name: "test" if "test" in splits else "dev" for name, splits in SIZES.items()}
"""Benchmark -> split that Search-R1 evaluates on: test if its answers are public, else dev."""
TEST_SIZES = {name: splits[TEST_SPLITS[name]] for name, splits in SIZES.items()}
"""Benchmark -> number of questions behind the published figures, in the order of the tables."""
TRAINING_MIX = ("nq", "hotpotqa")
"""The benchmarks whose train splits the published policies were trained on."""

_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_HOPS = {"nq": 1, "triviaqa": 1, "popqa": 1, "hotpotqa": 2, "bamboogle": 2}
# Retrieved or supporting text: triples the file size and is never read, since passages come from the corpus.
_BULK = ("context", "paragraphs", "question_decomposition")


def find(name: str) -> str:
    """The benchmark called ``name``, ignoring case and punctuation.

    Raises:
        ConfigError: an unknown benchmark; suggests the closest name.
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    if plain in SIZES:
        return plain
    names = {**{known: known for known in BENCHMARKS}, "naturalquestions": "nq"}
    containing = [known for known in names if plain and (plain in known or known in plain)]
    close = [names[near] for near in containing or difflib.get_close_matches(plain, names, n=1, cutoff=0.4)]
    known = ", ".join(BENCHMARKS)
    raise ConfigError(
        f"unknown benchmark {name!r}; " + (f"did you mean {close[0]!r}? (known: {known})" if close else f"known: {known}")
    )


def splits(benchmark: str, directory: Path | None = None) -> tuple[str, ...]:
    """The splits of a benchmark in the collection, or those with files in ``directory``."""
    if directory is None:
        return tuple(SIZES[benchmark])
    nested = {p.name.split(".")[0] for p in (directory / benchmark).glob("*") if p.name.lower().endswith(_SUFFIXES)}
    flat = {p.name.split(".")[1] for p in directory.glob(f"{benchmark}.*.*") if p.name.lower().endswith(_SUFFIXES)}
    return tuple(sorted(nested | flat))


def load(benchmark: str, split: str, directory: Path | None = None, revision: str | None = None) -> Loaded:
    """The questions of one split, from ``directory``, or from the Hub at ``revision`` (default: the newest commit).

    ``directory`` holds ``<benchmark>/<split>.jsonl`` (a copy of the Hub's repository) or ``<benchmark>.<split>.jsonl``, plain,
    ``.gz`` or ``.zst``. As in Search-R1, a question that does not end with a question mark gets one. Ids become
    ``<benchmark>_<id>``, since the collection's own (``train_0``) repeat across benchmarks. ``metadata`` keeps the original id
    as ``source_id``, and from the annotation ``hops``, ``supporting_titles`` and the triples in ``evidences``.

    Raises:
        DataError: the Hub cannot be reached or lacks the file, ``directory`` lacks it, or a line is not a question.
    """
    if directory is None:
        return _from_hub(benchmark, split, revision)
    path = _local(benchmark, split, directory)
    rows = [(f"{path}:{n}", _question(row, benchmark, f"{path}:{n}")) for n, row in read_lines(path)]
    if not rows:
        raise DataError(f"{path}: no questions in it; give a file with one question per line")
    nested = path.parent.name == benchmark
    return Loaded(rows, str(path), checksum(path), SIZES[benchmark].get(split) if nested else None)


def _local(benchmark: str, split: str, directory: Path) -> Path:
    for folder, stem in ((directory / benchmark, split), (directory, f"{benchmark}.{split}")):
        files = {p.name.removeprefix(stem).lower(): p for p in folder.glob("*") if p.name.startswith(stem) and p.is_file()}
        for suffix in _SUFFIXES:
            if suffix in files:
                return files[suffix]
    present = splits(benchmark, directory)
    raise DataError(
        f"{directory}: neither {benchmark}/{split}.jsonl nor {benchmark}.{split}.jsonl[.gz|.zst] is in it; "
        + (f"for {benchmark} it has {', '.join(present)}" if present else f"it has nothing for {benchmark}")
    )


def _from_hub(benchmark: str, split: str, revision: str | None) -> Loaded:
    import datasets

    file = f"{benchmark}/{split}.jsonl"
    if split not in SIZES[benchmark]:
        raise ConfigError(f"{REPOSITORY} has no {file}; for {benchmark} it has {', '.join(SIZES[benchmark])}")
    instead = f"give --from DIR with {file} or {benchmark}.{split}.jsonl in it instead"
    commit = revision
    if not datasets.config.HF_HUB_OFFLINE:  # offline, `datasets` reads its cache or fails at once
        info = hub.info(REPOSITORY, f"{REPOSITORY}: ", instead, revision)
        commit = info.sha
        if commit is None or file not in {sibling.rfilename for sibling in info.siblings or ()}:
            raise DataError(f"{REPOSITORY}: {file} is not in it (revision {commit}); {instead}")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        with hub.quiet():
            rows = datasets.load_dataset(REPOSITORY, benchmark, split=split, revision=commit)
    except Exception as error:  # see `hub.info`
        raise DataError(f"{REPOSITORY}/{file}: {hub.one_line(error)}; {instead}") from None
    found = Path(rows.cache_files[0]["filename"]).parent.name  # `datasets` names directories by commit
    if commit and found != commit:  # the Hub became unreachable meanwhile, and the cache holds another commit
        raise DataError(f"{REPOSITORY}/{file}: revision {commit} is not available, only {found} in the cache; {instead}")
    source = f"{REPOSITORY}/{file}"
    questions = [(f"{source}:{n}", _question(row, benchmark, f"{source}:{n}")) for n, row in enumerate(rows, 1)]
    return Loaded(questions, source, found, SIZES[benchmark][split])


def _question(row: Mapping[str, Any], benchmark: str, where: str) -> Question:
    answers = row.get("golden_answers")
    if isinstance(answers, list):  # the collection has empty answers among others
        row = {**row, "golden_answers": [a for a in answers if not isinstance(a, str) or a.strip()]}
    question = to_question(row, benchmark, where)
    text = question.text.strip()
    known = {key: value for key, value in question.metadata.items() if value is not None}
    metadata = {**annotation(known, benchmark), **{k: v for k, v in known.items() if k not in (*_BULK, "evidences")}}
    metadata.pop("supporting_facts", None)
    prefixed = question.id.startswith(f"{benchmark}_")
    if not prefixed:
        metadata.setdefault("source_id", question.id)
    return question.model_copy(
        update={
            "id": question.id if prefixed else f"{benchmark}_{question.id}",
            "text": text if text.endswith("?") else f"{text}?",
            "hops": metadata.get("hops"),
            "metadata": metadata,
        }
    )


def annotation(metadata: Mapping[str, Any], benchmark: str) -> dict[str, Any]:
    """``hops``, ``supporting_titles`` and ``evidences``, as far as the collection's metadata give them."""
    found: dict[str, Any] = {}
    steps = metadata.get("question_decomposition") or []
    hops = len(steps) or _HOPS.get(benchmark)
    if benchmark == "2wikimultihopqa" and "type" in metadata:
        hops = 4 if str(metadata["type"]).replace("-", "_") == "bridge_comparison" else 2
    if hops:
        found["hops"] = hops
    titles = list(_titles(metadata.get("supporting_facts"))) + [
        (step.get("support_paragraph") or {}).get("title") for step in steps
    ]
    if any(titles):
        found["supporting_titles"] = list(dict.fromkeys(title for title in titles if title))
    evidences = metadata.get("evidences")
    if isinstance(evidences, Mapping):  # column-wise
        columns = [evidences.get(key) or () for key in ("fact", "relation", "entity")]
        evidences = [list(triple) for triple in zip(*columns, strict=False)]
    return {**found, "evidences": evidences} if evidences else found


def _titles(facts: Any) -> Iterator[str]:
    if isinstance(facts, Mapping):  # {"title": [...], "sent_id": [...]}
        yield from facts.get("title") or ()
    for fact in facts if isinstance(facts, list) else ():  # [[title, sentence], ...]
        if isinstance(fact, list | tuple) and fact:
            yield fact[0]
