"""The audit of questions and passages, before any policy runs.

An evaluation question whose answer is in no passage can be answered only from memory; one that is in training measures memory;
one whose answer cannot be written measures nothing.
"""

import csv
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from search_e1.data.answers import language_in_force, normalize_answer
from search_e1.data.lines import parse, raw_lines
from search_e1.data.parts import question_key
from search_e1.data.questions import settle, to_question
from search_e1.errors import DataError
from search_e1.evaluation import reach
from search_e1.evaluation.preflight import Finding, Level
from search_e1.evaluation.reach import Reach, Reached
from search_e1.evaluation.recall import is_yes_no, words
from search_e1.evaluation.verdict import COMMON, FileAudit, Role, find
from search_e1.retrieval.analysis import one_a_script
from search_e1.runs.languages import ENGLISH
from search_e1.runs.progress import Progress, silent
from search_e1.runs.tokenizing import tokenizing
from search_e1.types import Question, Record

_DEPTHS = (10, 100)
PROBLEMS = {
    "refused": "a line that no run can read",
    "unsayable": "no policy can give the answer so that it counts",
    "conflict": "the same question with other answers",
    "leak": "a training question that is an evaluation question",
    "near leak": "a training question except for inflection, order and small words",
    "repeat": "asked before",
    "near repeat": "asked before, except for inflection, order and small words",
    "out of reach": "no passage holds an answer",
    "far": "the question's own words find no answer among the first 100 passages",
    "common": f"more than {COMMON:.0%} of the passages hold an answer",
}
"""Problem -> its description, most severe first."""


@dataclass(frozen=True, slots=True)
class Source:
    """The questions of one file."""

    name: str
    role: Role
    rows: Sequence[tuple[str, Question]]
    """Questions, each with its place (``file:line``)."""
    refused: Sequence[tuple[str, str]] = ()
    """Place and fault of each line that is not a question."""


class Example(Record):
    """One problem of one question: one line of the CSV."""

    problem: str
    file: str
    where: str
    id: str = ""
    question: str = ""
    answers: str = ""
    """Separated by ``" | "``."""
    detail: str = ""


class Audit(Record):
    """The content of ``data audit --json``."""

    verdict: str
    files: tuple[FileAudit, ...]
    totals: tuple[FileAudit, ...]
    """Figures per role."""
    passages: int | None
    """Number of passages; ``None`` if they were not read."""
    repeated_passages: int
    skipped: dict[str, int]
    """Fault -> number of corpus records that a run refuses."""
    topk: int
    findings: tuple[Finding, ...]


@dataclass(slots=True)
class _Row:
    """A question under audit."""

    source: Source
    where: str
    question: Question
    key: str
    near: tuple[str, ...]
    reach: Reach | None = None
    problems: dict[str, str] = field(default_factory=dict)
    """Problem -> detail."""


def read_source(path: Path, name: str, role: Role, not_found: Sequence[str] | None = None) -> Source:
    """The questions of ``path``; lines that a run would refuse are collected, not raised.

    ``not_found``: the run's ``rollout.rewards.not_found``.

    Raises:
        DataError: the file cannot be read, or holds no question.
    """
    rows, refused, places = [], [], dict[str, str]()
    for number, line in raw_lines(path):
        where = f"{path}:{number}"
        try:
            benchmark = "" if role == "train" else name
            question = to_question(parse(line, where, unique=True), benchmark, where, may_lack_answers=True)
            question = settle(question, not_found, where)
            if question.id in places:
                raise DataError(f"{where}: id {question.id!r} was used at {places[question.id]}; give every question its own")
        except DataError as error:
            refused.append((where, str(error).removeprefix(f"{where}: ")))
        else:
            places[question.id] = where
            rows.append((where, question))
    if not rows:
        first = f" ({refused[0][0]}: {refused[0][1]})" if refused else ""
        raise DataError(f"{path}: no question in it{first}; `search-e1 data prepare` converts other files")
    return Source(name, role, rows, refused)


def audit(
    sources: Sequence[Source],
    texts: Iterable[str] | None,
    *,
    topk: int,
    tokenizer: Any = None,
    max_action_tokens: int = 0,
    skipped: Callable[[], Mapping[str, int]] = dict,
    progress: Progress = silent,
) -> tuple[Audit, list[Example]]:
    """Audit questions and passages; examples are ordered by problem, most severe first, then by file.

    Args:
        texts: title and text of each passage; ``None`` if they cannot be read.
        tokenizer: the policy's, to check which answers it can write in ``max_action_tokens``.
        skipped: called after ``texts`` is read; returns the number of corpus records that are not passages, by fault.
    """
    stems = _Stems()
    rows = [_Row(s, where, q, question_key(q.text), stems.of(q.text)) for s in sources for where, q in s.rows]
    _find_unsayable(rows, tokenizer, max_action_tokens)
    _find_conflicts(rows)
    _find_leaks(rows)
    _find_repeats(rows)
    found = None
    if texts is not None:
        found = reach.measure(texts, [row.question for row in rows], progress)
        _place(rows, found)
    depths = tuple(sorted({topk, *_DEPTHS})) if found else ()
    files = tuple(_figures(s.name, s.role, [s], [row for row in rows if row.source is s], depths) for s in sources)
    roles: tuple[Role, ...] = ("train", "eval")
    totals = tuple(
        _figures(f"all {role}", role, own, [row for row in rows if row.source.role == role], depths)
        for role in roles
        if (own := [s for s in sources if s.role == role])
    )
    left_out = dict(skipped())
    findings = find(totals, found, left_out)
    grave = [finding for finding in findings if finding.check == "reach" or finding.level is not Level.OK]
    judged = Audit(
        verdict=" ".join(finding.text for finding in grave or findings),
        files=files,
        totals=totals,
        passages=found.passages if found else None,
        repeated_passages=found.repeated if found else 0,
        skipped=left_out,
        topk=topk,
        findings=tuple(findings),
    )
    return judged, _examples(sources, rows)


class _Stems(dict[str, str]):
    """Word -> its stem; "" for a stop word."""

    def __missing__(self, word: str) -> str:
        self[word] = root = one_a_script(language_in_force()).stem(word) if len(word) > 1 else word
        return root

    def of(self, text: str) -> tuple[str, ...]:
        """A key that is equal for texts differing only in word order, inflection and stop words; empty for a single word."""
        language = language_in_force()
        split = words(text).split() if language == ENGLISH else one_a_script(language).split(text)
        found = sorted({root for word in split if (root := self[word])})
        return tuple(found) if len(found) > 1 else ()


def _find_unsayable(rows: Sequence[_Row], tokenizer: Any, most: int) -> None:
    countable = [[a for a in row.question.answers if normalize_answer(a)] for row in rows]
    unique = list(dict.fromkeys(answer for answers in countable for answer in answers))
    fault: dict[str, str] = {}
    if tokenizer is not None and unique:
        with tokenizing(tokenizer):
            encoded = tokenizer(unique, add_special_tokens=False)["input_ids"]
        for answer, ids in zip(unique, encoded, strict=True):
            if len(ids) >= most:  # the closing tag needs a token too
                fault[answer] = f"takes {len(ids)} tokens, and max_action_tokens is {most}"
            elif normalize_answer(tokenizer.decode(ids, skip_special_tokens=True)) != normalize_answer(answer):
                fault[answer] = "has characters that the tokenizer cannot write"
    for row, answers in zip(rows, countable, strict=True):
        if not row.question.answers:
            continue
        if not answers:
            row.problems["unsayable"] = "exact match strips it entirely"
        elif all(answer in fault for answer in answers):
            row.problems["unsayable"] = f"{answers[0]!r} {fault[answers[0]]}"


def _find_conflicts(rows: Sequence[_Row]) -> None:
    """Find equal questions without a common answer."""
    first: dict[str, list[tuple[_Row, set[str]]]] = defaultdict(list)
    for row in rows:
        own = set(map(normalize_answer, row.question.answers))
        for other, answers in first[row.key]:
            if own != answers and not own & answers:
                row.problems.setdefault("conflict", f"{other.where or other.question.id}: {_answers(other)}")
                other.problems.setdefault("conflict", f"{row.where or row.question.id}: {_answers(row)}")
        first[row.key].append((row, own))


def _answers(row: _Row) -> str:
    return " | ".join(row.question.answers) or "unanswerable"


def _find_leaks(rows: Sequence[_Row]) -> None:
    evaluated = [row for row in rows if row.source.role == "eval"]
    trained = [row for row in rows if row.source.role == "train"]
    for some, others in ((trained, evaluated), (evaluated, trained)):
        keys, nears = {row.key: row for row in others}, {row.near: row for row in others}
        for row in some:
            if twin := keys.get(row.key):
                row.problems["leak"] = _named(twin)
            elif row.near and (twin := nears.get(row.near)):
                row.problems["near leak"] = _named(twin)


def _find_repeats(rows: Sequence[_Row]) -> None:
    keys: dict[tuple[str, Any], _Row] = {}
    for row in rows:
        place = row.source.role if row.source.role == "train" else f"eval {row.source.name}"
        twin, near = keys.setdefault((place, row.key), row), keys.setdefault((place, row.near), row)
        if twin is not row:
            row.problems["repeat"] = _named(twin)
        elif row.near and near is not row:
            row.problems["near repeat"] = _named(near)


def _named(row: _Row) -> str:
    return f"{row.where or row.question.id}: {row.question.text}"


def _place(rows: Sequence[_Row], found: Reached) -> None:
    for row, own in zip(rows, found.by_question, strict=True):
        row.reach = own
        if own is None:
            continue
        if not own.passages:
            row.problems["out of reach"] = ""
        elif own.passages > COMMON * found.passages:
            row.problems["common"] = f"{own.passages} of {found.passages} passages"
        if own.passages and (own.rank is None or own.rank > max(_DEPTHS)):
            row.problems["far"] = f"rank {own.rank}" if own.rank else "no word in common"


def _figures(name: str, role: Role, sources: Sequence[Source], rows: Sequence[_Row], depths: Sequence[int]) -> FileAudit:
    own = [row.reach for row in rows if row.reach]
    held = [r for r in own if r.passages]
    ranks = [r.rank for r in held if r.rank]
    count = {problem: sum(problem in row.problems for row in rows) for problem in PROBLEMS}
    return FileAudit(
        name=name,
        role=role,
        questions=len(rows),
        yes_no=sum(is_yes_no(row.question) for row in rows),
        unanswerable=sum(row.question.unanswerable for row in rows),
        in_corpus=len(held) / len(own) if own else None,
        in_top={k: sum(rank <= k for rank in ranks) / len(own) for k in depths} if own else {},
        rank=median(ranks) if ranks else None,
        passages=median(r.passages for r in held) if held else None,
        common=count["common"],
        out_of_reach=sum("out of reach" in row.problems or "unsayable" in row.problems for row in rows),
        refused=sum(len(source.refused) for source in sources),
        unsayable=count["unsayable"],
        conflicts=count["conflict"],
        leaks=count["leak"],
        near_leaks=count["near leak"],
        repeats=count["repeat"],
        near_repeats=count["near repeat"],
    )


def _examples(sources: Sequence[Source], rows: Sequence[_Row]) -> list[Example]:
    made = [Example(problem="refused", file=s.name, where=where, detail=d) for s in sources for where, d in s.refused]
    for problem in PROBLEMS:
        made += [
            Example(
                problem=problem, file=row.source.name, where=row.where, id=row.question.id, question=row.question.text,
                answers=_answers(row), detail=row.problems[problem],
            )
            for row in rows
            if problem in row.problems
        ]  # fmt: skip
    return made


def write_examples(examples: Sequence[Example], path: Path) -> None:
    """Write a CSV with one line per problem and question."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(Example.model_fields))
        writer.writeheader()
        writer.writerows(example.model_dump() for example in examples)
    partial.replace(path)
