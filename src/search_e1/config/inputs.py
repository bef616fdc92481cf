"""Sections of a run's inputs: policy, questions, and passages to search."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from search_e1.config.base import Paths, Positive, Section
from search_e1.data.formats.passages import CorpusColumns
from search_e1.retrieval.convention import EncoderSettings
from search_e1.retrieval.registry import check_kind, index_kinds
from search_e1.runs.languages import AUTO, join, parse

NEW = "new"


class PolicyConfig(Section):
    model: str
    """A Hugging Face directory, a Hub id, a GGUF file (dequantized), the directory of a PEFT adapter (merged into its base;
    docs/policies.md), `small`: the policy shipped with the package, or `new`: a policy that the cold start initializes
    (`coldstart.new_policy`)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype of sampling and training, and dtype of frozen weights. `auto`: bfloat16 if the GPU or CPU supports it
    natively and the policy has at least 10 million weights, else float32."""
    device: str = "auto"
    """`auto` (an accelerator if available), `cpu`, `cuda`, `cuda:1`, ..."""
    trust_remote_code: bool = False
    """Run Python code from the model directory or the Hub."""


class DataConfig(Section):
    corpus: Paths = ()
    """Passages: JSON lines, CSV or TSV (plain, .gz, .zst) or Parquet with `id` and `contents`, or `id`, `text` and optional
    `title`, and optional `metadata`; or a list of such files. Required unless `retrieval.index` or `.url` is given."""
    columns: dict[str, Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)]] = {}
    """Field of a passage -> its column in the corpus, e.g. `columns.text = "body"`, or several columns, of which the first that
    a record has is read. An empty column for `id` derives ids from file and line."""
    prefix_ids: bool = False
    """Prefix passage ids with the name of their corpus, as in `wiki:17`, for corpora that share ids."""
    train: Annotated[Paths, Field(min_length=1)]
    """Question file or files, JSON lines (plain or .gz) with `id`, `question`, `golden_answers` and optional `metadata`. An
    empty list of answers needs `rollout.rewards.not_found`."""
    demonstrations: Path | None = None
    """Demonstrations for training questions, for the cold start and for `pairs.references_by = "gold"`: JSON lines of `id` and
    `text`, or `id` and `turns`; see `docs/distillation.md`."""
    eval: dict[str, Path] = Field(min_length=1)
    """Benchmark name -> question file."""
    max_train: Positive | None = None
    """Size of a random subset of the training questions, determined by `seed`. Default: all."""
    max_eval: Positive | None = None
    """Size of a random subset of each benchmark, determined by `seed`. Default: all."""

    @property
    def corpus_columns(self) -> CorpusColumns:
        return CorpusColumns.of((field, column) for field, columns in self.columns.items() for column in columns)

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, columns: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        CorpusColumns.of((field, column) for field, of_field in columns.items() for column in of_field)
        return columns


class RetrievalConfig(Section):
    kind: str = "bm25"
    """Kind of the index to build from `data.corpus`: `bm25`, `dense` or `hybrid` (both, with fused rankings). `url`: a server;
    implied if `url` is given. `module:attribute`: your own retriever, called with this section."""
    index: Paths = ()
    """Directory of an index built by `search-e1 index build`, or a list of several with fused rankings. Default: an index of
    `data.corpus` in the run directory."""
    encoder: EncoderSettings | None = None
    """Required for `dense` and `hybrid`. With `index`: current location and device of its encoder."""
    language: str = "auto"
    """Language of a `bm25` index built from `data.corpus`, e.g. `de`, or several of different scripts: `en+zh`. `auto`:
    detected from a sample of the passages; `none`: no stemming and no stop words."""
    faiss: str = "exact"
    """Layout of a dense index to build: `exact`, `graph`, `compressed`, or a FAISS factory string."""
    parameters: str | None = None
    """FAISS search parameters, e.g. `nprobe=128,k_factor_rf=40`. Default: those of the layout, or those the index was built
    with."""
    url: str | None = None
    """A server that speaks Search-R1's `/retrieve`, e.g. `http://127.0.0.1:8000`. Used instead of an index."""
    timeout: Annotated[float, Field(gt=0)] = 30.0
    """Seconds for one attempt of a request to `url`, from connecting to the last byte of the response."""
    attempts: Positive | None = None
    """Maximum attempts of a request to `url` before the stage stops. Default: as many as `time_limit` allows."""
    time_limit: Annotated[float, Field(gt=0)] = 180.0
    """Seconds for all attempts of a request to `url`, waits included, before the stage stops: how long a server may be
    down."""
    cache: bool | Path = True
    """Directory that caches results for later rounds and other runs; several processes may share it. `true`: in the run
    directory, unless an index is searched; `false`: no cache."""
    cache_key: str | None = None
    """Name of the data behind `url`, under which `cache` stores its results. Only for a server that does not send its index's
    checksum; without a name such results are not cached."""

    @field_validator("kind")
    @classmethod
    def _check_kind(cls, kind: str) -> str:
        return check_kind(kind)

    @field_validator("language")
    @classmethod
    def _check_language(cls, language: str) -> str:
        return language if language == AUTO else join(parse(language, "language"))

    @model_validator(mode="after")
    def _check_source(self) -> "RetrievalConfig":
        indexes = index_kinds(self)
        if self.index and self.url and self.kind in ("bm25", "dense", "hybrid", "url"):
            raise ValueError("give index or url, not both")
        if self.kind == "url" and not self.url:
            raise ValueError("kind = 'url' needs a url; give url")
        if "dense" in indexes and not (self.encoder or self.index):
            raise ValueError(f"kind = {self.kind!r} needs an encoder; give encoder.model")
        if (given := self._dense_only()) and self.kind in ("bm25", "url") and not self.index:
            raise ValueError(f"{given} is only for a dense index; set kind = 'dense' or 'hybrid', or leave it out")
        if self.language != AUTO and (self.index or "bm25" not in indexes):
            raise ValueError("language is only for building a bm25 index; an existing index records its own")
        if self.cache_key and indexes:
            raise ValueError("cache_key is only for a url; an index has its own checksum")
        return self

    def _dense_only(self) -> str | None:
        """The first key with another value than its default that only a dense index uses."""
        fields = type(self).model_fields
        return next((k for k in ("encoder", "faiss", "parameters") if getattr(self, k) != fields[k].default), None)
