"""A bundle: one directory with all that the agent in use needs, as it was trained and measured.

Weights, tokenizer and prompts lie at its root, which is a plain Hugging Face directory; ``agent.json`` holds the limits and
what is searched; ``index/`` holds the index, unless it is searched elsewhere; ``README.md`` is the model card.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ValidationError

from search_e1.config import RolloutConfig
from search_e1.errors import DataError
from search_e1.retrieval.base import Retriever
from search_e1.retrieval.client import HttpRetriever
from search_e1.retrieval.indexes import open_indexes
from search_e1.runs.safe import inside
from search_e1.types import Record

FILE = "agent.json"
FORMAT = 1
"""Version of the layout; a bundle of another is refused."""


class Bundle(Record):
    """Contents of ``agent.json``."""

    format: int = FORMAT
    name: str
    """What the agent is called, in a server's list of models for one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What it computes in; see ``policy.dtype``."""
    limits: RolloutConfig
    index: tuple[str, ...] = ()
    """Directories of indexes in the bundle, whose rankings are fused if there are several."""
    url: str | None = None
    """A retrieval server, where the bundle holds no index."""
    checksum: str | None = None
    """Of the index, or of the server's where it tells one."""
    made_by: str = ""
    """Version of this package."""
    trained: dict[str, Any] = {}
    """The run's config, and its evaluated policies with their figures."""
    directory: Path = Path()
    """Where it lies; not in the file."""

    @classmethod
    def read(cls, directory: Path) -> Self:
        """
        Raises:
            DataError: there is no bundle, or one that this version does not read.
        """
        file = directory / FILE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            format = content["format"]
        except FileNotFoundError as error:
            raise DataError(f"{directory}: not a bundle (no {FILE}); make one with `search-e1 bundle RUN --out DIR`") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: not the description of a bundle; make it again with `search-e1 bundle`") from error
        if format != FORMAT:
            raise DataError(f"{file}: a bundle of format {format}, and this version reads {FORMAT}; make it again")
        try:
            return cls.model_validate(content | {"directory": directory})
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise DataError(f"{file}: {where}: {problem['msg']}; make it again with `search-e1 bundle`") from error

    def write(self, directory: Path) -> None:
        """Write ``agent.json`` into ``directory``."""
        text = self.model_dump_json(indent=2, exclude={"directory"})
        (directory / FILE).write_text(text + "\n", encoding="utf-8")


def open_retriever(bundle: Bundle, url: str | None = None, index: Sequence[Path] = ()) -> Retriever:
    """What the bundle searches, or what stands at ``url`` or in ``index`` now.

    Raises:
        DataError: it has no passages, or the index is damaged or over other passages than the bundle's.
        RetrievalError: the server does not answer.
    """
    if url and index:
        raise DataError(f"{bundle.directory}: an index and a URL; give one of them")
    if not url and not index and not bundle.index and not bundle.url:
        raise DataError(f"{bundle.directory}: a bundle without passages; give --index DIR or --url URL")
    found: Any
    if index or (bundle.index and not url):
        found = open_indexes(index or _directories(bundle))
    else:
        found = HttpRetriever(str(url or bundle.url))
        found.probe(bundle.limits.topk)
    checksum = getattr(found, "checksum", None)
    if bundle.checksum and checksum and checksum != bundle.checksum:
        what = ", ".join(map(str, index)) or url or f"{bundle.directory}/index"
        raise DataError(
            f"{what}: an index of other passages or settings than the bundle's (checksum {checksum[:12]}, not "
            f"{bundle.checksum[:12]}); give the one that the agent was trained with"
        )
    return found


def _directories(bundle: Bundle) -> list[Path]:
    found = [inside(bundle.directory, name) for name in bundle.index]
    for name, place in zip(bundle.index, found, strict=True):
        if place is None or not place.is_dir():
            raise DataError(f"{bundle.directory}: its index {name!r} is missing; give --index DIR, or make the bundle again")
    return [place for place in found if place]
