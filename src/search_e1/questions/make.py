"""``search-e1 data questions``: writes drafts from candidates, filters them, and stores the rest by split."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from search_e1 import runs
from search_e1.data.lines import write_lines
from search_e1.data.questions import to_record
from search_e1.errors import DataError
from search_e1.questions import review
from search_e1.questions.draft import SPLITS, Candidate, Draft, Split, document_of, split_documents
from search_e1.questions.filters import Copies, Filter, each, found_within, in_passage, needs_both, well_formed
from search_e1.questions.links import links
from search_e1.retrieval.base import Retriever
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.runs import locks
from search_e1.runs.progress import Progress, silent
from search_e1.types import Passage

STAGE = "questions"
WRITTEN, KEPT = "written", "kept"
_LEAST, _MOST = 8, 256
"""Minimum and maximum number of candidates per chunk."""
_LOWEST_RATE = 0.05
_FIRSTS = 20_000
"""Minimum number of passages to search for links, in a large corpus; grows with the number of questions."""
_SHORTEST = 8  # minimum words of a passage; shorter ones have hardly any content


@dataclass(frozen=True, slots=True)
class Request:
    """Settings of the questions to make."""

    corpus: tuple[str, ...]
    number: int = 200
    """Total number of questions in both splits."""
    two_hop: float = 0.25
    """Share of two-hop questions, if the corpus has enough linked passages."""
    depth: int = 10
    """Top-k within which the retriever must find a question's passages."""
    eval_share: float = 0.2
    per_passage: int = 2
    seed: int = 0


class Writer(Protocol):
    """Writes drafts; implemented by ``rules.RuleWriter`` and ``writer.ModelWriter``."""

    @property
    def name(self) -> str: ...

    def write(self, candidates: Sequence[Candidate]) -> list[list[Draft]]:
        """The drafts of each candidate."""
        ...

    def filters(self) -> list[Filter]:
        """The writer's own filters, applied after the common ones."""
        ...

    def check(self) -> None:
        """
        Raises:
            EndpointError, ModelError: nothing usable was written.
        """
        ...


@dataclass(slots=True)
class Made:
    """The questions, and statistics of how they were made."""

    questions: dict[Split, list[Draft]]
    funnel: dict[str, list[int]]
    """Step -> [one-hop drafts, two-hop drafts] left after it."""
    dropped: list[tuple[Draft, str, str]] = field(default_factory=list)
    """(draft, filter, reason)."""
    candidates: list[int] = field(default_factory=lambda: [0, 0])
    """[passages, linked pairs] given to the writer."""
    notes: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """The manifest's entries."""
        counts = {split: [sum(d.hops == hops for d in drafts) for hops in (1, 2)] for split, drafts in self.questions.items()}
        return {"questions": counts, "funnel": self.funnel, "candidates": self.candidates, "notes": self.notes}


OpenWriter = Callable[[Sequence[Passage], Callable[[str], None]], AbstractContextManager[Writer]]
"""Opens a writer, given the passages and a callback for its progress messages."""


def make_questions(
    request: Request,
    passages: Sequence[Passage],
    out: Path,
    open_writer: OpenWriter,
    *,
    checksum: str,
    settings: Mapping[str, Any],
    retriever: Retriever | None = None,
    progress: Progress = silent,
) -> Made:
    """Make questions from ``passages`` in the new directory ``out``; repeating an interrupted call resumes it.

    ``checksum``: of the corpus. ``settings``: of writer and retriever. ``retriever`` defaults to BM25 over ``passages``.

    Raises:
        ConfigError: the corpus cannot be split.
        DataError: no question survives.
        EndpointError, ModelError, RetrievalError: from the writer or the retriever.
        RunError: ``out`` exists, another process makes it, or the disk fails.
    """
    split = split_documents(passages, request.eval_share, request.seed)
    made = Made({}, {})

    def make(directory: Path) -> Mapping[str, Any]:
        searched = retriever or _index(passages, directory / runs.WORK / "index", checksum, progress)
        steps = _Steps(progress, request.number)
        with open_writer(passages, steps.tell) as writer:
            _Maker(request, writer, searched, steps, made).run(passages, split)
            if not any(made.questions.values()):
                writer.check()
                raise DataError(_nothing(made))
        write(made, directory)
        return made.summary()

    inputs = dict.fromkeys(request.corpus, checksum)
    with locks.making(out):
        runs.artifact(out, stage=STAGE, settings={**asdict(request), **settings}, inputs=inputs, seed=request.seed, make=make)
    return made


def write(made: Made, directory: Path) -> None:
    """Write the split files, the review table, and the dropped drafts."""
    for name, drafts in made.questions.items():
        write_lines(directory / f"{name}.jsonl", (to_record(draft.question()) for draft in drafts))
    checks = [step for step in made.funnel if step not in (WRITTEN, KEPT)]
    review.write(directory / review.FILE, made.questions, checks)
    dropped = [{**to_record(draft.question()), "dropped_by": name, "reason": reason} for draft, name, reason in made.dropped]
    write_lines(directory / "dropped.jsonl", dropped)


@dataclass(slots=True)
class _Steps:
    """Progress of kept questions, shared with the writer for its own messages."""

    progress: Progress
    total: int
    done: int = 0

    def tell(self, figure: str) -> None:
        self.progress(self.done, self.total, figure)


class _Maker:
    """Processes candidates until each split has enough questions per number of hops, or candidates run out."""

    def __init__(self, request: Request, writer: Writer, retriever: Retriever, steps: "_Steps", made: Made) -> None:
        self._request, self._writer, self._steps, self._made = request, writer, steps, made
        self._filters = [
            each("well-formed", well_formed),
            each("needs both passages", needs_both),
            each("answer in the passage", in_passage),
            each("no near-copy", Copies()),
            found_within(retriever, request.depth),
            *writer.filters(),
        ]
        for step in (WRITTEN, *(filter.name for filter in self._filters), KEPT):
            made.funnel[step] = [0, 0]

    def run(self, passages: Sequence[Passage], split: Mapping[str, Split]) -> None:
        request, made = self._request, self._made
        linked = links(passages, max(_FIRSTS, 100 * request.number)) if request.two_hop else []
        held_out = round(request.number * request.eval_share)
        wanted: dict[Split, int] = {"train": request.number - held_out, "eval": held_out}
        for name in SPLITS:
            own = [p for p in passages if split[document_of(p)] == name and len(p.text.split()) >= _SHORTEST]
            pairs = [pair for pair in linked if all(split[document_of(passage)] == name for passage in pair)]
            two = self._collect(self._shuffled(pairs, name), round(request.two_hop * wanted[name]))
            one = self._collect(self._shuffled([(passage,) for passage in own], name), wanted[name] - len(two))
            made.questions[name] = [*one, *two]
            if (got := len(one) + len(two)) < wanted[name]:
                made.notes.append(
                    f"{name}: {got} of {wanted[name]} questions requested; {len(own):,} passages and {len(pairs):,} "
                    "linked pairs yielded no more"
                )
            elif len(two) < (asked := round(request.two_hop * wanted[name])):
                made.notes.append(
                    f"{name}: {len(two)} of {asked} two-hop questions, from {len(pairs):,} linked pairs; one hop instead"
                )

    def _shuffled(self, candidates: Sequence[Candidate], name: str) -> Iterator[Candidate]:
        order = list(candidates)
        random.Random(f"{self._request.seed}/{name}").shuffle(order)
        return iter(order)

    def _collect(self, source: Iterator[Candidate], need: int) -> list[Draft]:
        kept: list[Draft] = []
        seen = 0
        while len(kept) < need:
            rate = max(len(kept) / seen, _LOWEST_RATE) if seen else 0.5
            chunk = list(islice(source, min(_MOST, max(_LEAST, math.ceil((need - len(kept)) / rate)))))
            if not chunk:
                break
            seen += len(chunk)
            self._made.candidates[len(chunk[0]) - 1] += len(chunk)
            drafts = [draft for drafts in self._writer.write(chunk) for draft in drafts]
            survivors = self._survivors(drafts)[: need - len(kept)]
            kept += survivors
            self._count(KEPT, survivors)
            self._steps.done = sum(self._made.funnel[KEPT])
            self._steps.tell(f"{sum(self._made.funnel[WRITTEN])} written")
        return kept

    def _survivors(self, drafts: list[Draft]) -> list[Draft]:
        self._count(WRITTEN, drafts)
        for filter in self._filters:
            reasons = filter.reasons(drafts) if drafts else []
            self._made.dropped += [(d, filter.name, reason) for d, reason in zip(drafts, reasons, strict=True) if reason]
            drafts = [draft for draft, reason in zip(drafts, reasons, strict=True) if not reason]
            self._count(filter.name, drafts)
        return drafts

    def _count(self, step: str, drafts: Sequence[Draft]) -> None:
        for draft in drafts:
            self._made.funnel[step][draft.hops - 1] += 1


def _index(passages: Sequence[Passage], directory: Path, checksum: str, progress: Progress) -> Retriever:
    """BM25 over ``passages``; reused from an interrupted call."""
    if directory.exists():
        return Bm25Index.open(directory)
    return Bm25Index.build(passages, directory, progress, source=checksum)


def _nothing(made: Made) -> str:
    """Why there is no question, naming the filter that dropped most."""
    written = sum(made.funnel[WRITTEN])
    if not made.dropped:
        return (
            f"no question was written from {sum(made.candidates)} passages: no rule finds a fact in them; give passages with "
            "titles, or a model: --endpoint URL --model NAME, or --policy DIR"
        )
    names = [name for _, name, _ in made.dropped]
    most = max(dict.fromkeys(names), key=names.count)
    draft, _, reason = next(dropped for dropped in made.dropped if dropped[1] == most)
    return (
        f"no question survives of {written} written; {names.count(most)} were dropped by {most!r}, e.g. {draft.text!r} "
        f"(answer {draft.answers[0]!r}): {reason}; check that --index is of this corpus, raise --depth, or name a stronger "
        "model"
    )
