"""Index directories of any kind: built in a hidden directory, resumable, renamed when complete.

``manifest.json`` describes the index, ``passages.*`` and ``offsets.npy`` hold its passages, other files belong to its kind.
"""

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

from search_e1.errors import DataError, RunError
from search_e1.retrieval.base import Hit
from search_e1.retrieval.passages import Passages
from search_e1.runs import disk, locks, read_summed, sha256, sha256_text, sync, write_atomically, write_summed
from search_e1.runs.files import SUM
from search_e1.runs.languages import ENGLISH
from search_e1.runs.progress import Progress, silent
from search_e1.runs.safe import inside
from search_e1.types import Passage, Record

FORMAT = 2
"""Version of the directory layout of all kinds; another version is refused."""
MANIFEST = "manifest.json"
_SETTINGS, _SCRATCH = "build.json", "scratch"
REBUILD = "build it again with `search-e1 index build`"


class IndexManifest(Record):
    """Contents of ``manifest.json``."""

    kind: str  # ``bm25`` or ``dense``
    format: int
    passages: int
    corpus: str  # sha256 of the stored passages
    settings: dict[str, Any]  # everything besides the passages that results depend on; an encoder by its checksum
    checksum: str  # sha256 of kind, format, corpus and settings, without ``language = "en"``
    files: dict[str, int]  # path inside the directory -> bytes
    checksums: dict[str, str] = {}  # path inside the directory -> sha256; empty in indexes of earlier versions
    versions: dict[str, str]
    seconds: float  # wall-clock time of the build; for a resumed build, of its last run


class StoredIndex:
    """Base class of all kinds of index; a kind adds ``build``, ``open`` and ``_search``."""

    def __init__(self, directory: Path, manifest: IndexManifest) -> None:
        """Use ``open`` or ``build``."""
        self.directory, self.manifest = directory, manifest
        self.passages = Passages.open(directory)

    @property
    def checksum(self) -> str:
        """See ``Index``."""
        return self.manifest.checksum

    def __len__(self) -> int:
        """Number of passages."""
        return len(self.passages)

    def passage(self, key: str) -> Passage | None:
        """See ``Index``."""
        return self.passages.find(key)

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """See ``Retriever``. Thread-safe. Repeated queries are searched once, since siblings often send the same query."""
        unique = list(dict.fromkeys(queries))
        hits = dict(zip(unique, self._search(unique, topk), strict=True)) if unique else {}
        return [list(hits[query]) for query in queries]

    def _search(self, queries: list[str], topk: int) -> list[list[Hit]]:
        raise NotImplementedError


class Building:
    """An index being built. Files in ``path`` are kept when an interrupted build is resumed."""

    def __init__(self, directory: Path, path: Path) -> None:
        """See ``building``."""
        self.directory, self.path = directory, path
        self.scratch = path / _SCRATCH
        """Directory for temporary files; not part of the finished index."""
        self.scratch.mkdir(exist_ok=True)
        self._clock = time.perf_counter()

    def passages(self, corpus: Iterable[Passage], progress: Progress = silent) -> Passages:
        """Open the passages of an earlier run, or else read ``corpus`` and write them."""
        try:
            return Passages.open(self.path)
        except DataError:
            return Passages.write(corpus, self.path, progress)

    def finish(self, kind: str, passages: Passages, settings: Mapping[str, Any], packages: Sequence[str] = ()) -> IndexManifest:
        """Write the manifest, sync all files, and rename the directory. ``packages``: packages whose versions to record."""
        names = [file.relative_to(self.path) for file in sorted(self.path.rglob("*")) if file.is_file()]
        names = [name for name in names if not name.parts[0].startswith((".", _SCRATCH, _SETTINGS, MANIFEST))]
        described = {"kind": kind, "format": FORMAT, "corpus": passages.checksum, "settings": settings}
        # English indexes keep their checksum from before languages were added, so that caches and evaluations stay valid.
        identity = described | {"settings": {k: v for k, v in settings.items() if (k, v) != ("language", ENGLISH)}}
        manifest = IndexManifest(
            **json.loads(json.dumps(described)),
            passages=len(passages),
            checksum=sha256_text(json.dumps(identity, sort_keys=True)),
            files={name.as_posix(): (self.path / name).stat().st_size for name in names},
            checksums={name.as_posix(): sha256(self.path / name) for name in names},
            versions={"python": platform.python_version()} | {name: version(name) for name in ("search-e1", *packages)},
            seconds=round(time.perf_counter() - self._clock, 3),
        )
        for name in names:
            with (self.path / name).open("rb") as stream:
                os.fsync(stream.fileno())
        for directory in {(self.path / name).parent for name in names}:
            sync(directory)
        write_summed(self.path / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        self.path.rename(self.directory)
        sync(self.directory.parent)
        _clear(self.directory, {Path(name).parts[0] for name in names} | {MANIFEST, MANIFEST + SUM})
        return manifest


def refuse_existing(directory: Path) -> None:
    """
    Raises:
        RunError: ``directory`` exists; an index is never overwritten.
    """
    if directory.exists():
        raise RunError(f"{directory} already exists; remove it, or give another directory for the index")


@contextmanager
def building(directory: Path, settings: Mapping[str, Any] | None) -> Iterator[Building]:
    """Build the index ``directory`` in a hidden directory beside it, which ``Building.finish`` renames.

    ``settings`` determine the index and include the corpus's checksum: an interrupted build is resumed if its settings are the
    same, else removed. With ``None`` every build starts afresh and is removed if it fails.

    Raises:
        RunError: ``directory`` exists, another process builds it, or the disk is full or not writable.
        DataError: from the block; the build is removed.
    """
    refuse_existing(directory)
    work = directory.with_name(f".{directory.name}.unfinished")
    identity = None if settings is None else json.loads(json.dumps(settings))
    with disk.translate_disk_errors(directory), locks.held(work, directory):
        try:
            refuse_existing(directory)  # another process may have finished it meanwhile
            _start(work, identity)
            yield Building(directory, work)
        except BaseException as error:
            if identity is None or isinstance(error, DataError) or directory.exists():
                shutil.rmtree(work, ignore_errors=True)
            raise


def _start(work: Path, settings: Any) -> None:
    try:
        resumed = settings is not None and json.loads((work / _SETTINGS).read_text(encoding="utf-8")) == settings
    except (OSError, ValueError):
        resumed = False
    if not resumed:
        _clear(work, {file.name for file in work.glob(".*")})  # keeps the lock
        write_atomically(work / _SETTINGS, json.dumps(settings, indent=2) + "\n")


def _clear(directory: Path, keep: set[str]) -> None:
    for path in directory.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def read(directory: Path, kind: str | None = None) -> IndexManifest:
    """Read the manifest of the index in ``directory``, and check that its files exist with the recorded sizes.

    Raises:
        DataError: the index is missing, damaged, of another format, or not of ``kind``.
    """
    try:
        content = json.loads((directory / MANIFEST).read_bytes())
        format = content["format"]
    except (OSError, ValueError, KeyError, TypeError):
        unfinished = directory.name and directory.with_name(f".{directory.name}.unfinished").exists()
        if unfinished and not directory.exists():
            raise DataError(f"{directory}: not finished; run its `search-e1 index build` again to resume it") from None
        problem = "not an index (it has no manifest of one)"
        raise DataError(f"{directory}: {problem}; build one with `search-e1 index build`") from None
    if format != FORMAT:
        raise DataError(f"{directory}: an index of format {format}, but this version reads {FORMAT}; {REBUILD}")
    try:
        read_summed(directory / MANIFEST)
        manifest = IndexManifest.model_validate(content)
    except ValueError:
        raise DataError(f"{directory / MANIFEST}: damaged; {REBUILD}") from None
    if kind is not None and manifest.kind != kind:
        kinds = f"a {manifest.kind} index where a {kind} index is needed"
        raise DataError(f"{directory}: {kinds}; give another, or {REBUILD}")
    for name, size in manifest.files.items():
        file = inside(directory, name)
        if file is None:
            problem = f"its manifest names the file {name!r}, which is not in it"
            raise DataError(f"{directory}: {problem}; do not use this index")
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            state = "missing" if actual is None else f"{actual:,} bytes long, not {size:,}"
            raise DataError(f"{directory}: a damaged index ({name} is {state}); {REBUILD}")
    return manifest


def verify(directory: Path, progress: Progress = silent) -> None:
    """Verify the checksums of all files of the index in ``directory``: sizes do not reveal flipped bits.

    Raises:
        DataError: a file is damaged; also from ``read``.
    """
    manifest = read(directory)
    done, total = 0, sum(manifest.files.values())
    for name, checksum in manifest.checksums.items():
        if sha256(directory / name) != checksum:
            raise DataError(f"{directory}: a damaged index ({name} has changed since it was written); {REBUILD}")
        done += manifest.files[name]
        progress(done // 2**20, total // 2**20, "MiB")
