"""Encoder conventions: prefixes, pooling, normalization and length.

They come from the encoder's sentence-transformers files, or are known for its family: E5 states its prefixes only in the model
card. Otherwise they must be given: a missing prefix raises no error, it only retrieves worse.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from search_e1.errors import ModelError
from search_e1.runs.safe import inside
from search_e1.runs.values import as_written
from search_e1.types import Record

Pooling = Literal["mean", "cls", "last"]

_WEB_SEARCH = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
_BGE_QUERY = "Represent this sentence for searching relevant passages: "
_BGE_ZH_QUERY = "为这个句子生成表示以用于检索相关文章："
Family = tuple[str, str, str, Pooling]
"""(Pattern of the name in lower case with "-" for "_", query prefix, passage prefix, pooling), from the model cards."""
_FAMILIES: tuple[Family, ...] = (
    (r"e5-mistral", _WEB_SEARCH, "", "last"),
    (r"multilingual-e5-large-instruct", _WEB_SEARCH, "", "mean"),
    (r"(^|-)e5-(small|base|large)", "query: ", "passage: ", "mean"),
    (r"bge-(small|base|large)-en", _BGE_QUERY, "", "cls"),
    (r"bge-(small|base|large)-zh", _BGE_ZH_QUERY, "", "cls"),
    (r"bge-m3", "", "", "cls"),
    (r"(all|paraphrase|multi-qa|msmarco)-(minilm|mpnet|distil|roberta|bert)", "", "", "mean"),
    (r"gte-(small|base|large)$", "", "", "mean"),
    (r"contriever", "", "", "mean"),
)
_POOLING: dict[str, Pooling] = {
    "mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls", "lasttoken": "last",
}  # fmt: skip


class Overrides(Record):
    """Settings that override the encoder's files; ``None``: not overridden."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())
    _as_written = as_written

    query_prefix: str | None = None
    """Prefix of every query, trailing space included. Default: from the encoder's files, or known for its family."""
    passage_prefix: str | None = None
    """Prefix of every passage. Default: from the encoder's files, or known for its family."""
    pooling: Pooling | None = None
    """`mean` of the last hidden states, the first token's (`cls`), or the `last` token's. Default: from the encoder's files,
    or known for its family."""
    normalize: bool | None = None
    """Scale vectors to length 1. Default: from the encoder's files, else true."""
    max_length: int | None = Field(None, gt=0)
    """Maximum tokens, special tokens included; longer texts are truncated. Default: from the encoder's files."""


class EncoderSettings(Overrides):
    """An encoder (E5, BGE, MiniLM or another that sentence-transformers loads) and how it runs."""

    model: str
    """Directory of an encoder, or a Hub id. Weights must be safetensors; code shipped with the model never runs."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype for encoding passages; queries are always encoded in float32. `auto`: bfloat16 if the hardware supports it."""
    device: str = "auto"
    """`auto` (an accelerator if available), `cpu`, `cuda`, `cuda:1`, ..."""
    batch_tokens: int | None = Field(None, gt=0)
    """Maximum tokens per batch, padding included. Default: 2,048 on a CPU, 65,536 on an accelerator."""


class Convention(Record):
    """Everything besides weights and tokenizer that determines a text's vector."""

    query_prefix: str
    passage_prefix: str
    pooling: Pooling
    normalize: bool
    max_length: int


def read_convention(directory: Path, name: str, longest: int, overrides: Overrides) -> Convention:
    """The convention of the encoder in ``directory``.

    ``name``: the encoder's name as given by the user. ``longest``: maximum tokens that its position embeddings allow.

    Raises:
        ModelError: a file is damaged or requires something unsupported, or a required value is stated nowhere.
    """
    modules = _read_modules(directory)
    config = _read_json(directory / "config_sentence_transformers.json")
    family = _find_family(directory, name)
    given = overrides.model_dump(exclude_none=True)
    query, passage = _read_prefixes(directory, config, family, given)
    pooling = given.get("pooling") or _read_pooling(directory, modules) or (family and family[3])
    if not pooling:
        problem = "the encoder's files do not say how its hidden states are pooled"
        raise ModelError(f"{directory}: {problem}; give --pooling mean, cls or last")
    length = given.get("max_length") or _read_json(directory / "sentence_bert_config.json").get("max_seq_length")
    if length and not 0 < length <= longest:
        raise ModelError(f"{directory}: max_length {length}, but the encoder reads {longest} tokens; give at most that")
    normalize = given["normalize"] if "normalize" in given else _read_normalize(directory, modules, config)
    return Convention(
        query_prefix=query, passage_prefix=passage, pooling=pooling, normalize=normalize, max_length=length or longest
    )


def _read_modules(directory: Path) -> dict[str, str]:
    """Kind -> path of the modules listed in ``modules.json``; empty without that file."""
    modules, file = {}, directory / "modules.json"
    for module in _read_json(file, list):
        if not (isinstance(module, dict) and all(isinstance(module.get(key, ""), str) for key in ("type", "path"))):
            raise ModelError(f"{file}: not a valid module ({module!r}); use the encoder's own file")
        kind, path = module.get("type", "").rpartition(".")[2], module.get("path", "")
        if kind not in ("Transformer", "Pooling", "Normalize"):
            supported = "only encoders of Transformer, Pooling and Normalize are supported"
            raise ModelError(f"{file}: has a {kind or 'nameless'} module; {supported}")
        if path and inside(directory, path) is None:
            raise ModelError(f"{file}: names the module {path!r}, which is not in it; do not use this model")
        modules[kind] = path
    return modules


def _read_pooling(directory: Path, modules: dict[str, str]) -> Pooling | None:
    if "Pooling" not in modules:
        return None
    file = directory / modules["Pooling"] / "config.json"
    config = _read_json(file)
    mode = config.get("pooling_mode")
    if mode is None:
        prefix = "pooling_mode_"  # keys of earlier versions
        mode = [key.removeprefix(prefix) for key, value in config.items() if key.startswith(prefix) and value is True]
    modes = [mode] if isinstance(mode, str) else mode
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise ModelError(f"{file}: pools by {' and '.join(modes) or 'nothing'}; supported are mean, cls and last token")
    if config.get("include_prompt") is False:
        raise ModelError(f"{file}: leaves the prefix out of pooling (include_prompt), which is not supported")
    return _POOLING[modes[0]]


def _read_prefixes(directory: Path, config: Any, family: Family | None, given: dict[str, str]) -> tuple[str, str]:
    """Prefixes of queries and passages. Empty prompts in the files say nothing: sentence-transformers saves them by default."""
    prompts = {name: prompt for name, prompt in (config.get("prompts") or {}).items() if prompt}
    default = prompts.get(config.get("default_prompt_name") or "", "")
    query = prompts.get("query", default)
    passage = next((prompts[key] for key in ("document", "passage", "corpus") if key in prompts), default)
    if not (query or passage):
        if family:
            query, passage = family[1:3]
        elif not prompts and not {"query_prefix", "passage_prefix"} <= set(given):
            problem = "neither the encoder's files nor its name say what goes before queries and passages"
            remedy = "give --query-prefix and --passage-prefix as its model card says ('' for nothing)"
            raise ModelError(f"{directory}: {problem}; {remedy}")
    return given.get("query_prefix", query), given.get("passage_prefix", passage)


def _read_normalize(directory: Path, modules: dict[str, str], config: dict[str, Any]) -> bool:
    """Whether to normalize: cosine similarity unless the files state otherwise, as in sentence-transformers."""
    similarity = config.get("similarity_fn_name") or "cosine"
    if "Normalize" not in modules and similarity not in ("cosine", "dot"):
        raise ModelError(f"{directory}: trained for {similarity} distance; inner product and cosine are supported")
    return "Normalize" in modules or similarity == "cosine"


def _find_family(directory: Path, name: str) -> Family | None:
    """The family, from the given name, the innermost directories, or the name stored in the config."""
    saved = str(_read_json(directory / "config.json").get("_name_or_path", ""))
    parts = [*reversed(re.split(r"[/\\]|--", f"{directory.resolve()}")), *reversed(name.split("/"))]
    for part in (*parts[:4], *parts[-2:], saved.rpartition("/")[2]):
        known = re.sub(r"[_ ]", "-", part.lower())
        for family in _FAMILIES:
            if re.search(family[0], known):
                return family
    return None


def _read_json(path: Path, kind: type = dict) -> Any:
    """The contents of the JSON file ``path``, an instance of ``kind``; empty if the file does not exist."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(held, kind):
            raise ModelError(
                f"{path}: holds {type(held).__name__}, where {kind.__name__} is needed; use the encoder's own file"
            )
        return held
    except FileNotFoundError:
        return kind()
    except RecursionError:
        raise ModelError(f"{path}: nested too deeply; use the encoder's own file") from None
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not JSON ({error}); download the model again") from None
