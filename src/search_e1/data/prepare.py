"""``search-e1 data prepare``: reads question files, checks them against each other, and writes them with a manifest."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from search_e1 import runs
from search_e1.data import benchmarks, user_files
from search_e1.data.answers import normalize_answer
from search_e1.data.lines import write_lines
from search_e1.data.parts import (
    EXAMPLES,
    Duplicates,
    Leak,
    Part,
    Role,
    Row,
    cut,
    find_leaks,
    question_key,
    unique_answers,
    with_dev,
    without_duplicates,
)  # fmt: skip
from search_e1.data.questions import Loaded, to_record
from search_e1.data.user_files import Columns
from search_e1.errors import ConfigError, DataError, RunError

STAGE = "data"


@dataclass(frozen=True, slots=True)
class Request:
    """Sources and options. A source is ``BENCHMARK[:SPLIT]``, ``all[:SPLIT]`` or ``[NAME=]FILE``."""

    train: tuple[str, ...] = ()
    eval: tuple[str, ...] = ()
    directory: Path | None = None
    """Directory with the benchmarks' files; ``None``: the Hub."""
    revision: str | None = None
    """Commit, branch or tag of the Hub's repository."""
    columns: Columns = field(default_factory=Columns)
    duplicates: Duplicates = "keep"
    """How to handle duplicates across training files, and within each evaluation file."""
    keep_unanswerable: bool = False
    """Keep questions of users' files that have no answer or are marked unanswerable."""
    drop_leaks: bool = False
    """Remove training questions that are also evaluation questions."""
    dev_share: float | None = None
    """Share of each of the user's training files to split off for evaluation."""
    max_train: int | None = None
    max_eval: int | None = None
    """Maximum number of questions per file."""
    seed: int = 0


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
                "repeated_examples": [again._asdict() for again in part.repeated[:EXAMPLES]],
                "leaked": part.leaked,
                "answers": sum(len(row.question.answers) for row in part.rows),
            }
            for part in self.parts
        }
        return {
            "files": files,
            "leaks": [{**asdict(leak), "examples": [again._asdict() for again in leak.examples]} for leak in self.leaks],
            "warnings": self.warnings,
        }


def prepare(request: Request) -> Prepared:
    """Read all sources and build the files to write.

    Raises:
        ConfigError: an unusable source or option.
        DataError: a file cannot be read, a line is not a question, a duplicate is refused, or no question is left.
    """
    parts = _load(request)
    warnings = [warning for part in parts for warning in _warnings(part)]
    parts = without_duplicates(parts, request.duplicates)
    if request.dev_share is not None:
        parts = with_dev(parts, request.dev_share, request.seed)
        _refuse_same_file(parts)
    parts, leaks = find_leaks(parts, request.drop_leaks)
    parts = [cut(part, request.max_train if part.role == "train" else request.max_eval, request.seed) for part in parts]
    for part in parts:
        if not part.rows:
            raise DataError(
                f"{part.loaded.source}: nothing is left for {part.file} ({len(part.repeated)} repeated, {part.leaked} leaked); "
                "keep them, or leave the file out"
            )
    return Prepared(parts, leaks, warnings)


def write(prepared: Prepared, request: Request, out: Path, *, overwrite: bool = False) -> runs.Artifact:
    """Write the files and their manifest to the directory ``out``, atomically.

    Raises:
        RunError: ``out`` exists and ``overwrite`` is not set, or it contains anything but prepared questions.
    """
    check_out(out, overwrite=overwrite)
    new = out = out.resolve()
    if out.exists():
        new = out.with_name(f".{out.name}.new")
        shutil.rmtree(new, ignore_errors=True)  # left by an interrupted call

    def make(directory: Path) -> Mapping[str, Any]:
        for part in prepared.parts:
            write_lines(directory / part.file, (to_record(row.question) for row in part.rows))
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
        raise RunError(f"{out}: cannot be written ({error.strerror or error}); give another --out") from None
    return runs.Artifact(out, made.manifest)


def check_out(out: Path, *, overwrite: bool) -> None:
    """Check the output directory before anything is read.

    Raises:
        RunError: as ``write``.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise RunError(f"{out} exists; --overwrite replaces it, or give another --out")
    try:
        stage = runs.Manifest.model_validate_json((out / runs.MANIFEST).read_text()).stage
    except (OSError, ValueError):
        stage = None
    if stage != STAGE or out.is_symlink():
        raise RunError(f"{out} holds something other than prepared questions and is not overwritten; give another --out")


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


def _load(request: Request) -> list[Part]:
    parts: list[Part] = []
    for role in ("train", "eval"):
        for text in getattr(request, role):
            parts += _resolve(text, role, request)
    if not parts:
        raise ConfigError("nothing to prepare; give --train or --eval")
    _refuse_same_file(parts)
    return parts


def _refuse_same_file(parts: Sequence[Part]) -> None:
    files = [part.file for part in parts]
    if twice := next((file for file in files if files.count(file) > 1), None):
        raise ConfigError(f"{twice} would be written twice; give each source a name of its own, e.g. --eval other=FILE")


def _resolve(text: str, role: Role, request: Request) -> list[Part]:
    name, equals, file = text.partition("=")
    if equals or text.lower().endswith(user_files.SUFFIXES) or "/" in text or Path(text).suffix or Path(text).is_file():
        path = Path(file if equals else text)
        name = name if equals else user_files.benchmark_name(path)
        if not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"{text}: {name!r} cannot be a name; use letters, digits, - and _")
        loaded = user_files.load(path, name, request.columns, keep_unanswerable=request.keep_unanswerable)
        return [_part(name, "train" if role == "train" else "test", role, loaded, users=True)]
    name, _, split = text.partition(":")
    if name.lower() != "all":
        chosen = benchmarks.find(name)
        return [_benchmark(chosen, split or _split(chosen, role, request.directory), role, request)]
    chosen_splits = {
        benchmark: split or _split(benchmark, role, request.directory, needed=False) for benchmark in benchmarks.BENCHMARKS
    }
    chosen_splits = {b: s for b, s in chosen_splits.items() if s and s in benchmarks.splits(b, request.directory)}
    if not chosen_splits:
        raise DataError(f"{request.directory or benchmarks.REPOSITORY}: no benchmark has {text!r}; give a split that it has")
    return [_benchmark(benchmark, chosen, role, request) for benchmark, chosen in chosen_splits.items()]


def _split(benchmark: str, role: Role, directory: Path | None, *, needed: bool = True) -> str:
    """The default split for ``role``: train for training, test or else dev for evaluation.

    Returns "" if the benchmark has none and it is not ``needed``.
    """
    present = benchmarks.splits(benchmark, directory)
    for split in ("train",) if role == "train" else ("test", "dev"):
        if split in present:
            return split
    if not needed:
        return ""
    wanted = "train split" if role == "train" else "test or dev split"
    has = f"it has {', '.join(present)}: write --{role} {benchmark}:{present[0]}" if present else "it has none"
    raise DataError(f"{directory or benchmarks.REPOSITORY}: no {wanted} of {benchmark}; {has}")


def _benchmark(name: str, split: str, role: Role, request: Request) -> Part:
    return _part(name, split, role, benchmarks.load(name, split, request.directory, request.revision))


def _part(name: str, split: str, role: Role, loaded: Loaded, *, users: bool = False) -> Part:
    rows = [
        Row(where, q.model_copy(update={"answers": unique_answers(q.answers)}), question_key(q.text))
        for where, q in loaded.questions
    ]
    return Part(name, split, role, loaded, rows, users)


def _warnings(part: Part) -> list[str]:
    expected, found = part.loaded.expected, len(part.loaded.questions)
    warnings = [f"{part.file}: {note}" for note in part.loaded.notes]
    if expected not in (None, found):
        warnings.append(
            f"{part.loaded.source} has {found} questions, but {expected} were expected: figures may not be comparable"
        )
    empty = [(row.where, answer) for row in part.rows for answer in row.question.answers if not normalize_answer(answer)]
    if empty:
        where, answer = empty[0]
        warnings.append(
            f"{part.file}: {len(empty)} answers are only punctuation and articles ({where}: {answer!r}), which exact match "
            "strips entirely: no answer matches them"
        )
    return warnings


def _quoted(text: Path | str) -> str:
    return json.dumps(str(text), ensure_ascii=False)
