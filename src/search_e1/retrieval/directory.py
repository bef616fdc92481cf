"""Index directories of any kind: built beside their place, resumed after a kill, complete under their name.

``manifest.json`` describes the index, ``passages.*`` and ``offsets.npy`` are its passages, the rest belongs to its kind.
"""

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

from search_e1.errors import DataError, RunError
from search_e1.retrieval.base import Hit
from search_e1.retrieval.passages import Passages
from search_e1.runs import disk, locks, read_summed, sha256, sync, write_atomically, write_summed
from search_e1.runs.files import SUM
from search_e1.runs.languages import ENGLISH
from search_e1.runs.progress import Progress, silent
from search_e1.runs.safe import inside
from search_e1.types import Passage, Record

FORMAT = 2
"""Version of the layout, common to all kinds; a directory of another version is refused."""
MANIFEST = "manifest.json"
_SETTINGS, _SCRATCH = "build.json", "scratch"
REBUILD = "build it again with `search-e1 index build`"


class IndexManifest(Record):
    """Contents of ``manifest.json``."""

    kind: str  # ``bm25`` or ``dense``
    format: int
    passages: int
    corpus: str  # sha256 of the stored passages
    settings: dict[str, Any]  # all that results depend on besides the passages; for an encoder, its checksum
    checksum: str  # sha256 of kind, format, corpus and settings but for ``language = "en"``
    files: dict[str, int]  # path inside the directory -> bytes
    checksums: dict[str, str] = {}  # path inside the directory -> sha256; empty in indexes of an earlier version
    versions: dict[str, str]
    seconds: float  # wall-clock time of the build; of a resumed one, of its last run


class StoredIndex:
    """What indexes of all kinds have in common; a kind adds ``build``, ``open`` and ``_search``."""

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
        """See ``Retriever``. Thread-safe. Siblings of a group often send the same query: it is searched once."""
        unique = list(dict.fromkeys(queries))
        hits = dict(zip(unique, self._search(unique, topk), strict=True)) if unique else {}
        return [list(hits[query]) for query in queries]

    def _search(self, queries: list[str], topk: int) -> list[list[Hit]]:
        raise NotImplementedError


class Building:
    """An index that is being built. All files in ``path`` are kept when an interrupted build runs again."""

    def __init__(self, directory: Path, path: Path) -> None:
        """See ``building``."""
        self.directory, self.path = directory, path
        self.scratch = path / _SCRATCH
        """Directory for temporary files; no part of the finished index."""
        self.scratch.mkdir(exist_ok=True)
        self._clock = time.perf_counter()

    def passages(self, corpus: Iterable[Passage], progress: Progress = silent) -> Passages:
        """Write the passages of ``corpus``, or open those of an earlier run; then ``corpus`` is not read."""
        try:
            return Passages.open(self.path)
        except DataError:
            return Passages.write(corpus, self.path, progress)

    def finish(self, kind: str, passages: Passages, settings: Mapping[str, Any], packages: Sequence[str] = ()) -> IndexManifest:
        """Write the manifest, sync all files, and rename the directory. ``packages``: whose versions are recorded."""
        names = [file.relative_to(self.path) for file in sorted(self.path.rglob("*")) if file.is_file()]
        names = [name for name in names if not name.parts[0].startswith((".", _SCRATCH, _SETTINGS, MANIFEST))]
        described = {"kind": kind, "format": FORMAT, "corpus": passages.checksum, "settings": settings}
        # An English index keeps the checksum that it had before there were others, and what was cached and evaluated under it.
        identity = described | {"settings": {k: v for k, v in settings.items() if (k, v) != ("language", ENGLISH)}}
        manifest = IndexManifest(
            **json.loads(json.dumps(described)),
            passages=len(passages),
            checksum=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
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
    """Raise ``RunError`` if ``directory`` exists: an index is never overwritten."""
    if directory.exists():
        raise RunError(f"{directory} is there already; remove it, or give another directory for the index")


@contextmanager
def building(directory: Path, settings: Mapping[str, Any] | None) -> Iterator[Building]:
    """Build the index ``directory`` in a hidden directory beside it; ``Building.finish`` renames that.

    ``settings`` determine the index, checksum of the corpus included: an interrupted build with the same settings is resumed,
    one with others removed. With ``None`` every build starts afresh and leaves nothing if it fails.

    Raises:
        RunError: ``directory`` exists, another process builds it, or the disk is full or cannot be written to.
        DataError: raised inside; nothing is left then.
    """
    refuse_existing(directory)
    work = directory.with_name(f".{directory.name}.unfinished")
    identity = None if settings is None else json.loads(json.dumps(settings))
    with disk.translate_disk_errors(directory), locks.held(work):
        try:
            refuse_existing(directory)  # finished by another process in the meantime
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
        _clear(work, {file.name for file in work.glob(".*")})  # but not the lock
        write_atomically(work / _SETTINGS, json.dumps(settings, indent=2) + "\n")


def _clear(directory: Path, keep: set[str]) -> None:
    for path in directory.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def read(directory: Path, kind: str | None = None) -> IndexManifest:
    """Read the manifest of the index in ``directory`` and check that its files exist and have their sizes.

    Raises:
        DataError: there is no index, or one of another format, or not of ``kind``, or it is damaged.
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
        raise DataError(f"{directory}: an index of format {format}, and this version reads {FORMAT}; {REBUILD}")
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
    """Compare all files of the index in ``directory`` with their checksums: sizes do not show flipped bits.

    Raises:
        DataError: a file is damaged; also from ``read``.
    """
    manifest = read(directory)
    done, total = 0, sum(manifest.files.values())
    for name, checksum in manifest.checksums.items():
        if sha256(directory / name) != checksum:
            raise DataError(f"{directory}: a damaged index ({name} is not as it was written); {REBUILD}")
        done += manifest.files[name]
        progress(done // 2**20, total // 2**20, "MiB")
