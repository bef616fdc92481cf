"""What a run leaves on disk, and what passages take on the host that searches them."""

from pathlib import Path

from search_e1.config import Config
from search_e1.data.lines import raw_lines
from search_e1.lab.plan.lengths import Lengths
from search_e1.lab.plan.shapes import Shape
from search_e1.lab.plan.work import Counts
from search_e1.retrieval import directory as directories
from search_e1.types import Record

_WIKI_18 = 21_015_324  # passages
_WIDTH = 768  # numbers of a vector of E5-base-v2
_TOKEN = 16  # bytes of a token in a pool: its id, its text, its log-probability
_COUNTED = 2**28  # bytes of a corpus that is small enough to count its lines
_PASSAGE = 700  # bytes of a stored passage of 100 words

# Bytes a passage, of vectors of so many numbers: those that searching looks at (in memory, or read from disk as they are
# asked for), and on disk without the passages. Measured at a million passages: docs/retrieval.md.
_INDEXES = {
    "bm25": lambda width: (430, 430),
    "exact": lambda width: (4 * width, 4 * width),
    "graph": lambda width: (width + 280, 3 * width + 280),
    "compressed": lambda width: (width / 4 + 8, 2.25 * width + 8),
}


class Storage(Record):
    """Bytes of one thing."""

    what: str
    disk: int = 0
    memory: int = 0
    """Of the host that searches, file cache included."""


def storage(
    config: Config, shape: Shape, lengths: Lengths, counts: Counts, passages: int | None
) -> tuple[tuple[Storage, ...], list[str]]:
    """By what it is, and what had to be assumed."""
    rounds, itemsize = config.distillations, {"float32": 4}.get(config.policy.dtype, 2)
    policies = rounds + (config.rounds if config.grpo.steps else 0)
    questions = min(config.pool.questions or counts.train, counts.train)
    evaluated = (1 + policies) * counts.evaluated * (1 + config.evaluation.samples)
    trajectory = _TOKEN * lengths.total
    kept = config.grpo.steps * config.grpo.questions_per_step if config.grpo.keep_groups else 0
    pairs = questions * lengths.pair_yield * config.pairs.references
    made = [
        Storage(what=f"{policies} policies", disk=policies * shape.parameters * itemsize),
        Storage(what="pools", disk=round(rounds * questions * config.pool.group_size * trajectory)),
        *(
            [Storage(what="GRPO's groups", disk=round(config.rounds * kept * config.grpo.group_size * trajectory))]
            if kept
            else []
        ),
        Storage(what="pairs", disk=round(rounds * pairs * 2 * trajectory)),
        Storage(what="evaluations", disk=round(evaluated * trajectory)),
    ]
    distill = config.distill
    if (config.grpo.steps and config.grpo.lora is None) or distill.weights == "all":
        # Two of weights and AdamW's two states; those of adapters are small.
        made.append(Storage(what="checkpoints, while training", disk=2 * 3 * shape.parameters * itemsize))
    cached = distill.teacher == "cached" or (
        distill.teacher == "auto" and (distill.epochs > 1 or distill.weights == "all")
    )
    if cached and distill.objective == "ofsd":
        states = pairs * lengths.sampled * shape.hidden_size * itemsize
        made.append(Storage(what="teacher's states, while distilling", disk=round(states)))
    count, notes = _passages(config, passages)
    made += [_index(kind, count) for kind in _kinds(config)]
    return tuple(made), notes


def _kinds(config: Config) -> list[str]:
    retrieval = config.retrieval
    if retrieval.index and all((path / directories.MANIFEST).is_file() for path in retrieval.index):
        kinds = [directories.read(path).kind for path in retrieval.index]
    else:
        kinds = ["bm25", "dense"] if retrieval.kind == "hybrid" else [retrieval.kind]
    return [kind if kind == "bm25" else retrieval.faiss if retrieval.faiss in _INDEXES else "graph" for kind in kinds]


def _index(kind: str, passages: int) -> Storage:
    looked_at, stored = _INDEXES[kind](_WIDTH)
    return Storage(
        what=f"index ({kind}, {passages:,} passages)",
        disk=round(passages * (stored + _PASSAGE)),
        memory=round(passages * looked_at),
    )


def _passages(config: Config, given: int | None) -> tuple[int, list[str]]:
    if given is not None:
        return given, []
    for path in config.retrieval.index:
        if (path / directories.MANIFEST).is_file():
            return directories.read(path).passages, []
    corpus = config.data.corpus
    if corpus and corpus.is_file() and corpus.stat().st_size <= _COUNTED and _is_lines(corpus):
        return sum(1 for _ in raw_lines(corpus)), []
    return _WIKI_18, [f"{_WIKI_18:,} passages assumed (wiki-18); --passages says how many"]


def _is_lines(path: Path) -> bool:
    return any(part in (".jsonl", ".json") for part in path.suffixes)
