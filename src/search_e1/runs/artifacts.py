"""The run directory: one artifact per stage, complete or absent.

An artifact is a directory with a ``manifest.json`` that records what it was made from (stage, settings, checksums of its
inputs, seed), its files (checksums), package versions and times. It is made next to its final path and moved there as a whole,
so that a directory under its final name is complete. Requesting a complete artifact again returns it; requesting it with other
settings or inputs is refused.
"""

import json
import logging
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from search_e1.errors import RunError
from search_e1.runs import cpu, locks, ranks
from search_e1.runs.drift import Change, Defaults, changes, lines, no_defaults
from search_e1.runs.files import SUM, read_summed, sha256, sha256_text, sync, write_atomically, write_summed
from search_e1.runs.safe import inside, masked
from search_e1.types import Record

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WORK = ".work"
"""Directory in an unfinished artifact: what its stage needs to resume. Removed when the artifact is complete."""
JOURNAL = ".journal"
"""Suffix of a file in ``WORK``: the file of that name beside ``WORK`` is unfinished, and the stage can resume it."""
_BEGUN = "begun.json"
ORIGIN = "branch.json"
"""File in the directory of a run that branched off another; names that run."""
SHARED = "shared.json"
"""File in the directory of a run that shares artifacts with others; names the directory of the shared artifacts."""
_PACKAGES = (
    "search-e1",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bm25s",
    "datasets",
    "tokenizers",
    "numpy",
)


class Manifest(Record):
    """The content of ``manifest.json``."""

    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    """Input name -> checksum."""
    seed: int
    files: dict[str, str]
    """Path inside the artifact -> sha256."""
    result: dict[str, Any]
    """The summary figures that the stage returned."""
    versions: dict[str, str]
    started: float
    """Seconds since the epoch."""
    seconds: float
    """Wall-clock time of the stage, over all attempts."""
    cpu_seconds: float = 0.0
    """CPU time of the process, with all threads and child processes. Attempts that were killed are not counted."""
    attempts: int = 1
    """Number of times that the stage was started or resumed until it was complete."""
    gpus: int = 0
    """Accelerators that the stage held, over all ranks."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A complete artifact."""

    path: Path
    manifest: Manifest

    @property
    def checksum(self) -> str:
        """Checksum of the content alone: artifacts with the same files have the same checksum."""
        return sha256_text(json.dumps(self.manifest.files, sort_keys=True))


Make = Callable[[Path], Mapping[str, Any]]


def artifact(
    path: Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    seed: int,
    make: Make,
    gpus: int = 0,
    defaults: Defaults = no_defaults,
    parallel: bool = False,
) -> Artifact:
    """The artifact at ``path``: the one on disk if it is complete, else made by ``make``. All ranks call this.

    Rank 0 decides. If the artifact has to be made, all ranks call ``make`` if it is ``parallel``, else rank 0 alone. Rank 0
    completes the artifact.

    ``make`` writes its files into the directory it is given and returns its summary figures (JSON). After a kill, it finds
    what it kept in ``WORK`` there, provided that settings, inputs and versions are the same. A setting that the artifact lacks
    and that now has its default (``defaults``) counts as the same. ``gpus`` is only recorded.

    Raises:
        RunError: a different artifact is at ``path``, or its files are damaged.
    """
    if not ranks.is_first():
        return _follow(path, make, parallel)
    identity = masked(json.loads(json.dumps({"settings": settings, "inputs": inputs, "seed": seed}, default=str)))
    with _in_turn(path, stage, identity) as shared:
        if not path.exists():
            _take_over(path, identity, defaults, shared)
        if path.exists():
            found = read(path)
            if different := _different(found.manifest, identity, defaults):
                raise RunError(
                    f"{path} was made from other settings or inputs; restore them, or use another run directory, or continue "
                    f"in one that keeps what is unaffected (search-e1 train --branch DIR):{lines(different)}"
                )
            shutil.rmtree(path / WORK, ignore_errors=True)  # left by a kill between the last two lines of `_make`
            ranks.broadcast_object(None)
        else:
            found = _make(path, stage, identity, defaults, make, gpus, parallel)
        if shared and not shared.exists():
            _link(found, shared)
    ranks.broadcast_object(found.manifest)
    return found


def _follow(path: Path, make: Make, parallel: bool) -> Artifact:
    """``artifact`` on the ranks other than 0, which follow rank 0's decision."""
    partial: Path | None = ranks.broadcast_object(None)
    if partial and parallel:
        used = cpu.seconds()
        make(partial)
        ranks.total(cpu.seconds() - used)
    manifest: Any = ranks.broadcast_object(None)
    return Artifact(path, manifest)


def _make(
    path: Path, stage: str, identity: dict[str, Any], defaults: Defaults, make: Make, gpus: int, parallel: bool
) -> Artifact:
    partial = path.with_name(f".{path.name}.partial")
    here = versions()
    begun, clock, used = _begin(partial, {**identity, "versions": here}, defaults), time.perf_counter(), cpu.seconds()
    try:
        ranks.broadcast_object(partial)
        result = make(partial)
        used -= ranks.total(0.0) if parallel else 0.0  # add the other ranks' time: they are not child processes
    except BaseException:
        begun = begun.model_copy(update={"cpu_seconds": begun.cpu_seconds + cpu.seconds() - used})
        with suppress(OSError):
            write_atomically(partial / WORK / _BEGUN, begun.model_dump_json() + "\n")
        raise
    manifest = Manifest(
        stage=stage,
        files={str(f.relative_to(partial)): sha256(f) for f in _files(partial)},
        result=dict(result),
        versions=here,
        started=begun.started,
        seconds=round(begun.seconds + time.perf_counter() - clock, 3),
        cpu_seconds=round(begun.cpu_seconds + cpu.seconds() - used, 3),
        attempts=begun.attempts,
        gpus=gpus,
        **identity,
    )
    write_summed(partial / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    partial.rename(path)
    sync(path.parent)
    shutil.rmtree(path / WORK)
    return Artifact(path, manifest)


class _Begun(Record):
    """The state of an unfinished artifact."""

    identity: dict[str, Any]
    started: float
    """Start of the first attempt, in seconds since the epoch."""
    attempt: float
    """Start of the latest attempt, likewise."""
    attempts: int
    seconds: float
    """Wall-clock time of the attempts before the latest."""
    cpu_seconds: float = 0.0
    """CPU time of the earlier attempts that were not killed."""


def _begin(partial: Path, identity: dict[str, Any], defaults: Defaults) -> _Begun:
    """Start an artifact in ``partial``, or resume it; keeps only the files that its stage can resume from.

    An attempt with other settings is discarded with a warning.
    """
    now = time.time()
    before = _begun(partial)
    different = _changes_since_begun(before.identity, identity, defaults) if before else []
    if before and different:
        logger.warning("%s: begun with other settings or inputs; starting over:%s", partial.name.strip("."), lines(different))
    if before and not different:
        kept = {WORK, *(file.name.removesuffix(JOURNAL) for file in (partial / WORK).glob(f"*{JOURNAL}"))}
        # A killed attempt cannot record when it ended; its last write is the best estimate.
        last = max(file.stat().st_mtime for file in partial.rglob("*"))
        seconds = before.seconds + max(0.0, last - before.attempt)
        begun = before.model_copy(update={"attempt": now, "attempts": before.attempts + 1, "seconds": seconds})
    else:
        kept = set()
        begun = _Begun(identity=identity, started=now, attempt=now, attempts=1, seconds=0.0)
    for old in partial.iterdir() if partial.is_dir() else ():
        if old.name not in kept:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    (partial / WORK).mkdir(parents=True, exist_ok=True)
    write_atomically(partial / WORK / _BEGUN, begun.model_dump_json() + "\n")
    return begun


def _changes_since_begun(there: Mapping[str, Any], given: Mapping[str, Any], defaults: Defaults) -> list[Change]:
    """Changes from the unfinished artifact's identity to ``given``; ``defaults`` apply to settings only."""
    rest = [{key: value for key, value in identity.items() if key != "settings"} for identity in (there, given)]
    return changes(there["settings"], given["settings"], defaults) + changes(rest[0], rest[1])


def _begun(partial: Path) -> _Begun | None:
    try:
        return _Begun.model_validate_json((partial / WORK / _BEGUN).read_bytes())
    except (OSError, ValueError):
        return None


def _files(directory: Path) -> list[Path]:
    """The files of an artifact, without those in ``WORK``."""
    files = (file for file in sorted(directory.rglob("*")) if file.is_file())
    return [file for file in files if file.relative_to(directory).parts[0] != WORK]


def read(path: Path) -> Artifact:
    """The complete artifact at ``path``, every file checked against its checksum.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        manifest = Manifest.model_validate_json(read_summed(path / MANIFEST))
    except FileNotFoundError:
        raise RunError(f"{path}: no complete artifact; run the stage that makes it") from None
    except ValueError:
        raise RunError(f"{path / MANIFEST}: damaged; remove {path} and run the stage again") from None
    for name, checksum in manifest.files.items():
        file = inside(path, name)
        if file is None:
            raise RunError(f"{path / MANIFEST}: names the file {name!r}, which is not in {path}; do not use this artifact")
        if not file.is_file() or sha256(file) != checksum:
            raise RunError(f"{file}: {'damaged' if file.exists() else 'missing'}; remove {path} and run the stage again")
    return Artifact(path, manifest)


def _different(manifest: Manifest, identity: Mapping[str, Any], defaults: Defaults) -> list[Change]:
    """Changes from what the artifact was made from to ``identity``; ``defaults`` apply to settings only."""
    there = {"inputs": manifest.inputs, "seed": manifest.seed}
    rest = {"inputs": identity["inputs"], "seed": identity["seed"]}
    return changes(manifest.settings, identity["settings"], defaults) + changes(there, rest)


@contextmanager
def _in_turn(path: Path, stage: str, identity: Mapping[str, Any]) -> Iterator[Path | None]:
    """The shared path of this artifact, locked against other runs that make it; ``None`` if the run shares no artifacts."""
    try:
        place = Path(json.loads((path.parent / SHARED).read_text(encoding="utf-8"))["in"])
    except FileNotFoundError:
        yield None
        return
    except (ValueError, LookupError, TypeError):
        raise RunError(f"{path.parent / SHARED}: damaged; remove it and run the command that began the run again") from None
    key = {"stage": stage, **identity, "versions": versions()}
    shared = place / f"{stage}-{sha256_text(json.dumps(key, sort_keys=True))[:16]}"
    with locks.in_turn(place / f".{shared.name}.lock"):
        yield shared


def _take_over(path: Path, identity: Mapping[str, Any], defaults: Defaults, shared: Path | None = None) -> None:
    """Link to the files of the same artifact in ``shared`` or in a run that this one branched off, if there is one.

    Raises:
        RunError: that artifact is damaged.
    """
    places = [*([shared] if shared else []), *(run / path.name for run in _origins(path.parent))]
    found = next((there for there in places if there.exists()), None)
    if found is None or _different((source := read(found)).manifest, identity, defaults):
        return
    _link(source, path)
    shutil.rmtree(path.with_name(f".{path.name}.partial"), ignore_errors=True)  # from a killed attempt


def _link(source: Artifact, path: Path) -> None:
    """Put the artifact ``source`` at ``path`` too, by hard links or copies of its files."""
    partial = path.with_name(f".{path.name}.taken")
    shutil.rmtree(partial, ignore_errors=True)
    sums = [file.name for file in source.path.glob(f"*{SUM}")]
    for name in (*source.manifest.files, MANIFEST, *sums):
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            (partial / name).hardlink_to(source.path / name)
        except OSError:  # a different file system, or one without hard links
            shutil.copy2(source.path / name, partial / name)
    partial.rename(path)
    sync(path.parent)


def _origins(run: Path) -> Iterator[Path]:
    """The run that ``run`` branched off, then the run that that one branched off, and so on."""
    while (run / ORIGIN).exists():
        run = Path(json.loads((run / ORIGIN).read_text(encoding="utf-8"))["of"])
        yield run


def checksum(path: Path) -> str:
    """Checksum of a file, or of a directory's files and names, without documentation (``*.md``).

    Raises:
        RunError: ``path`` is a directory in an artifact, and damaged.
    """
    if path.is_file():
        return sha256(path)
    if (path.parent / (MANIFEST + SUM)).exists() and (path.parent / MANIFEST).exists():
        return _verified(path)
    files = {str(f.relative_to(path)): sha256(f) for f in sorted(path.rglob("*")) if f.is_file() and f.suffix != ".md"}
    return sha256_text(json.dumps(files))


def _verified(path: Path) -> str:
    """The checksum of a directory in an artifact. Each file is read once, both to verify and to compute it."""
    name = f"{path.name}/"
    found = {file.removeprefix(name): sum for file, sum in read(path.parent).manifest.files.items() if file.startswith(name)}
    return sha256_text(json.dumps({file: sum for file, sum in found.items() if not file.endswith(".md")}))


def derived_seed(seed: int, *names: object) -> int:
    """A separate seed for every stage, so that leaving one out does not change another."""
    return int(sha256_text("/".join(map(str, (seed, *names))))[:8], 16)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
