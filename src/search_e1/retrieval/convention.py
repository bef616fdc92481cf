"""How an encoder wants to be used: prefixes, pooling, normalisation, length. Read from its own files where they say it.

The files are those of sentence-transformers, which most encoders are published with: ``modules.json``, the pooling
module's ``config.json``, ``config_sentence_transformers.json`` and ``sentence_bert_config.json``. Some families say their
prefixes in prose only (E5's "query: " and "passage: "); these are known here by their names. What neither says must be
told: a forgotten prefix raises no error, it only finds less.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from search_e1.errors import ModelError
from search_e1.runs.safe import inside
from search_e1.types import Record

Pooling = Literal["mean", "cls", "last"]

_WEB_SEARCH = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
_BGE_QUERY = "Represent this sentence for searching relevant passages: "
_BGE_ZH_QUERY = "为这个句子生成表示以用于检索相关文章："
# Name (lower case, "-" for "_") -> prefixes of query and passage, pooling; as the model cards say. The first match counts.
_FAMILIES: tuple[tuple[str, str, str, Pooling], ...] = (
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
_POOLING: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_OLD_POOLING = {
    "mean_tokens": "mean",
    "cls_token": "cls",
}  # keys that began with pooling_mode_; the others kept their name
_SUPPORTED = "mean, cls and last token"


class Overrides(Record):
    """What is said about an encoder beside its own files. None leaves it to them."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())

    query_prefix: str | None = None
    """Put before every query, its space included. Without it, what the encoder's files say, or its family is known for."""
    passage_prefix: str | None = None
    """Put before every passage."""
    pooling: Pooling | None = None
    """What becomes the vector: the `mean` of the last layer's states, the first token's (`cls`), or the `last` one's."""
    normalize: bool | None = None
    """Divide vectors by their length. Without it, what the encoder's files say, else true."""
    max_length: int | None = Field(None, gt=0)
    """Tokens, special ones included; longer texts are cut. Without it, what the encoder's files say."""


class EncoderSettings(Overrides):
    """What makes texts into vectors: E5, BGE, MiniLM or another encoder that transformers can load."""

    model: str
    """Directory of an encoder, or a Hub id. Weights are safetensors; code that comes along is never run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """While the corpus is encoded; queries are always encoded in float32. `auto`: bfloat16 where the hardware multiplies it."""
    device: str = "auto"
    """`auto` (an accelerator if there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    batch_tokens: int | None = Field(None, gt=0)
    """Most tokens of a batch, padding included. Without it 2,048 on a CPU and 65,536 on an accelerator."""


class Convention(Record):
    """All that makes a text into a vector, beside the weights and the tokenizer."""

    query_prefix: str
    """Put before every query, its space included."""
    passage_prefix: str
    pooling: Pooling
    """Which hidden states of the last layer become the vector: their mean, the first, or the last token's."""
    normalize: bool
    """Divide vectors by their length, so that the inner product is the cosine."""
    max_length: int
    """Tokens, special ones included; longer texts are cut."""


def read_convention(directory: Path, name: str, longest: int, overrides: Overrides) -> Convention:
    """The convention of the encoder in ``directory``; ``name`` is what the user calls it, ``longest`` what its positions allow.

    Raises:
        ModelError: a file is damaged, asks for what is not supported, or nothing says what is needed.
    """
    modules = _modules(directory)
    sentence = _json(directory / "config_sentence_transformers.json")
    family = _family(directory, name)
    given = overrides.model_dump(exclude_none=True)
    query, passage = _prefixes(directory, sentence, family, given)
    pooling = given.get("pooling") or _pooling(directory, modules) or (family and family[3])
    if not pooling:
        raise ModelError(
            f"{directory}: an encoder whose files do not say how its hidden states are pooled; give --pooling mean, cls or last"
        )
    length = given.get("max_length") or _json(directory / "sentence_bert_config.json").get("max_seq_length") or longest
    if length > longest:
        raise ModelError(f"{directory}: max_length {length}, but the encoder reads {longest} tokens; give at most that")
    return Convention(
        query_prefix=query,
        passage_prefix=passage,
        pooling=pooling,
        normalize=given["normalize"] if "normalize" in given else _normalize(directory, modules, sentence),
        max_length=length,
    )


def _modules(directory: Path) -> list[dict[str, str]]:
    modules = _json(directory / "modules.json", [])
    for module in modules:
        kind = module.get("type", "").rpartition(".")[2]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ModelError(
                f"{directory / 'modules.json'}: has a {kind or 'nameless'} module; only encoders of Transformer, Pooling "
                "and Normalize are supported"
            )
    return modules


def _pooling(directory: Path, modules: list[dict[str, str]]) -> Pooling | None:
    path = next((module["path"] for module in modules if module["type"].endswith("Pooling")), None)
    if path is None:
        return None
    file = inside(directory, f"{path}/config.json")
    if file is None:
        raise ModelError(
            f"{directory / 'modules.json'}: names the module {path!r}, which is not in it; do not use this model"
        )
    config = _json(file)
    mode = config.get("pooling_mode")
    if mode is None:
        on = [key.removeprefix("pooling_mode_") for key, value in config.items() if value is True]
        mode = [_OLD_POOLING.get(key, key) for key in on if f"pooling_mode_{key}" in config]
    modes = [mode] if isinstance(mode, str) else mode
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise ModelError(f"{file}: pools by {' and '.join(modes) or 'nothing'}; supported are {_SUPPORTED}")
    if config.get("include_prompt") is False:
        raise ModelError(f"{file}: leaves the prefix out of pooling (include_prompt), which is not supported")
    return _POOLING[modes[0]]


def _prefixes(
    directory: Path, sentence: dict[str, Any], family: tuple[str, str, str, Pooling] | None, given: dict[str, Any]
) -> tuple[str, str]:
    """Of query and passage. sentence-transformers saves empty prompts by itself, so that these say least."""
    prompts = sentence.get("prompts") or {}
    default = prompts.get(sentence.get("default_prompt_name") or "", "")
    query = prompts.get("query", default)
    passage = next((prompts[key] for key in ("document", "passage", "corpus") if key in prompts), default)
    if not (query or passage):
        if family:
            query, passage = family[1:3]
        elif not prompts and not {"query_prefix", "passage_prefix"} <= set(given):
            raise ModelError(
                f"{directory}: neither its files nor its name say what goes before queries and passages; give --query-prefix "
                "and --passage-prefix as its model card says ('' for nothing)"
            )
    return given.get("query_prefix", query), given.get("passage_prefix", passage)


def _normalize(directory: Path, modules: list[dict[str, str]], sentence: dict[str, Any]) -> bool:
    """Cosine unless the files say otherwise, which is sentence-transformers' own rule."""
    similarity = sentence.get("similarity_fn_name") or "cosine"
    if any(module["type"].endswith("Normalize") for module in modules) or similarity == "cosine":
        return True
    if similarity == "dot":
        return False
    raise ModelError(f"{directory}: made for {similarity} distance; inner product and cosine are supported")


def _family(directory: Path, name: str) -> tuple[str, str, str, Pooling] | None:
    """By the name given, the names of the innermost directories, and the name that the config was saved under."""
    saved = str(_json(directory / "config.json").get("_name_or_path", ""))
    parts = [*reversed(re.split(r"[/\\]|--", f"{directory.resolve()}")), *reversed(name.split("/"))]
    for part in (*parts[:4], *parts[-2:], saved.rpartition("/")[2]):
        known = re.sub(r"[_ ]", "-", part.lower())
        for family in _FAMILIES:
            if re.search(family[0], known):
                return family
    return None


def _json(path: Path, missing: Any = None) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {} if missing is None else missing
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not JSON ({error}); get the model again") from error
