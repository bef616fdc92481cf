"""Text encoders through sentence-transformers. The only file that imports it."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from search_e1.errors import ModelError
from search_e1.retrieval.convention import Convention, EncoderSettings, Overrides, read_convention
from search_e1.runs import devices
from search_e1.runs.library_warnings import relayed_warnings
from search_e1.runs.tokenizing import tokenizing

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_WEIGHT_FILES = (
    "config.json", "*.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.*",
    "merges.txt", "*.model",
)  # fmt: skip
"""Files besides the convention that vectors depend on."""
_CONVENTION_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "*/config.json")
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")
"""Model types whose position ids start after the padding id."""


class Encoder:
    """An encoder: weights, tokenizer and convention.

    Vectors are float32 [n, dimension] and do not depend on the batch, except for rounding in ``dtype``.
    """

    def __init__(
        self, name: str, model: "SentenceTransformer", convention: Convention, directory: Path, batch_tokens: int
    ) -> None:
        """Use ``open``."""
        self.name = name
        """Hub id or absolute directory, to open it again."""
        self.convention, self.directory, self.batch_tokens, self._model = convention, directory, batch_tokens, model
        transformer: Any = model[0]
        self._rows: int = transformer.auto_model.get_input_embeddings().num_embeddings

    @classmethod
    def open(
        cls,
        model: str | Path,
        overrides: Overrides | Convention | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_tokens: int | None = None,
    ) -> Self:
        """Load the encoder of a directory or a Hub id; see ``EncoderSettings`` for the arguments.

        Raises:
            ModelError: the encoder does not exist or does not load, or its files do not state its convention.
        """
        directory = _locate(str(model))
        place = devices.device(device)
        known = Overrides(**overrides.model_dump(include=set(Overrides.model_fields))) if overrides else Overrides()
        transformer, longest = _load_transformer(directory, str(model), place, dtype)
        try:
            convention = read_convention(directory, str(model), longest, known)
        except ModelError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # a value of the wrong type in their JSON
            problem = " ".join(str(error).split())[:120]
            files = "config_sentence_transformers.json, sentence_bert_config.json, modules.json"
            raise ModelError(f"encoder {str(model)!r}: {files}: a value that cannot be used ({problem})") from None
        # Small batches fit a CPU's cache; an accelerator needs large ones to be busy.
        tokens = batch_tokens or (2048 if place.type == "cpu" else 65_536)
        name = str(directory) if Path(model).expanduser().exists() else str(model)
        return cls(name, _assemble(transformer, convention, place), convention, directory, tokens)

    @classmethod
    def of(cls, settings: EncoderSettings) -> Self:
        """Load the encoder that ``settings`` describe; see ``open``."""
        return cls.open(settings.model, settings, **settings.model_dump(include={"device", "dtype", "batch_tokens"}))

    @property
    def dimension(self) -> int:
        return int(self._model.get_embedding_dimension() or 0)

    @property
    def dtype(self) -> str:
        """Dtype of weights and activations, e.g. ``bfloat16``."""
        return str(self._model.dtype).removeprefix("torch.")

    @cached_property
    def checksum(self) -> str:
        """Checksum of weights, tokenizer and convention; without ``dtype`` and device, which affect only rounding."""
        digest = hashlib.sha256(self.convention.model_dump_json().encode())
        for file in sorted({file for pattern in _WEIGHT_FILES for file in self.directory.glob(pattern)}):
            with file.open("rb") as stream:
                digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of queries, float32 [len(texts), dimension]."""
        return self._encode([self.convention.query_prefix + text for text in texts])

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of passages, float32 [len(texts), dimension]."""
        return self._encode([self.convention.passage_prefix + text for text in texts])

    def _encode(self, texts: list[str]) -> np.ndarray:
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        if not texts:
            return vectors
        tokenizer: Any = self._model.tokenizer
        with tokenizing(tokenizer):
            ids = tokenizer(texts, truncation=True, max_length=self.convention.max_length)["input_ids"]
        if (largest := max((max(row) for row in ids if row), default=0)) >= self._rows:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise ModelError(f"encoder {self.directory}: no row for {token!r} in the embedding; remove it from the texts")
        # A tokenizer without special tokens returns no ids for an empty text.
        texts = [text if row else tokenizer.pad_token for text, row in zip(texts, ids, strict=True)]
        for rows in token_batches([len(row) for row in ids], self.batch_tokens):
            batch = [texts[row] for row in rows]
            vectors[rows] = self._model.encode(batch, batch_size=len(batch), show_progress_bar=False)
        if not np.isfinite(vectors).all():
            raise ModelError(f"encoder {self.directory}: gives values that are not finite in {self.dtype}; use float32")
        return vectors


def token_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Batches of indices of texts of similar length, longest first, at most ``budget`` tokens each, padding included.

    The shortest text has more than half the tokens of the longest, so that padding is less than half of a batch.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batch[0]] if batch else 0
        if batch and ((len(batch) + 1) * longest > budget or 2 * lengths[i] <= longest):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _load_transformer(directory: Path, name: str, place: torch.device, dtype: str) -> tuple[Any, int]:
    """The transformer module in ``directory``, and the maximum number of tokens that it can read."""
    from sentence_transformers.sentence_transformer.modules import Transformer

    reports: list[dict[str, Any]] = []

    class Reporting(Transformer):
        def _load_model(self, *arguments: Any, **options: Any) -> Any:
            loaded: Any = super()._load_model(*arguments, output_loading_info=True, **options)
            model, report = loaded
            reports.append(report)
            return model

    load = {"trust_remote_code": False, "local_files_only": True}
    weights = {**load, "dtype": _resolve_dtype(dtype, place), "use_safetensors": True}
    try:
        with devices.no_bars(), relayed_warnings(f"encoder {name!r}"):
            module = Reporting(str(directory), model_kwargs=weights, processor_kwargs=load, config_kwargs=load)
    except Exception as error:  # from transformers, tokenizers, safetensors or torch, depending on the damage
        problem = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "custom code" in problem or "trust_remote_code" in str(error):
            problem = "it ships its own code, which is never run here; give another encoder"
        raise ModelError(f"encoder {name!r} does not load: {problem}") from None
    if module.tokenizer.pad_token is None:
        raise ModelError(
            f"encoder {name!r}: its tokenizer has no padding token; name one as pad_token in tokenizer_config.json"
        )
    [report] = reports
    _check_weights(name, report, module.auto_model.state_dict())
    _check_tokenizer(name, module.tokenizer, module.auto_model.get_input_embeddings().num_embeddings)
    config = module.config
    positions = getattr(config, "max_position_embeddings", None) or 512
    if config.model_type in _OFFSET_POSITIONS:
        positions -= (config.pad_token_id or 0) + 1
    return module, min(positions, module.tokenizer.model_max_length)


def _check_weights(name: str, report: Mapping[str, Any], held: Iterable[str]) -> None:
    """Check that no weight is missing, since it would be random, except the unused pooler's. Unused heads may be left over.

    Raises:
        ModelError: weights are missing, or left over from layers of the same kind as the model's.
    """

    def layer(key: str) -> str:
        return re.sub(r"\d+", "#", key)

    layers = {layer(key) for key in held}
    left_over = sorted(key for key in report["unexpected_keys"] if any(layer(key).endswith(known) for known in layers))
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key.split("."))
    for what, keys in (("missing", missing), ("left over", left_over)):
        if keys:
            others = ", ".join(sorted(report["unexpected_keys"])[:1])
            also = f"; its files hold {others} instead" if what == "missing" and others else ""
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ModelError(
                f"encoder {name!r}: weights are {what}: {keys[0]}{more}{also}; give the directory of a whole encoder"
            )


def _check_tokenizer(name: str, tokenizer: Any, rows: int) -> None:
    """Check that every id has a row, except special tokens that the tokenizer never inserts (``_encode`` checks these).

    Raises:
        ModelError: an id has no row in the embedding.
    """
    vocabulary = {id: token for token, id in tokenizer.get_vocab().items() if id >= rows}
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    inserted = set(tokenizer.convert_tokens_to_ids(list(tokenizer.special_tokens_map.values())))
    beyond = {id: token for id, token in vocabulary.items() if id not in special or id in inserted}
    if beyond:
        raise ModelError(
            f"encoder {name!r}: the tokenizer has {max(beyond) + 1} ids and the embedding {rows} rows (no row for "
            f"{beyond[min(beyond)]!r}); give the tokenizer that it was trained with"
        )


def _assemble(transformer: Any, convention: Convention, place: torch.device) -> "SentenceTransformer":
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    transformer.max_seq_length = convention.max_length
    # Pools in float32, to avoid rounding to the encoder's dtype.
    transformer.register_forward_hook(
        lambda module, inputs, features: {**features, "token_embeddings": features["token_embeddings"].float()}
    )
    mode = "lasttoken" if convention.pooling == "last" else convention.pooling
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), mode)]
    modules += [Normalize()] if convention.normalize else []
    return SentenceTransformer(modules=modules, device=str(place)).eval()


def _locate(model: str) -> Path:
    """The local directory of ``model``; a Hub id is downloaded."""
    from huggingface_hub import snapshot_download

    path = Path(model).expanduser().absolute()
    if not path.exists():
        if model.startswith((".", "~", "/")) or model.count("/") != 1:
            raise ModelError(f"encoder {model!r}: no such directory; give one, or a Hub id (owner/name)")
        try:
            with devices.no_bars():
                path = Path(snapshot_download(model, allow_patterns=[*_WEIGHT_FILES, *_CONVENTION_FILES]))
        except (OSError, ValueError) as error:
            problem = str(error).strip().splitlines()[0]
            raise ModelError(f"encoder {model!r}: cannot be downloaded ({problem}); give a directory") from None
    if not (path / "config.json").is_file():
        raise ModelError(f"encoder {model!r}: no config.json in it; give the directory of a Hugging Face model")
    if not any(path.glob("*.safetensors")):
        pickled = any(path.glob("*.bin"))
        problem = "weights only as pickles, which can run code" if pickled else "no weights in it"
        raise ModelError(f"encoder {model!r}: {problem}; give one with *.safetensors")
    return path


def _resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = torch.cpu.get_capabilities()
        fast = device.type == "cpu" and (has.get("avx512_bf16", False) or has.get("amx_bf16", False))
    return torch.bfloat16 if fast else torch.float32
