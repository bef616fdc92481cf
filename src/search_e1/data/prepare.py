"""Question files made ready for a run: read, cleaned, held against one another, cut to size, written with a manifest."""

import hashlib
import json
import shutil
import sys
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from search_e1 import runs
from search_e1.data import benchmarks, user_files
from search_e1.data.answers import normalize_answer
from search_e1.data.questions import Loaded, to_record
from search_e1.data.user_files import Columns
from search_e1.errors import ConfigError, DataError, RunError
from search_e1.types import Question

STAGE = "data"
Role = Literal["train", "eval"]
Duplicates = Literal["keep", "drop", "refuse"]
_EXAMPLES = 5


class Row(NamedTuple):
    """A question, where it stands, and what it shares with other wordings of itself."""

    where: str
    question: Question
    key: str


class Again(NamedTuple):
    """A question that was there before."""

    where: str
    first: str
    question: str


@dataclass(frozen=True, slots=True)
class Request:
    """What to prepare. A source is ``BENCHMARK[:SPLIT]``, ``all[:SPLIT]`` or ``[NAME=]FILE``."""

    train: tuple[str, ...] = ()
    eval: tuple[str, ...] = ()
    directory: Path | None = None
    """Where the benchmarks' files are; ``None``: on the Hub."""
    revision: str | None = None
    """Commit, branch or tag of the Hub's repository."""
    columns: Columns = field(default_factory=Columns)
    duplicates: Duplicates = "keep"
    """What becomes of a question that comes again, in the training files together or in one evaluation file."""
    drop_leaks: bool = False
    """Take training questions that are evaluation questions too out of training."""
    dev_share: float | None = None
    """Share of each user's training file that is set aside for evaluation."""
    max_train: int | None = None
    max_eval: int | None = None
    """Most questions of one file."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """One file to be written, and what it came from."""

    name: str
    split: str
    role: Role
    loaded: Loaded
    rows: list[Row]
    users: bool = False
    """Whether it is a user's file and no benchmark."""
    repeated: tuple[Again, ...] = ()
    """Questions that had come before."""
    leaked: int = 0
    """Training questions that are evaluation questions too."""

    @property
    def file(self) -> str:
        return f"{self.name}.{self.split}.jsonl"


@dataclass(frozen=True, slots=True)
class Leak:
    """Training questions of one file that are evaluation questions of another."""

    train: str
    eval: str
    count: int
    examples: tuple[Again, ...]
    """``where`` is in training, ``first`` in evaluation."""


@dataclass(frozen=True, slots=True)
class Prepared:
    parts: list[Part]
    leaks: list[Leak] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Counts for the manifest."""
        files = {
            part.file: {
                "role": part.role,
                "source": part.loaded.source,
                "read": len(part.loaded.questions),
                "questions": len(part.rows),
                "repeated": len(part.repeated),
                "repeated_examples": [again._asdict() for again in part.repeated[:_EXAMPLES]],
                "leaked": part.leaked,
                "answers": sum(len(row.question.answers) for row in part.rows),
            }
            for part in self.parts
        }
        return {
            "files": files,
            "leaks": [
                {**asdict(leak), "examples": [again._asdict() for again in leak.examples]} for leak in self.leaks
            ],
            "warnings": self.warnings,
        }


def prepare(request: Request) -> Prepared:
    """Read all sources and make of them the files to write.

    Raises:
        ConfigError: a source or an option that cannot be used.
        DataError: a file that cannot be read or a line that is no question; a duplicate that is refused; nothing left.
    """
    parts = _load(request)
    warnings = [warning for part in parts for warning in _size_warnings(part)]
    parts = _without_duplicates(parts, request.duplicates)
    if request.dev_share is not None:
        parts = _with_dev(parts, request.dev_share, request.seed)
    parts, leaks = _leaks(parts, request.drop_leaks)
    parts = [
        _cut(part, request.max_train if part.role == "train" else request.max_eval, request.seed) for part in parts
    ]
    for part in parts:
        if not part.rows:
            raise DataError(
                f"{part.loaded.source}: nothing is left for {part.file} ({len(part.repeated)} repeated, {part.leaked} leaked); "
                "keep them, or leave the file out"
            )
    return Prepared(parts, leaks, warnings)


def write(prepared: Prepared, request: Request, out: Path, *, overwrite: bool = False) -> runs.Artifact:
    """Write the files and their manifest to the directory ``out``, whole or not at all.

    Raises:
        RunError: ``out`` is there already and ``overwrite`` is not set, or it holds something else than prepared questions.
    """
    check_out(out, overwrite=overwrite)
    new = out = out.resolve()
    if out.exists():
        new = out.with_name(f".{out.name}.new")
        shutil.rmtree(new, ignore_errors=True)  # of a call that was killed

    def make(directory: Path) -> Mapping[str, Any]:
        for part in prepared.parts:
            with (directory / part.file).open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(to_record(row.question), ensure_ascii=False) + "\n" for row in part.rows)
        return prepared.summary()

    try:
        made = runs.artifact(
            new,
            stage=STAGE,
            settings=asdict(request),
            inputs={part.loaded.source: part.loaded.checksum for part in prepared.parts},
            seed=request.seed,
            make=make,
        )
        if new == out:
            return made
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        new.rename(out)
        shutil.rmtree(old)
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error.strerror or error}); give another --out") from error
    return runs.Artifact(out, made.manifest)


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse a place that must not be written to, before anything is read.

    Raises:
        RunError: as ``write``.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise RunError(f"{out} is there already; --overwrite replaces it, or give another --out")
    try:
        stage = runs.Manifest.model_validate_json((out / runs.MANIFEST).read_text()).stage
    except (OSError, ValueError):
        stage = None
    if stage != STAGE or out.is_symlink():
        raise RunError(f"{out} holds something else than prepared questions and is not overwritten; give another --out")


def config_snippet(prepared: Prepared, out: Path) -> str:
    """The ``[data]`` section of a config that uses the files in ``out``, as TOML."""
    train = [part for part in prepared.parts if part.role == "train"]
    evaluated = [part for part in prepared.parts if part.role == "eval"]
    lines = ["train = [", *(f"    {_quoted(out / part.file)}," for part in train), "]"] if train else []
    if evaluated:
        lines += ["", "[data.eval]"] if train else ["[data.eval]"]
    keys: set[str] = set()
    for part in evaluated:
        key = f"{part.name}-{part.split}" if part.name in keys else part.name
        keys.add(key)
        lines.append(f"{key if key.isascii() else _quoted(key)} = {_quoted(out / part.file)}")
    return "\n".join(["[data]", *lines] if train else lines) + "\n"


def question_key(text: str) -> str:
    """What two wordings of one question share: compatibility forms, case, punctuation, articles and white space aside."""
    plain = unicodedata.normalize("NFKC", text).casefold().translate(_punctuation())
    return normalize_answer(plain) or text


@cache
def _punctuation() -> dict[int, None]:
    """Of all scripts, as ``str.translate`` takes it to remove it."""
    return {i: None for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)).startswith("P")}


def unique_answers(answers: Sequence[str]) -> tuple[str, ...]:
    """The answers without those that exact match cannot tell from an earlier one, in their order."""
    first: dict[str, str] = {}
    for answer in answers:
        first.setdefault(normalize_answer(answer) or answer, answer)
    return tuple(first.values())


# Sources


def _load(request: Request) -> list[Part]:
    parts: list[Part] = []
    for role in ("train", "eval"):
        for text in getattr(request, role):
            parts += _resolve(text, role, request)
    if not parts:
        raise ConfigError("nothing to prepare; give --train or --eval")
    files = [part.file for part in parts]
    twice = next((file for file in files if files.count(file) > 1), None)
    if twice:
        raise ConfigError(f"{twice} would be written twice; give each source a name of its own, e.g. --eval other=FILE")
    return parts


def _resolve(text: str, role: Role, request: Request) -> list[Part]:
    name, equals, file = text.partition("=")
    if equals or text.lower().endswith(user_files.SUFFIXES) or "/" in text or Path(text).is_file():
        path = Path(file if equals else text)
        name = name if equals else user_files.benchmark_name(path)
        if not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"{text}: {name!r} cannot be a name; use letters, digits, - and _")
        loaded = user_files.load(path, name, request.columns)
        return [_part(name, "train" if role == "train" else "test", role, loaded, users=True)]
    name, _, split = text.partition(":")
    if name.lower() != "all":
        chosen = benchmarks.find(name)
        return [_benchmark(chosen, split or _split(chosen, role, request.directory), role, request)]
    there = {
        benchmark: split or _split(benchmark, role, request.directory, needed=False)
        for benchmark in benchmarks.BENCHMARKS
    }
    there = {b: s for b, s in there.items() if s and s in benchmarks.splits(b, request.directory)}
    if not there:
        raise DataError(
            f"{request.directory or benchmarks.REPOSITORY}: no benchmark has {text!r}; give a split that it has"
        )
    return [_benchmark(benchmark, chosen, role, request) for benchmark, chosen in there.items()]


def _split(benchmark: str, role: Role, directory: Path | None, *, needed: bool = True) -> str:
    """Where training questions and where evaluation questions come from if nothing is said."""
    there = benchmarks.splits(benchmark, directory)
    for split in ("train",) if role == "train" else ("test", "dev"):
        if split in there:
            return split
    if not needed:
        return ""
    wanted = "train split" if role == "train" else "test or dev split"
    has = f"it has {', '.join(there)}: write --{role} {benchmark}:{there[0]}" if there else "it has nothing of it"
    raise DataError(f"{directory or benchmarks.REPOSITORY}: no {wanted} of {benchmark}; {has}")


def _benchmark(name: str, split: str, role: Role, request: Request) -> Part:
    return _part(name, split, role, benchmarks.load(name, split, request.directory, request.revision))


def _part(name: str, split: str, role: Role, loaded: Loaded, *, users: bool = False) -> Part:
    rows = [
        Row(where, q.model_copy(update={"answers": unique_answers(q.answers)}), question_key(q.text))
        for where, q in loaded.questions
    ]
    return Part(name, split, role, loaded, rows, users)


def _size_warnings(part: Part) -> list[str]:
    expected, found = part.loaded.expected, len(part.loaded.questions)
    if expected in (None, found):
        return []
    return [f"{part.loaded.source} has {found} questions, and {expected} are known of it: figures may not compare"]


# Duplicates, leaks, subsets


def _without_duplicates(parts: Sequence[Part], duplicates: Duplicates) -> list[Part]:
    """A question comes again if the training files together, or one evaluation file, had it before."""
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
                    asked = f"{row.question.text!r} was asked at {twin.where}"
                    raise DataError(f"{row.where}: {asked}; --duplicates drop keeps the first")
            if twin is row or duplicates == "keep":
                rows.append(row)
        done.append(replace(part, rows=rows, repeated=tuple(repeated)))
    return done


def _with_dev(parts: Sequence[Part], share: float, seed: int) -> list[Part]:
    """Set a share of each user's training file aside; all wordings of one question go to the same side."""
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
                f"{part.loaded.source}: {len(part.rows)} questions cannot be split with --dev-share {share}"
            )
        done += [replace(part, rows=left), replace(part, split="dev", role="eval", rows=aside, repeated=())]
    return done


def _leaks(parts: Sequence[Part], drop: bool) -> tuple[list[Part], list[Leak]]:
    """Training questions that are evaluation questions too, found before any subset is drawn."""
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
                leaks.append(Leak(part.file, file, len(found), tuple(found[:_EXAMPLES])))
        clean = [row for row in part.rows if not any(row.key in keys for _, keys in evaluated)]
        done.append(replace(part, rows=clean if drop else part.rows, leaked=len(part.rows) - len(clean)))
    return done, leaks


def _cut(part: Part, n: int | None, seed: int) -> Part:
    """At most ``n`` questions: the same ones for a seed whatever their order in the file, and in that order."""
    if n is None or n >= len(part.rows):
        return part
    ranked = sorted(part.rows, key=lambda row: (_rank(seed, row.key), row.question.id))
    chosen = {row.question.id for row in ranked[:n]}
    return replace(part, rows=[row for row in part.rows if row.question.id in chosen])


def _rank(seed: int, key: str) -> str:
    return hashlib.sha256(f"{seed}/{key}".encode()).hexdigest()


def _quoted(text: Path | str) -> str:
    return json.dumps(str(text), ensure_ascii=False)
