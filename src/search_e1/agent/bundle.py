"""A bundle: one directory with everything that the agent needs, as it was trained and measured.

Its root is a plain Hugging Face directory with weights, tokenizer and prompts. ``agent.json`` holds the limits and the
retrieval settings; ``index/`` holds the index, unless it is elsewhere; ``README.md`` is the model card.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator

from search_e1.config import RolloutConfig
from search_e1.errors import DataError
from search_e1.retrieval.base import Retriever
from search_e1.retrieval.client import HttpRetriever
from search_e1.retrieval.convention import EncoderSettings
from search_e1.retrieval.indexes import open_indexes
from search_e1.runs import write_atomically
from search_e1.runs.safe import inside
from search_e1.types import Record

FILE = "agent.json"
FORMAT = 1
"""Version of the layout; bundles of other versions are refused."""
Dtype = Literal["float32", "bfloat16", "float16"]
_AGAIN = "make it again with `search-e1 bundle`"


class Bundle(Record):
    """Contents of ``agent.json``."""

    format: int = FORMAT
    name: str
    """Name of the agent, for example in a server's list of models."""
    dtype: Dtype
    """Type of the weights and of computation."""
    limits: RolloutConfig
    policy: str
    """Checksum of the original policy, before its weights were rounded to ``dtype``."""
    weights: dict[str, int]
    """Weight file -> bytes."""
    index: tuple[str, ...] = ()
    """Index directories in the bundle; the rankings of several are fused."""
    parameters: str | None = None
    """FAISS search parameters of a dense index, if they differ from those of its build."""
    passages: int | None = None
    """Number of passages searched, if the run had an index."""
    url: str | None = None
    """Retrieval server, if the bundle holds no index."""
    checksum: str | None = None
    """Checksum of the index, or the server's if it reports one."""
    measured_on: str | None = Field(None, exclude_if=lambda checksum: checksum is None)
    """If the index was updated since: the checksum of the index that the figures were measured with."""
    made_by: str
    """Version of search-e1 that made the bundle."""
    trained: dict[str, Any]
    """The run: its config, its evaluated policies with their figures, and package versions."""
    directory: Path = Path()
    """The bundle's directory; not stored in the file."""

    @field_validator("limits")
    @classmethod
    def _without_reward(cls, limits: RolloutConfig) -> RolloutConfig:
        """Removes the reward: an agent needs none, and a reward named in an external file must not be imported."""
        return limits.without_reward

    @classmethod
    def read(cls, directory: Path) -> Self:
        """
        Raises:
            DataError: there is no bundle, this version cannot read it, or its weights are incomplete.
        """
        file = directory / FILE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            format = content["format"]
        except (FileNotFoundError, NotADirectoryError):
            if not directory.exists():
                raise DataError(f"{directory}: no such directory; give a bundle's, e.g. runs/NAME/agent") from None
            of_run = directory / "agent"  # where `train` writes it
            there = f"this run's is {of_run}" if (of_run / FILE).is_file() else "make one with `search-e1 bundle RUN --out DIR`"
            raise DataError(f"{directory}: not a bundle (no {FILE}); {there}") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f"{file}: not the description of a bundle; {_AGAIN}") from None
        if format != FORMAT:
            raise DataError(f"{file}: a bundle of format {format!r}, but this version reads {FORMAT}; {_AGAIN}")
        try:
            bundle = cls.model_validate(content | {"directory": directory})
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise DataError(f"{file}: {where}: {problem['msg']}; {_AGAIN}") from None
        bundle._check_weights()
        return bundle

    def _check_weights(self) -> None:
        if not self.weights:
            raise DataError(f"{self.directory / FILE}: names no weights; {_AGAIN}")
        for name, size in self.weights.items():
            file = self.within(name)
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                state = "missing" if found is None else f"{found:,} bytes long, not {size:,}"
                raise DataError(f"{file}: {state}; copy or download the whole bundle, or {_AGAIN}")

    def within(self, name: str) -> Path:
        """The file or directory ``name`` in the bundle.

        Raises:
            DataError: the name leads outside the bundle.
        """
        found = inside(self.directory, name)
        if found is None:
            raise DataError(f"{self.directory / FILE}: names {name!r}, which is not in the bundle; do not use this bundle")
        return found

    def write(self, directory: Path) -> None:
        """Write ``agent.json`` into ``directory``."""
        write_atomically(directory / FILE, self.model_dump_json(indent=2, exclude={"directory"}) + "\n")


def open_retriever(
    bundle: Bundle,
    url: str | None = None,
    index: Sequence[Path] = (),
    encoder: str | Path | None = None,
    device: str = "auto",
) -> Retriever:
    """The bundle's retriever, or one for ``url`` or ``index`` instead.

    ``encoder``: the current place of a dense index's encoder, if it has moved; it computes on ``device``.

    Raises:
        DataError: the bundle has no passages, or the index is damaged or over other passages than the bundle's.
        ModelError: the encoder of a dense index cannot be loaded.
        RetrievalError: the server does not answer.
    """
    if url and index:
        raise DataError(f"{bundle.directory}: an index and a URL; give one of them")
    if not url and not index and not bundle.index and not bundle.url:
        raise DataError(f"{bundle.directory}: the bundle has no passages; give --index DIR or --url URL")
    found: Any
    if index or (bundle.index and not url):
        settings = EncoderSettings(model=str(encoder), device=device) if encoder else None
        found = open_indexes(index or _directories(bundle), settings, bundle.parameters, device)
    else:
        found = HttpRetriever(str(url or bundle.url))
        found.probe(bundle.limits.topk)
    checksum = getattr(found, "checksum", None)
    if bundle.checksum and checksum and checksum != bundle.checksum:
        what = ", ".join(map(str, index)) or url or (f"{bundle.directory}/index" if bundle.index else bundle.url)
        raise DataError(
            f"{what}: an index of other passages or settings than the bundle's (checksum {checksum[:12]}, not "
            f"{bundle.checksum[:12]}); give the one that the agent was trained with"
        )
    return found


def _directories(bundle: Bundle) -> list[Path]:
    found = [bundle.within(name) for name in bundle.index]
    for name, place in zip(bundle.index, found, strict=True):
        if not place.is_dir():
            raise DataError(f"{bundle.directory}: its index {name!r} is missing; give --index DIR, or make the bundle again")
    return found
