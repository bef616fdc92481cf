"""Dense retrieval with FAISS. The only file that imports FAISS.

Vectors are streamed to one file in FAISS's own format as they are encoded. That memory-mapped file is the index itself
(`exact`), or re-ranks the candidates of a smaller index.
"""

import json
import os
import re
import shutil
import struct
from collections.abc import Iterable, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, NamedTuple, Self

import faiss
import numpy as np

from search_e1.errors import ConfigError, DataError, ModelError
from search_e1.retrieval import directory as directories
from search_e1.retrieval.base import Hit
from search_e1.retrieval.convention import Convention, EncoderSettings
from search_e1.retrieval.directory import Building, IndexManifest, StoredIndex
from search_e1.retrieval.encoder import Encoder
from search_e1.retrieval.passages import Passages
from search_e1.runs import sha256_text, write_atomically
from search_e1.runs.progress import Progress, silent
from search_e1.types import Passage

KIND = "dense"
_VECTORS, _INDEX, _ENCODER = "vectors.faiss", "index.faiss", "encoder.json"
_DTYPES: dict[str, type[np.floating]] = {"Flat": np.float32, "SQfp16": np.float16}
_MAPPED = faiss.IO_FLAG_MMAP_IFC
CHUNK = 4096
"""Passages encoded between syncs to disk. Not a setting, since it affects the last bits of vectors."""
_ADD_BATCH = 65_536  # vectors
_MIN_TRAINING = 100_000  # vectors; FAISS requires 39 per centroid, which suffices for 8-bit codes
_PER_LIST = 50  # training vectors per inverted list
_CHECKED, _CHECKED_TOPK = 16, 10  # passages checked in an imported index, and the top-k that must contain each
_PACKAGES = ("numpy", "torch", "transformers", "sentence-transformers")


class Layout(NamedTuple):
    """The FAISS layout of an index."""

    factory: str  # the whole FAISS factory string
    base: str | None  # factory string of the candidate index; None if the stored vectors are searched directly
    stored: str | None  # storage of the vectors, ``Flat`` (float32) or ``SQfp16``; None if they are not kept
    parameters: str  # for ``faiss.ParameterSpace``, e.g. ``nprobe=64``


def layout(index: str, passages: int, dimension: int, parameters: str | None = None) -> Layout:
    """The layout of a preset (``exact``, ``graph``, ``compressed``) or of any FAISS factory string.

    A string that ends in ``,RFlat``, ``,Refine(Flat)`` or ``,Refine(SQfp16)`` is refined from the memory-mapped vectors.
    Default ``parameters`` search an eighth of all inverted lists and refine ten candidates per requested passage; FAISS's own
    defaults are one list and one candidate.

    Raises:
        ConfigError: FAISS does not know the index or the parameters.
    """
    factory = _factory(index, passages, dimension)
    refined = re.fullmatch(r"(.+),(?:RFlat|Refine\((Flat|SQfp16)\))", factory)
    try:
        trial = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
        chosen = _defaults(trial) if parameters is None else parameters
        _tune(trial, chosen)
    except RuntimeError as error:
        problem = f"index {index!r}, parameters {parameters or ''!r}: {_message(error)}"
        remedy = "give exact, graph, compressed or a FAISS factory string, and parameters as nprobe=64,k_factor_rf=20"
        raise ConfigError(f"{problem}; {remedy}") from None
    if refined:
        return Layout(factory, refined[1], refined[2] or "Flat", chosen)
    return Layout(factory, None, factory, chosen) if factory in _DTYPES else Layout(factory, factory, None, chosen)


def _factory(index: str, passages: int, dimension: int) -> str:
    """The FAISS factory string of a preset; any other ``index`` is a factory string itself."""
    if index != "compressed":
        return {"exact": "Flat", "graph": "HNSW32,SQ8,Refine(SQfp16)"}.get(index, index)
    if passages < 1000 or dimension % 2:  # 4-bit codes need 624 training vectors
        return "SQ8,Refine(SQfp16)"
    # Two bits per dimension, 1/16 of float32, scanned exhaustively: inverted lists miss passages in unprobed lists.
    return f"PQ{dimension // 2}x4fs,Refine(SQfp16)"


def _defaults(index: Any) -> str:
    """Default search parameters."""
    chosen = []
    base = faiss.downcast_index(index.base_index) if isinstance(index, faiss.IndexRefine) else index
    lists = faiss.try_extract_index_ivf(base)
    if lists:
        chosen.append(f"nprobe={max(1, lists.nlist // 8)}")
    if isinstance(base, faiss.IndexHNSW):
        chosen.append("efSearch=128")
    if base is not index:
        chosen.append("k_factor_rf=10")
    return ",".join(chosen)


class DenseIndex(StoredIndex):
    """An ``Index`` of vectors; its directory holds everything but the encoder. Scores are inner products, usually cosines."""

    def __init__(self, directory: Path, manifest: IndexManifest, encoder: Encoder, parameters: str) -> None:
        """Use ``open`` or ``build``."""
        super().__init__(directory, manifest)
        self.encoder, self.parameters = encoder, parameters
        self._index = _read(directory, manifest.settings, manifest.settings["dimension"])
        _tune(self._index, parameters)

    @classmethod
    def build(
        cls,
        corpus: Iterable[Passage],
        directory: Path,
        encoder: Encoder,
        progress: Progress = silent,
        *,
        index: str = "exact",
        parameters: str | None = None,
        source: str | None = None,
    ) -> Self:
        """Encode ``corpus`` and index it; ``directory`` appears only when it is complete.

        ``index`` and ``parameters``: see ``layout``. ``source``: checksum of the corpus; with it, an interrupted build resumes
        at the chunk that was being encoded. The whole FAISS index must fit into memory, except for ``exact``.

        Raises:
            DataError: the corpus is empty.
            ConfigError: FAISS does not know the index, or it needs more passages.
            ModelError: the encoder returns non-finite values.
            RunError: ``directory`` exists, or cannot be written.
        """
        # Independent of the number of passages.
        stored = layout(index, 10**6, encoder.dimension, parameters).stored or "SQfp16"
        encoded = {"encoder": encoder.checksum, "dtype": encoder.dtype, "stored": stored}
        # Without the layout: encoding takes hours, and the vectors serve any layout.
        started = source and {"kind": KIND, "format": directories.FORMAT, "source": source, **encoded}
        with directories.building(directory, started or None) as work:
            passages = work.passages(corpus, progress)
            wanted = layout(index, len(passages), encoder.dimension, parameters)
            stored_vectors = _encode(work, passages, encoder, stored, progress)
            if wanted.base:
                _add(wanted.base, stored_vectors, work.path / _INDEX, progress)
            if not wanted.stored:
                (work.path / _VECTORS).rename(work.scratch / _VECTORS)
            manifest = _finish(work, passages, encoder, {**encoded, **wanted._asdict()})
        return cls(directory, manifest, encoder, wanted.parameters)

    @classmethod
    def take_over(
        cls,
        corpus: Iterable[Passage],
        directory: Path,
        encoder: Encoder,
        progress: Progress = silent,
        *,
        file: Path,
        parameters: str | None = None,
        source: str | None = None,
    ) -> Self:
        """Make an index in ``directory`` from a FAISS index in ``file``, whose vector n belongs to passage n of ``corpus``.

        Passages are not encoded again: ``file`` is hard-linked into ``directory``, or copied if that is on another file system.
        ``parameters`` default to those stored in the file. ``source``: see ``build``.

        Raises:
            DataError: ``file`` cannot be read, is of an unsupported kind, or does not belong to ``corpus``.
            ConfigError: its dimension is not the encoder's, or FAISS does not know the parameters.
            RunError: ``directory`` exists, or cannot be written.
        """
        kind = _check_file(file, encoder, parameters or "")
        about = {"encoder": encoder.checksum, "dtype": encoder.dtype}
        stat = file.stat()
        same_file = [str(file.absolute()), stat.st_size, stat.st_mtime]
        started = source and {"kind": KIND, "source": source, **about, "file": same_file}
        with directories.building(directory, started or None) as work:
            passages = work.passages(corpus, progress)
            (work.path / _INDEX).unlink(missing_ok=True)
            try:
                os.link(file.resolve(), work.path / _INDEX)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(file, work.path / _INDEX)
            wanted = Layout(kind, kind, None, parameters or "")
            settings = {**about, **wanted._asdict()}
            index = _read(work.path, settings, encoder.dimension)
            if index.ntotal != len(passages):
                raise DataError(
                    f"{file}: holds {index.ntotal:,} vectors, but the corpus {len(passages):,} passages; give the corpus "
                    "it was built from, in the same order"
                )
            _tune(index, wanted.parameters)
            _check_vectors(index, passages, encoder, file)
            manifest = _finish(work, passages, encoder, settings)
        return cls(directory, manifest, encoder, wanted.parameters)

    @classmethod
    def open(
        cls,
        directory: Path,
        encoder: Encoder | EncoderSettings | None = None,
        *,
        device: str = "auto",
        parameters: str | None = None,
    ) -> Self:
        """Open the index in ``directory`` with the encoder that it was built with.

        ``encoder``: default: its location at build time. Unless it is open already, it encodes queries in float32 on
        ``device``. ``parameters`` override those of the build.

        Raises:
            DataError: the index is missing, damaged or of another version, or ``encoder`` is not the one it was built with.
            ModelError: the encoder does not load.
            ConfigError: FAISS does not know the parameters.
        """
        manifest = directories.read(directory, KIND)
        try:
            about = json.loads((directory / _ENCODER).read_text(encoding="utf-8"))
            convention = Convention.model_validate(about["convention"])
        except (OSError, ValueError, KeyError):
            raise DataError(f"{directory / _ENCODER}: damaged; {directories.REBUILD}") from None
        if not isinstance(encoder, Encoder):
            encoder = _open_encoder(directory, encoder, about["model"], convention, device)
        if encoder.checksum != manifest.settings["encoder"]:
            problem = f"its vectors were made by {about['model']}, not by this encoder"
            other = f"({encoder.directory}, or its prefixes or pooling)"
            raise DataError(f"{directory}: {problem} {other}; give the encoder of the build, or build the index again")
        chosen = ",".join(part for part in (manifest.settings["parameters"], parameters) if part)
        try:
            return cls(directory, manifest, encoder, chosen)
        except RuntimeError as error:
            if parameters:
                raise ConfigError(f"parameters {parameters!r} of {directory}: {_message(error)}") from None
            raise DataError(f"{directory}: a damaged index ({_message(error)}); {directories.REBUILD}") from None

    @property
    def checksum(self) -> str:
        """See ``Index``. Search parameters change results, and so the checksum."""
        if self.parameters == self.manifest.settings["parameters"]:
            return self.manifest.checksum
        return sha256_text(f"{self.manifest.checksum} {self.parameters}")

    def _search(self, queries: list[str], topk: int) -> list[list[Hit]]:
        scores, rows = self._index.search(self.encoder.queries(queries), min(topk, len(self)))
        return [
            [self.passages.hit(row, score) for row, score in zip(*found, strict=True) if row >= 0]  # -1 is padding
            for found in zip(rows.tolist(), scores.tolist(), strict=True)
        ]


def _finish(work: Building, passages: Passages, encoder: Encoder, settings: dict[str, Any]) -> IndexManifest:
    """Complete the index with its settings and the encoder that queries need."""
    about = {"model": encoder.name, "convention": encoder.convention.model_dump()}
    (work.path / _ENCODER).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    settings = {**settings, "metric": "inner product", "dimension": encoder.dimension}
    return work.finish(KIND, passages, settings, (*_PACKAGES, *packages_distributions()["faiss"]))


def _check_file(file: Path, encoder: Encoder, parameters: str) -> str:
    """Validate the FAISS index in ``file``; returns its class names, outermost first, e.g. ``IndexPreTransform IndexIVFPQ``."""
    if not file.is_file():
        raise DataError(f"{file}: no such file; give the file of a FAISS index")
    try:
        index = faiss.read_index(str(file), _MAPPED)
    except RuntimeError as error:
        raise DataError(f"{file}: not an index that FAISS {faiss.__version__} reads ({_message(error)})") from None
    kinds: list[str] = []
    inner: Any = index
    while inner is not None:
        inner = faiss.downcast_index(inner)
        kinds.append(type(inner).__name__)
        inner = next((getattr(inner, name) for name in ("base_index", "index", "storage") if hasattr(inner, name)), None)
    if any(kind.startswith("IndexIDMap") for kind in kinds):
        raise DataError(f"{file}: {kinds[0]} numbers its vectors itself; take one whose vector n is the corpus's passage n")
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise DataError(f"{file}: {kinds[0]} ranks by distance, not by inner product; build it with METRIC_INNER_PRODUCT")
    if index.d != encoder.dimension:
        raise ConfigError(
            f"{file}: vectors of {index.d} dimensions, but encoder {encoder.name} gives {encoder.dimension}; give the encoder "
            "that made them"
        )
    try:
        _tune(index, parameters)
    except RuntimeError as error:
        raise ConfigError(f"parameters {parameters!r} of {file}: {_message(error)}") from None
    return " ".join(kinds)


def _check_vectors(index: Any, passages: Passages, encoder: Encoder, file: Path) -> None:
    """Search for a few passages with their own vectors: an index of another encoder or order does not find them.

    Raises:
        DataError: fewer than a quarter are found.
    """
    rows = sorted({len(passages) * i // _CHECKED for i in range(_CHECKED)})
    vectors = encoder.passages([next(passages.contents(row, row + 1)) for row in rows])
    found = index.search(vectors, min(_CHECKED_TOPK, len(passages)))[1].tolist()
    own = sum(row in near for row, near in zip(rows, found, strict=True))
    if 4 * own < len(rows):  # lenient: coarse codes miss some of them too
        raise DataError(
            f"{file}: finds {own} of {len(rows)} passages by their own text (encoded by {encoder.name}); give the encoder and "
            "prefixes it was built with, and its corpus in the same order"
        )


def _encode(work: Building, passages: Passages, encoder: Encoder, stored: str, progress: Progress) -> np.ndarray:
    """Encode all passages, resuming an earlier run; returns the memory-mapped vectors [passages, dimension]."""
    path, shape, dtype = work.path / _VECTORS, (len(passages), encoder.dimension), _DTYPES[stored]
    header = _header(stored, *shape)
    _write_vectors(path, work.scratch / "vectors.rows", header, passages, encoder, dtype, progress)
    encoded = np.memmap(path, dtype=dtype, mode="r", offset=len(header), shape=shape)
    mapped = faiss.read_index(str(path), _MAPPED)
    if mapped.ntotal != len(encoded) or not np.array_equal(mapped.reconstruct(len(encoded) - 1), encoded[-1]):
        raise RuntimeError(f"FAISS {faiss.__version__} stores {stored} in an unknown format")
    return encoded


def _write_vectors(
    path: Path, mark: Path, header: bytes, passages: Passages, encoder: Encoder, dtype: type, progress: Progress
) -> None:
    """Write ``header`` and one row per passage; the file ``mark`` holds the number of synced rows."""
    total, row = len(passages), encoder.dimension * np.dtype(dtype).itemsize
    with path.open("r+b" if path.exists() else "w+b") as file:
        written = max(0, os.fstat(file.fileno()).st_size - len(header)) // row
        done = min(written, int(mark.read_text())) if mark.exists() else 0
        file.write(header)
        file.truncate(file.seek(done * row, os.SEEK_CUR))
        for start in range(done, total, CHUNK):
            stop = min(start + CHUNK, total)
            file.write(encoder.passages(list(passages.contents(start, stop))).astype(dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())
            write_atomically(mark, str(stop))
            progress(stop, total, f"{stop:,} encoded")


def _header(stored: str, passages: int, dimension: int) -> bytes:
    """The header of a flat FAISS index: that of a one-vector index, with its two counts replaced.

    FAISS itself can only write whole indexes from memory.
    """
    one = faiss.index_factory(dimension, stored, faiss.METRIC_INNER_PRODUCT)
    one.add(np.zeros((1, dimension), dtype=np.float32))
    header = bytearray(faiss.serialize_index(one).tobytes()[: -one.sa_code_size()])
    struct.pack_into("<q", header, 8, passages)  # after the type (4 bytes) and the dimension (4)
    (units,) = struct.unpack_from("<Q", header, len(header) - 8)  # size of one vector, in bytes or floats
    struct.pack_into("<Q", header, len(header) - 8, units * passages)
    return bytes(header)


def _add(factory: str, stored: np.ndarray, path: Path, progress: Progress) -> None:
    """Train an index on a sample of the vectors, add all vectors in batches, and write it."""
    total, dimension = stored.shape
    index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        lists = faiss.try_extract_index_ivf(index)
        size = min(total, max(_MIN_TRAINING, _PER_LIST * lists.nlist if lists else 0))
        rows = np.sort(np.random.default_rng(0).choice(total, size, replace=False))
        progress(0, total, f"training on {size:,}")
        try:
            index.train(stored[rows].astype(np.float32))
        except RuntimeError as error:
            raise ConfigError(f"index {factory!r} of {total:,} passages: {_message(error)}; give another index") from None
    for start in range(0, total, _ADD_BATCH):
        index.add(stored[start : start + _ADD_BATCH].astype(np.float32))
        progress(index.ntotal, total, f"{index.ntotal:,} indexed")
    faiss.write_index(index, str(path))


def _read(directory: Path, settings: Mapping[str, Any], dimension: int) -> Any:
    """Open the FAISS index memory-mapped, so that processes share it and unused pages take no memory."""
    # FAISS 1.14.2 and later use BLAS only for batches of 128,000 numbers; BLAS is up to 7 times as fast from 4 queries on.
    if faiss.cvar.distance_compute_blas_threshold > 1000:
        faiss.cvar.distance_compute_blas_threshold = 4 * dimension
    parts = [directory / name for name in (_INDEX, _VECTORS) if (directory / name).exists()]
    # FAISS copies fast-scan codes into memory anyway; mapped, they would take memory twice.
    copied = re.search(r"x4fs|RaBitQfs|FastScan", settings["base"] or "") is not None
    read = [faiss.read_index(str(part), 0 if copied and part.name == _INDEX else _MAPPED) for part in parts]
    return faiss.IndexRefine(*read) if settings["stored"] and len(read) == 2 else read[0]


def _tune(index: Any, parameters: str) -> None:
    space: Any = faiss.ParameterSpace()  # its type stubs lack the string argument
    space.set_index_parameters(index, parameters)


def _open_encoder(
    directory: Path, given: EncoderSettings | None, built_with: str, convention: Convention, device: str
) -> Encoder:
    if given:  # its overrides must equal those of the build; the checksum verifies that
        overrides = given.model_dump(include=set(Convention.model_fields), exclude_none=True)
        return Encoder.open(given.model, convention.model_copy(update=overrides), device=given.device, dtype="float32")
    try:
        return Encoder.open(built_with, convention, device=device, dtype="float32")
    except ModelError as error:
        hint = "(the encoder of the build); or give its current directory with --encoder"
        raise ModelError(f"{directory}: {error} {hint}") from None


def _message(error: RuntimeError) -> str:
    """FAISS's error message without C++ function and line."""
    return re.sub(r"^.*(?:failed: |Error: |[.]cpp:\d+: )", "", str(error).strip().replace("\n", " "))
