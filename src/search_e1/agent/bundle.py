"""A bundle: one directory with all that the agent in use needs, as it was trained and measured.

Weights, tokenizer and prompts lie at its root, which is a plain Hugging Face directory; ``agent.json`` holds the limits and
what is searched; ``index/`` holds the index, unless it is searched elsewhere; ``README.md`` is the model card.
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
"""Version of the layout; a bundle of another is refused."""
Dtype = Literal["float32", "bfloat16", "float16"]
_AGAIN = "make it again with `search-e1 bundle`"


class Bundle(Record):
    """Contents of ``agent.json``."""

    format: int = FORMAT
    name: str
    """What the agent is called, in a server's list of models for one."""
    dtype: Dtype
    """Of the weights, and what it computes in."""
    limits: RolloutConfig
    policy: str
    """Checksum of the policy that it was made of, before the weights were rounded to ``dtype``."""
    weights: dict[str, int]
    """File of weights -> bytes."""
    index: tuple[str, ...] = ()
    """Directories of indexes in the bundle, whose rankings are fused if there are several."""
    parameters: str | None = None
    """FAISS search parameters of a dense index, where they are not those of its build."""
    passages: int | None = None
    """How many are searched, where the run had them as an index."""
    url: str | None = None
    """A retrieval server, where the bundle holds no index."""
    checksum: str | None = None
    """Of the index, or of the server's where it tells one."""
    measured_on: str | None = Field(None, exclude_if=lambda checksum: checksum is None)
    """Where the index was updated since: the checksum of what was searched when the figures were measured."""
    made_by: str
    """Version of this package."""
    trained: dict[str, Any]
    """The run: its config, its evaluated policies with their figures, and what it was measured with."""
    directory: Path = Path()
    """Where it lies; not in the file."""

    @field_validator("limits")
    @classmethod
    def _without_reward(cls, limits: RolloutConfig) -> RolloutConfig:
        """An agent in use has no reward, and one that is named in a file from elsewhere must not be imported."""
        return limits.without_reward

    @classmethod
    def read(cls, directory: Path) -> Self:
        """
        Raises:
            DataError: there is no bundle, one that this version does not read, or its weights are not whole.
        """
        file = directory / FILE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            format = content["format"]
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{directory}: not a bundle (no {FILE}); make one with `search-e1 bundle RUN --out DIR`") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f"{file}: not the description of a bundle; {_AGAIN}") from None
        if format != FORMAT:
            raise DataError(f"{file}: a bundle of format {format!r}, and this version reads {FORMAT}; {_AGAIN}")
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
        """The file or directory ``name`` of the bundle.

        Raises:
            DataError: the name leads out of it.
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
    """What the bundle searches, or what stands at ``url`` or in ``index`` now.

    ``encoder``: where that of a dense index is now, if not where it was; it computes on ``device``.

    Raises:
        DataError: it has no passages, or the index is damaged or over other passages than the bundle's.
        ModelError: the encoder of a dense index does not load.
        RetrievalError: the server does not answer.
    """
    if url and index:
        raise DataError(f"{bundle.directory}: an index and a URL; give one of them")
    if not url and not index and not bundle.index and not bundle.url:
        raise DataError(f"{bundle.directory}: a bundle without passages; give --index DIR or --url URL")
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
