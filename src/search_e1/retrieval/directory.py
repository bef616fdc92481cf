"""The directory of an index, of whatever kind: built beside its place, resumed after a kill, complete under its name.

``manifest.json`` says what the index is, ``passages.*`` and ``offsets.npy`` are its passages, the rest is its kind's own.
"""

import errno
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from search_e1.errors import DataError, RunError
from search_e1.retrieval.passages import Passages
from search_e1.runs import read_summed, sha256, sync, write_atomically, write_summed
from search_e1.runs.progress import Progress, silent
from search_e1.runs.safe import inside
from search_e1.types import Passage, Record

FORMAT = 2
"""Version of the layout, common to all kinds; a directory of another one is refused."""
MANIFEST = "manifest.json"
_SETTINGS, _SCRATCH = "build.json", "scratch"
_AGAIN = "build it again with `search-e1 index build`"


class IndexManifest(Record):
    """What ``manifest.json`` holds."""

    kind: str
    """``bm25`` or ``dense``."""
    format: int
    passages: int
    corpus: str
    """sha256 of the passages as they are stored."""
    settings: dict[str, Any]
    """All that the answers depend on besides the passages; for an encoder, its checksum."""
    checksum: str
    """sha256 of kind, format, corpus and settings: of all that the answers depend on."""
    files: dict[str, int]
    """Path inside the directory -> bytes."""
    checksums: dict[str, str] = {}
    """Path inside the directory -> sha256; an index of an earlier version has none."""
    versions: dict[str, str]
    seconds: float
    """Wall-clock time of the building; where it was resumed, of the last run."""


class Building:
    """An index that is being built. Whatever lies in ``path`` is there again when an interrupted build is run again."""

    def __init__(self, directory: Path, path: Path) -> None:
        """See ``building``."""
        self.directory, self.path = directory, path
        self.scratch = path / _SCRATCH
        """For what only the building needs; it is no part of the finished index."""
        self.scratch.mkdir(exist_ok=True)
        self._clock = time.perf_counter()

    def passages(self, corpus: Iterable[Passage], progress: Progress = silent) -> Passages:
        """The passages of ``corpus``, written, or as an earlier run left them complete; then ``corpus`` is not touched.

        Raises:
            DataError: the corpus is empty, or raised it.
        """
        try:
            return Passages.open(self.path)
        except DataError:
            return Passages.write(corpus, self.path, progress)

    def finish(
        self, kind: str, passages: Passages, settings: Mapping[str, Any], packages: Sequence[str] = ()
    ) -> IndexManifest:
        """Make all of it durable, and give it its name. ``packages``: those whose versions are noted."""
        files = [file for file in sorted(self.path.rglob("*")) if file.is_file() and not self._passing(file)]
        identity = {"kind": kind, "format": FORMAT, "corpus": passages.checksum, "settings": settings}
        manifest = IndexManifest(
            **json.loads(json.dumps(identity)),
            passages=len(passages),
            checksum=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
            files={file.relative_to(self.path).as_posix(): file.stat().st_size for file in files},
            checksums={file.relative_to(self.path).as_posix(): sha256(file) for file in files},
            versions={"python": platform.python_version()}
            | {package: version(package) for package in ("search-e1", *packages)},
            seconds=round(time.perf_counter() - self._clock, 3),
        )
        for file in files:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        for directory in {file.parent for file in files}:
            sync(directory)
        write_summed(self.path / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        self.path.rename(self.directory)
        sync(self.directory.parent)
        shutil.rmtree(self.directory / _SCRATCH)
        (self.directory / _SETTINGS).unlink()
        return manifest

    def _passing(self, file: Path) -> bool:
        return (
            file.parent == self.path and file.name.startswith((_SETTINGS, MANIFEST))
        ) or self.scratch in file.parents


def refuse_existing(directory: Path) -> None:
    """An index is never written over.

    Raises:
        RunError: ``directory`` is there.
    """
    if directory.exists():
        raise RunError(f"{directory} is there already; remove it, or give another directory for the index")


@contextmanager
def building(directory: Path, settings: Mapping[str, Any] | None) -> Iterator[Building]:
    """Build the index ``directory`` in a hidden directory beside it; ``Building.finish`` gives it its name.

    ``settings`` are all that decides what is built, with the checksum of the corpus file among them. What an interrupted
    build with the same ones left is there to go on from; what one with others left is removed. With ``None`` (a corpus that
    cannot be told from another before it is read) every build starts from nothing and leaves nothing if it fails.

    Raises:
        RunError: ``directory`` is there already, another process builds it, or the disk is full or cannot be written to.
        DataError: as it was raised inside; nothing is left then.
    """
    refuse_existing(directory)
    work = directory.with_name(f".{directory.name}.unfinished")
    identity = None if settings is None else json.loads(json.dumps(settings))
    try:
        with _held(directory):
            _start(work, identity)
            try:
                yield Building(directory, work)
            except BaseException as error:
                if identity is None or isinstance(error, DataError):
                    shutil.rmtree(work, ignore_errors=True)
                raise
    except OSError as error:
        # numpy says how much it could not write, and not why.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) or "requested and" in str(error)
        kept = ", it goes on from what was written" if work.exists() else ""
        raise RunError(
            f"{directory}: {'the disk is full' if full else f'cannot be written ({error})'}; "
            f"{'make room' if full else 'mend that'} and run the same command again{kept}"
        ) from error


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Keep other processes from building ``directory``."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    path = directory.with_name(f".{directory.name}.lock")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RunError(f"{directory}: another process builds this index; wait for it, or give another name") from error
    try:
        refuse_existing(directory)  # finished while this process was on its way here
        yield
    finally:
        path.unlink(missing_ok=True)  # filelock sees that a file it is about to lock was unlinked
        lock.release()


def _start(work: Path, settings: Any) -> None:
    try:
        resumed = settings is not None and json.loads((work / _SETTINGS).read_text(encoding="utf-8")) == settings
    except (OSError, ValueError):
        resumed = False
    if not resumed:
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
        write_atomically(work / _SETTINGS, json.dumps(settings, indent=2) + "\n")


def read(directory: Path, kind: str | None = None) -> IndexManifest:
    """The manifest of the index in ``directory``; its files are there and have their sizes.

    Raises:
        DataError: there is no index, or one of another format, or not of ``kind``, or it is damaged.
    """
    try:
        text = (directory / MANIFEST).read_bytes()
        found = json.loads(text)
        format = found["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        unfinished = directory.name and directory.with_name(f".{directory.name}.unfinished").exists()
        if unfinished and not directory.exists():
            raise DataError(f"{directory}: not finished; run its `search-e1 index build` again, it goes on") from error
        raise DataError(
            f"{directory}: not an index (no manifest of one in it); make one with `search-e1 index build`"
        ) from error
    if format != FORMAT:
        raise DataError(f"{directory}: an index of format {format}, and this version reads {FORMAT}; {_AGAIN}")
    try:
        read_summed(directory / MANIFEST)
        manifest = IndexManifest.model_validate(found)
    except ValueError as error:
        raise DataError(f"{directory / MANIFEST}: damaged; {_AGAIN}") from error
    if kind is not None and manifest.kind != kind:
        raise DataError(
            f"{directory}: a {manifest.kind} index where a {kind} index is needed; give another, or {_AGAIN}"
        )
    for name, size in manifest.files.items():
        file = inside(directory, name)
        if file is None:
            raise DataError(
                f"{directory}: its manifest names the file {name!r}, which is not in it; do not use this index"
            )
        there = file.stat().st_size if file.is_file() else None
        if there != size:
            state = "missing" if there is None else f"{there:,} bytes long, not {size:,}"
            raise DataError(f"{directory}: a damaged index ({name} is {state}); {_AGAIN}")
    return manifest


def verify(directory: Path, progress: Progress = silent) -> None:
    """Read all files of the index in ``directory`` and compare their checksums: sizes do not tell of flipped bits.

    Raises:
        DataError: a file is damaged; also from ``read``.
    """
    manifest = read(directory)
    done, total = 0, sum(manifest.files.values())
    for name, checksum in manifest.checksums.items():
        if sha256(directory / name) != checksum:
            raise DataError(f"{directory}: a damaged index ({name} is not as it was written); {_AGAIN}")
        done += manifest.files[name]
        progress(done // 2**20, total // 2**20, "MiB")
