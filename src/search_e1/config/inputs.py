"""What a run is given: a policy, questions, and passages to search."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from search_e1.config.base import Paths, Positive, Section
from search_e1.retrieval.convention import EncoderSettings


class PolicyConfig(Section):
    model: str
    """Directory of a Hugging Face causal language model, a Hub id, or `small`: the policy that comes with the package."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights while they are sampled from and trained."""
    device: str = "auto"
    """`auto` (an accelerator if there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    trust_remote_code: bool = False
    """Run Python code that the model directory or the Hub brings along."""


class DataConfig(Section):
    corpus: Path | None = None
    """Passages: JSON lines (plain, .gz, .zst) or Parquet with `id` and `contents`, or `id`, `title` and `text`. Needed unless
    `retrieval.index` or `.url` is given."""
    train: Annotated[Paths, Field(min_length=1)]
    """Question file or files, JSON lines (plain or .gz) with `id`, `question`, `golden_answers`, perhaps `metadata`."""
    demonstrations: Path | None = None
    """What an expert did for training questions, for `pairs.references_by = "gold"`: JSON lines of `id` and `text`, or `id`
    and `turns`. `docs/distillation.md` tells more."""
    eval: dict[str, Path] = Field(min_length=1)
    """Benchmark name -> question file."""
    max_train: Positive | None = None
    """Use a random subset of this many training questions (the same for a seed)."""
    max_eval: Positive | None = None
    """Use a random subset of this many questions of each benchmark."""


class RetrievalConfig(Section):
    index: Paths = ()
    """Directory of an index made by `search-e1 index build`, or a list of several whose rankings are fused. Without it one is
    built of `data.corpus` in the run directory."""
    kind: Literal["bm25", "dense", "hybrid"] = "bm25"
    """Of the index that is built of `data.corpus`; `hybrid` builds both of the others and fuses their rankings."""
    encoder: EncoderSettings | None = None
    """Needed for `dense` and `hybrid`. For an `index` that is given: where its encoder is now, and its device."""
    faiss: str = "exact"
    """Of a dense index that is built: `exact`, `graph`, `compressed`, or a factory string of FAISS."""
    parameters: str | None = None
    """How a dense index is searched, e.g. `nprobe=128,k_factor_rf=40`. Without it as its preset, or its build, says."""
    url: str | None = None
    """A server that speaks Search-R1's `/retrieve`, e.g. `http://127.0.0.1:8000`. Used instead of an index."""
    timeout: Annotated[float, Field(gt=0)] = 30.0
    """Seconds for one request to `url`, from connecting to the last byte of the answer."""
    attempts: Positive | None = None
    """Tries of one request to `url` before the stage stops. Without it as many as `time_limit` allows."""
    time_limit: Annotated[float, Field(gt=0)] = 180.0
    """Seconds for all tries of one request to `url` and the waits between them; then the stage stops. How long a server may
    be down without harm."""
    cache: bool | Path = True
    """File that keeps answers for later rounds and other runs; several processes may share it. `true`: for `url`, in the run
    directory; `false`: none."""
    cache_key: str | None = None
    """A name of what `url` serves, for answers in `cache`. Only for a server that does not tell its index's checksum; without
    a name its answers are not kept."""

    @model_validator(mode="after")
    def _one_source(self) -> "RetrievalConfig":
        if self.index and self.url:
            raise ValueError("give index or url, not both")
        if self.kind != "bm25" and not (self.encoder or self.index or self.url):
            raise ValueError(f"kind = {self.kind!r} needs an encoder; give encoder.model")
        if self.cache_key and not self.url:
            raise ValueError("cache_key is only for a url; an index has its own checksum")
        return self
