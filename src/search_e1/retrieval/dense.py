"""Dense retrieval: passages and queries as vectors, searched by FAISS. The only file that knows FAISS.

The vectors lie in one file, in FAISS's own format for them, streamed to disk as they are encoded. That file is the index
(`exact`), or what the candidates of a smaller index are ranked by, memory-mapped, so that it costs no memory of its own.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Self

import faiss
import numpy as np

from search_e1.errors import ConfigError, DataError, ModelError
from search_e1.retrieval import directory as directories
from search_e1.retrieval import vectors
from search_e1.retrieval.base import Hit
from search_e1.retrieval.convention import Convention, EncoderSettings
from search_e1.retrieval.directory import Building, IndexManifest
from search_e1.retrieval.encoder import Encoder
from search_e1.retrieval.passages import Passages
from search_e1.runs.progress import Progress, silent
from search_e1.types import Passage

KIND = "dense"
_VECTORS, _INDEX, _ENCODER = "vectors.faiss", "index.faiss", "encoder.json"
_DTYPES: dict[str, type[np.floating]] = {"Flat": np.float32, "SQfp16": np.float16}
_MAPPED = faiss.IO_FLAG_MMAP_IFC
_ADDED = 65_536  # vectors that are added to an index at once
_TRAINED_ON = 100_000  # vectors, at least; FAISS asks for 39 a centroid and these are enough for 8-bit codes
_PER_LIST = 50  # training vectors for each inverted list


class Layout(NamedTuple):
    """An index as FAISS is asked for it."""

    factory: str
    """FAISS's own factory string, whole."""
    base: str | None
    """Factory string of what finds candidates; None where the stored vectors are searched themselves."""
    stored: str | None
    """How the vectors are stored, ``Flat`` (float32) or ``SQfp16``; None where they are not kept."""
    parameters: str
    """``faiss.ParameterSpace`` settings for searching, e.g. ``nprobe=64``."""


def layout(index: str, passages: int, dimension: int, parameters: str | None = None) -> Layout:
    """The preset ``exact``, ``graph`` or ``compressed`` for so many vectors, or any factory string of FAISS.

    A string that ends in ``,RFlat``, ``,Refine(Flat)`` or ``,Refine(SQfp16)`` is refined from the memory-mapped vectors.
    Where ``parameters`` are not given, an eighth of all inverted lists is searched, and ten times as many candidates are
    refined as passages are asked for; FAISS's own defaults are one list and once as many.

    Raises:
        ConfigError: FAISS knows no such index, or no such parameter of it.
    """
    factory = _PRESETS[index](passages, dimension) if index in _PRESETS else index
    refined = re.fullmatch(r"(.+),(?:RFlat|Refine\((Flat|SQfp16)\))", factory)
    try:
        trial = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
        chosen = _defaults(trial) if parameters is None else parameters
        _tune(trial, chosen)
    except RuntimeError as error:
        raise ConfigError(
            f"index {index!r}, parameters {parameters or ''!r}: {_said(error)}; give {', '.join(_PRESETS)} or a FAISS factory "
            "string, and parameters as nprobe=64,k_factor_rf=20"
        ) from error
    if refined:
        return Layout(factory, refined[1], refined[2] or "Flat", chosen)
    return Layout(factory, None, factory, chosen) if factory in _DTYPES else Layout(factory, factory, None, chosen)


def _exact(passages: int, dimension: int) -> str:
    return "Flat"


def _graph(passages: int, dimension: int) -> str:
    return "HNSW32,SQ8,Refine(SQfp16)"


def _compressed(passages: int, dimension: int) -> str:
    """Two bits a dimension, 1/16 of float32. All codes are looked through: inverted lists miss what lies across a border."""
    if passages < 1000 or dimension % 2:  # four-bit codes are trained on 624 vectors at least
        return "SQ8,Refine(SQfp16)"
    return f"PQ{dimension // 2}x4fs,Refine(SQfp16)"


_PRESETS = {"exact": _exact, "graph": _graph, "compressed": _compressed}


def _defaults(index: Any) -> str:
    """How an index is searched where nobody says."""
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


class DenseIndex:
    """An ``Index`` over one directory, which holds all but the encoder: vectors, FAISS's index, passages, manifest."""

    def __init__(self, directory: Path, manifest: IndexManifest, encoder: Encoder, parameters: str) -> None:
        """Use ``open`` or ``build``."""
        self.directory = directory
        self.manifest = manifest
        self.encoder = encoder
        self.passages = Passages.open(directory)
        self.parameters = parameters
        self._index = _read(directory, manifest.settings)
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
        """Encode ``corpus`` and index it into ``directory``, which appears under its name only when it is complete.

        ``index`` and ``parameters``: see ``layout``. ``source`` tells the corpus from others (the checksum of its file);
        with it a build that was interrupted goes on when it is run again: at the chunk of passages that was being
        encoded, or with the FAISS index, which is then built as a whole. Memory is bounded by that index.

        Raises:
            DataError: the corpus is empty.
            ConfigError: FAISS knows no such index, or it needs more passages.
            ModelError: the encoder gives values that are not finite.
            RunError: ``directory`` is there already, or cannot be written.
        """
        stored = layout(index, 10**6, encoder.dimension, parameters).stored or "SQfp16"  # the same for any number
        encoded = {"encoder": encoder.checksum, "dtype": encoder.dtype, "stored": stored}
        # Not the kind of index: vectors are what takes hours, and serve any.
        started = source and {"kind": KIND, "format": directories.FORMAT, "source": source, **encoded}
        with directories.building(directory, started or None) as work:
            passages = work.passages(corpus, progress)
            wanted = layout(index, len(passages), encoder.dimension, parameters)
            stored_vectors = _encode(work, passages, encoder, stored, progress)
            if wanted.base:
                _add(wanted.base, stored_vectors, work.path / _INDEX, progress)
            if not wanted.stored:
                (work.path / _VECTORS).rename(work.scratch / _VECTORS)
            about = {"model": encoder.name, "convention": encoder.convention.model_dump()}
            (work.path / _ENCODER).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            settings = {**encoded, **wanted._asdict(), "metric": "inner product", "dimension": encoder.dimension}
            manifest = work.finish(KIND, passages, settings, _packages())
        return cls(directory, manifest, encoder, wanted.parameters)

    @classmethod
    def open(
        cls,
        directory: Path,
        encoder: Encoder | EncoderSettings | str | Path | None = None,
        *,
        device: str = "auto",
        parameters: str | None = None,
    ) -> Self:
        """The index that ``build`` left in ``directory``, with the encoder that it was built with.

        Without ``encoder`` it is looked for where it was. Unless it is open already, it encodes queries in float32 on
        ``device``. ``parameters`` are laid over those that the index was built with.

        Raises:
            DataError: there is none, it is damaged or of another version, or ``encoder`` is another one.
            ModelError: the encoder does not load.
            ConfigError: FAISS knows no such parameter of this index.
        """
        manifest = directories.read(directory, KIND)
        try:
            about = json.loads((directory / _ENCODER).read_text(encoding="utf-8"))
            convention = Convention.model_validate(about["convention"])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{directory / _ENCODER}: damaged; build the index again") from error
        if not isinstance(encoder, Encoder):
            encoder = _open_encoder(directory, encoder, about["model"], convention, device)
        if encoder.checksum != manifest.settings["encoder"]:
            raise DataError(
                f"{directory}: its vectors were made by {about['model']} and this is another encoder ({encoder.directory}, or "
                "its prefixes or pooling); give the one it was built with, or build it again"
            )
        chosen = ",".join(part for part in (manifest.settings["parameters"], parameters) if part)
        try:
            return cls(directory, manifest, encoder, chosen)
        except RuntimeError as error:
            if parameters:
                raise ConfigError(f"parameters {parameters!r} of {directory}: {_said(error)}") from error
            raise DataError(f"{directory}: a damaged index ({_said(error)}); build it again") from error

    @property
    def checksum(self) -> str:
        """See ``Index``. Other parameters for searching give other answers, and so another checksum."""
        if self.parameters == self.manifest.settings["parameters"]:
            return self.manifest.checksum
        return hashlib.sha256(f"{self.manifest.checksum} {self.parameters}".encode()).hexdigest()

    def __len__(self) -> int:
        """Passages in the index."""
        return len(self.passages)

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """See ``Retriever``. The score is the inner product, for most encoders the cosine."""
        unique = list(dict.fromkeys(queries))  # siblings of one group often ask the same thing in the same turn
        if not unique:
            return []
        scores, rows = self._index.search(self.encoder.queries(unique), min(topk, len(self)))
        found = dict(zip(unique, map(self._hits, rows.tolist(), scores.tolist()), strict=True))
        return [list(found[query]) for query in queries]

    def _hits(self, rows: list[int], scores: list[float]) -> list[Hit]:
        """FAISS fills up with -1 what it found too little of."""
        return [self.passages.hit(row, score) for row, score in zip(rows, scores, strict=True) if row >= 0]


def _encode(work: Building, passages: Passages, encoder: Encoder, stored: str, progress: Progress) -> np.ndarray:
    """The vectors of all passages, [passages, dimension], memory-mapped."""
    path, shape = work.path / _VECTORS, (len(passages), encoder.dimension)
    header = _header(stored, *shape)

    def encode(start: int, stop: int) -> np.ndarray:
        return encoder.passages(list(passages.contents(start, stop)))

    vectors.write(path, work.scratch / "vectors.rows", header, shape, _DTYPES[stored], encode, progress)
    made = vectors.read(path, len(header), shape, _DTYPES[stored])
    mapped = faiss.read_index(str(path), _MAPPED)
    if mapped.ntotal != len(made) or not np.array_equal(mapped.reconstruct(len(made) - 1), made[-1]):
        raise RuntimeError(f"FAISS {faiss.__version__} lays {stored} out in a way that is not known here")
    return made


def _header(stored: str, passages: int, dimension: int) -> bytes:
    """What FAISS writes before the vectors of a flat index: taken from one of a single vector, with the two counts set.

    FAISS itself writes an index as a whole only, from memory.
    """
    one = faiss.index_factory(dimension, stored, faiss.METRIC_INNER_PRODUCT)
    one.add(np.zeros((1, dimension), dtype=np.float32))
    header = bytearray(faiss.serialize_index(one).tobytes()[: -one.sa_code_size()])
    struct.pack_into("<q", header, 8, passages)  # after the type (4 bytes) and the dimension (4)
    (units,) = struct.unpack_from("<Q", header, len(header) - 8)  # in which it counts one vector: bytes, or floats
    struct.pack_into("<Q", header, len(header) - 8, units * passages)
    return bytes(header)


def _add(factory: str, stored: np.ndarray, path: Path, progress: Progress) -> None:
    """Train an index on a sample of the vectors, add them chunk by chunk, and write it."""
    total, dimension = stored.shape
    index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        lists = faiss.try_extract_index_ivf(index)
        size = min(total, max(_TRAINED_ON, _PER_LIST * lists.nlist if lists else 0))
        rows = np.sort(np.random.default_rng(0).choice(total, size, replace=False))
        progress(0, total, f"training on {size:,}")
        try:
            index.train(stored[rows].astype(np.float32))
        except RuntimeError as error:
            raise ConfigError(f"index {factory!r} of {total:,} passages: {_said(error)}; give another index") from error
    for start in range(0, total, _ADDED):
        index.add(stored[start : start + _ADDED].astype(np.float32))
        progress(index.ntotal, total, f"{index.ntotal:,} indexed")
    faiss.write_index(index, str(path))


def _read(directory: Path, settings: Mapping[str, Any]) -> Any:
    """FAISS's index, memory-mapped: processes share it, and what is not asked for is not in memory."""
    # FAISS 1.14.2 and later call BLAS from 128,000 numbers a batch on only; from four queries on it is up to 7 times as fast.
    if faiss.cvar.distance_compute_blas_threshold > 1000:
        faiss.cvar.distance_compute_blas_threshold = 4 * settings["dimension"]
    parts = [directory / name for name in (_INDEX, _VECTORS) if (directory / name).exists()]
    if hasattr(os, "posix_fadvise"):  # what every query goes through is read ahead; the vectors to refine by are not
        with parts[0].open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    # The lists of fast-scan codes are copied whatever is asked for: mapped as well they would take their room twice.
    copied = re.search(r"x4fs|RaBitQfs", settings["base"] or "") is not None
    read = [faiss.read_index(str(part), 0 if copied and part.name == _INDEX else _MAPPED) for part in parts]
    return faiss.IndexRefine(*read) if settings["stored"] and len(read) == 2 else read[0]


def _tune(index: Any, parameters: str) -> None:
    space: Any = faiss.ParameterSpace()  # its stubs know SWIG's integers, not the strings that the wrapper takes
    space.set_index_parameters(index, parameters)


def _open_encoder(
    directory: Path, given: EncoderSettings | str | Path | None, built_with: str, convention: Convention, device: str
) -> Encoder:
    model: str | Path = built_with
    if isinstance(given, EncoderSettings):  # what it says must be what the index was built with; the checksum tells
        said = given.model_dump(include=set(Convention.model_fields), exclude_none=True)
        model, device, convention = given.model, given.device, convention.model_copy(update=said)
    elif given is not None:
        model = given
    try:
        return Encoder.open(model, convention, device=device, dtype="float32")
    except ModelError as error:
        if given is not None:
            raise
        raise ModelError(
            f"{directory}: {error} (it was built with that); or name its place now with --encoder"
        ) from error


def _packages() -> list[str]:
    found = ["numpy", "torch", "transformers"]
    for name in ("faiss-cpu", "faiss-gpu"):  # whichever brings the module
        try:
            version(name)
        except PackageNotFoundError:
            continue
        found.append(name)
    return found


def _said(error: RuntimeError) -> str:
    """FAISS's message without the C++ function and line before it."""
    return re.sub(r"^.*(?:failed: |Error: |[.]cpp:\d+: )", "", str(error).strip().replace("\n", " "))
