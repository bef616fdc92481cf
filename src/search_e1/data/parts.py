"""Question files to be written: removes duplicates and leaks, splits, and cuts to size."""

import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

from search_e1.data.answers import normalize_answer
from search_e1.data.questions import Loaded
from search_e1.errors import ConfigError, DataError
from search_e1.runs import sha256_text
from search_e1.types import Question

Role = Literal["train", "eval"]
Duplicates = Literal["keep", "drop", "refuse"]
EXAMPLES = 5


class Row(NamedTuple):
    """A question, its location, and the key that it shares with its other wordings."""

    where: str
    question: Question
    key: str


class Again(NamedTuple):
    """A repeated question."""

    where: str
    first: str
    question: str


@dataclass(frozen=True, slots=True)
class Part:
    """A file to be written, and its source."""

    name: str
    split: str
    role: Role
    loaded: Loaded
    rows: list[Row]
    users: bool = False
    """Whether it comes from a user's own file, not a benchmark."""
    repeated: tuple[Again, ...] = ()
    """Repeated questions."""
    leaked: int = 0
    """Number of training questions that are also evaluation questions."""

    @property
    def file(self) -> str:
        return f"{self.name}.{self.split}.jsonl"


@dataclass(frozen=True, slots=True)
class Leak:
    """Training questions of one file that are also evaluation questions of another."""

    train: str
    eval: str
    count: int
    examples: tuple[Again, ...]
    """``where`` is the location in training, ``first`` in evaluation."""


def question_key(text: str) -> str:
    """A key shared by all wordings that differ only in compatibility forms, case, punctuation, articles and white space."""
    plain = unicodedata.normalize("NFKC", text).casefold().translate(_punctuation())
    return normalize_answer(plain) or text


@cache
def _punctuation() -> dict[int, None]:
    """A table for ``str.translate`` that removes the punctuation of all scripts."""
    return {i: None for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)).startswith("P")}


def unique_answers(answers: Sequence[str]) -> tuple[str, ...]:
    """The answers in order, without those that are the same as an earlier one under exact match."""
    first: dict[str, str] = {}
    for answer in answers:
        first.setdefault(normalize_answer(answer) or answer, answer)
    return tuple(first.values())


def without_duplicates(parts: Sequence[Part], duplicates: Duplicates) -> list[Part]:
    """Handle duplicates across all training files together, and within each evaluation file.

    Raises:
        DataError: an id is repeated, or a question, if ``duplicates`` is "refuse".
    """
    done: list[Part] = []
    train_ids: dict[str, Row] = {}
    train_keys: dict[str, Row] = {}
    for part in parts:
        ids, keys = (train_ids, train_keys) if part.role == "train" else ({}, {})
        rows, repeated = [], []
        for row in part.rows:
            namesake, twin = ids.setdefault(row.question.id, row), keys.setdefault(row.key, row)
            if namesake is not row and (duplicates != "drop" or namesake.key != row.key):
                mend = "--column id= makes ids" if namesake.key != row.key else "--duplicates drop keeps the first"
                raise DataError(f"{row.where}: id {row.question.id!r} was used at {namesake.where}; {mend}")
            if twin is not row:
                repeated.append(Again(row.where, twin.where, row.question.text))
                if duplicates == "refuse":
                    asked = f"{row.question.text!r} was already asked at {twin.where}"
                    raise DataError(f"{row.where}: {asked}; --duplicates drop keeps the first")
            if twin is row or duplicates == "keep":
                rows.append(row)
        done.append(replace(part, rows=rows, repeated=tuple(repeated)))
    return done


def with_dev(parts: Sequence[Part], share: float, seed: int) -> list[Part]:
    """Split a dev share off each of the user's training files; all wordings of a question stay together.

    Raises:
        ConfigError: there is no training file of the user's own.
        DataError: a file has too few questions to split.
    """
    if not any(part.users and part.role == "train" for part in parts):
        raise ConfigError("--dev-share splits users' own training files; give one with --train FILE")
    done: list[Part] = []
    for part in parts:
        if not (part.users and part.role == "train"):
            done.append(part)
            continue
        wanted, dev = round(share * len(part.rows)), set[str]()
        for key, times in sorted(Counter(row.key for row in part.rows).items(), key=lambda item: _rank(seed, item[0])):
            if wanted <= 0:
                break
            dev.add(key)
            wanted -= times
        aside, left = ([row for row in part.rows if (row.key in dev) is side] for side in (True, False))
        if not (aside and left):
            raise DataError(
                f"{part.loaded.source}: {len(part.rows)} questions cannot be split with --dev-share {share}; give "
                "more questions, another share, or files of your own with --eval"
            )
        done += [replace(part, rows=left), replace(part, split="dev", role="eval", rows=aside, repeated=())]
    return done


def find_leaks(parts: Sequence[Part], drop: bool) -> tuple[list[Part], list[Leak]]:
    """Find training questions that are also evaluation questions, and remove them if ``drop``; call before subsampling."""
    evaluated = [(part.file, {row.key: row for row in part.rows}) for part in parts if part.role == "eval"]
    done: list[Part] = []
    leaks: list[Leak] = []
    for part in parts:
        if part.role == "eval":
            done.append(part)
            continue
        for file, keys in evaluated:
            found = [Again(row.where, keys[row.key].where, row.question.text) for row in part.rows if row.key in keys]
            if found:
                leaks.append(Leak(part.file, file, len(found), tuple(found[:EXAMPLES])))
        clean = [row for row in part.rows if not any(row.key in keys for _, keys in evaluated)]
        done.append(replace(part, rows=clean if drop else part.rows, leaked=len(part.rows) - len(clean)))
    return done, leaks


def cut(part: Part, n: int | None, seed: int) -> Part:
    """At most ``n`` questions in their original order; the choice depends on the seed, not on the order."""
    if n is None or n >= len(part.rows):
        return part
    ranked = sorted(part.rows, key=lambda row: (_rank(seed, row.key), row.question.id))
    chosen = {row.question.id for row in ranked[:n]}
    return replace(part, rows=[row for row in part.rows if row.question.id in chosen])


def _rank(seed: int, key: str) -> str:
    return sha256_text(f"{seed}/{key}")
