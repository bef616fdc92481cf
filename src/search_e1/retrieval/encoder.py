"""Texts to vectors by any E5-, BGE- or MiniLM-like encoder that transformers can load."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoModel, AutoTokenizer

from search_e1.errors import ModelError
from search_e1.retrieval.convention import Convention, EncoderSettings, Overrides, read_convention
from search_e1.runs import devices as loading

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)
_FILES = ("config.json", "*.safetensors", *_TOKENIZER_FILES)
"""What vectors depend on, beside the convention."""
_CONVENTION_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "*/config.json")


class Encoder:
    """Weights, tokenizer and the convention that belongs to them.

    Vectors are float32 [n, dimension]. They do not depend on which texts are encoded together, but for the rounding of
    ``dtype``.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, convention: Convention, directory: Path, batch_tokens: int
    ) -> None:
        """Use ``open``."""
        self.name = name
        """By which it can be opened again: a Hub id, or the absolute path of its directory."""
        self.convention = convention
        self.directory = directory
        self.batch_tokens = batch_tokens
        self._model = model
        self._tokenizer = tokenizer
        self._padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

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
        """The encoder in a directory, or of a Hub id. Weights are safetensors; code that comes along is never run.

        ``dtype`` ``auto`` is bfloat16 where the hardware multiplies it by itself, else float32. ``batch_tokens`` bounds the
        tokens of a batch, padding included.

        Raises:
            ModelError: there is none, it does not load, or its files do not say how it is to be used.
        """
        directory = _directory(str(model))
        place = loading.device(device)
        try:
            with loading.no_bars():
                tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
                weights = AutoModel.from_pretrained(
                    directory, dtype=_dtype(dtype, place), trust_remote_code=False, use_safetensors=True
                )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            problem = str(error).strip().splitlines()[0]
            if "custom code" in problem:
                problem = "it brings code of its own, which is never run here; give another encoder"
            raise ModelError(f"encoder {str(model)!r} does not load: {problem}") from error
        if weights.config.is_encoder_decoder:
            raise ModelError(f"encoder {str(model)!r} is an encoder and a decoder; give a model that is one of them")
        known = Overrides.model_validate(overrides.model_dump()) if overrides else Overrides()
        convention = read_convention(directory, str(model), _longest(weights.config, tokenizer), known)
        # On a CPU small batches stay in the cache; an accelerator wants enough work to be busy.
        tokens = batch_tokens or (2048 if place.type == "cpu" else 65_536)
        name = str(directory) if Path(model).expanduser().exists() else str(model)
        return cls(name, weights.to(place).eval(), tokenizer, convention, directory, tokens)

    @classmethod
    def of(cls, settings: EncoderSettings) -> Self:
        """As ``open``."""
        overrides = Overrides(**settings.model_dump(include=set(Overrides.model_fields)))
        return cls.open(
            settings.model,
            overrides,
            device=settings.device,
            dtype=settings.dtype,
            batch_tokens=settings.batch_tokens,
        )

    @property
    def dimension(self) -> int:
        return self._model.config.hidden_size

    @property
    def dtype(self) -> str:
        """Of weights and activations, e.g. ``bfloat16``."""
        return str(self._model.dtype).removeprefix("torch.")

    @cached_property
    def checksum(self) -> str:
        """Of weights, tokenizer and convention; not of ``dtype`` and device, which change the rounding only."""
        digest = hashlib.sha256(self.convention.model_dump_json().encode())
        for file in sorted({file for pattern in _FILES for file in self.directory.glob(pattern)}):
            with file.open("rb") as stream:
                digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """[len(texts), dimension], in their order."""
        return self._encode([self.convention.query_prefix + text for text in texts])

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        """As ``queries``, with the prefix for passages."""
        return self._encode([self.convention.passage_prefix + text for text in texts])

    @torch.inference_mode()
    def _encode(self, texts: list[str]) -> np.ndarray:
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        if not texts:
            return vectors
        ids = self._tokenizer(texts, truncation=True, max_length=self.convention.max_length)["input_ids"]
        ids = [row or [self._padding] for row in ids]  # a tokenizer without special tokens makes nothing of ""
        for rows in batches([len(row) for row in ids], self.batch_tokens):
            vectors[rows] = self._pooled([ids[row] for row in rows])
        if not np.isfinite(vectors).all():
            raise ModelError(f"encoder {self.directory} gives values that are not finite in {self.dtype}; use float32")
        return vectors

    def _pooled(self, ids: list[list[int]]) -> np.ndarray:
        width = max(map(len, ids))
        tokens = torch.tensor([row + [self._padding] * (width - len(row)) for row in ids])
        lengths = torch.tensor([len(row) for row in ids])
        mask = torch.arange(width) < lengths[:, None]
        place = self._model.device
        hidden = self._model(input_ids=tokens.to(place), attention_mask=mask.long().to(place)).last_hidden_state.float()
        if self.convention.pooling == "mean":
            vectors = hidden.masked_fill(~mask.to(place)[..., None], 0).sum(1) / lengths.to(place)[:, None]
        elif self.convention.pooling == "cls":
            vectors = hidden[:, 0]
        else:
            vectors = hidden[torch.arange(len(ids)), lengths - 1]
        if self.convention.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return vectors.cpu().numpy()


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of texts of similar length, longest first, at most ``budget`` tokens a batch with its padding.

    The shortest has more than half the tokens of the longest, so that padding is less than half of any batch.
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


def _directory(model: str) -> Path:
    """Where the files of ``model`` are on this machine; fetched from the Hub if it is an id."""
    path = Path(model).expanduser().absolute()
    if not path.exists():
        if model.startswith((".", "~", "/")) or model.count("/") != 1:
            raise ModelError(f"encoder {model!r}: no such directory; give one, or a Hub id (owner/name)")
        try:
            with loading.no_bars():
                path = Path(snapshot_download(model, allow_patterns=[*_FILES, *_CONVENTION_FILES]))
        except (OSError, ValueError) as error:
            problem = str(error).strip().splitlines()[0]
            raise ModelError(f"encoder {model!r}: not had from the Hub ({problem}); give a directory") from error
    if not (path / "config.json").is_file():
        raise ModelError(f"encoder {model!r}: no config.json in it; give the directory of a Hugging Face model")
    if not any(path.glob("*.safetensors")):
        pickled = any(path.glob("*.bin"))
        found = "weights only as pickles, which can run code" if pickled else "no weights in it"
        raise ModelError(f"encoder {model!r}: {found}; give one with *.safetensors")
    return path


def _longest(config: Any, tokenizer: Any) -> int:
    """Tokens that the encoder can read."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= (config.pad_token_id or 0) + 1  # their positions are counted from after the padding's
    return min(positions, tokenizer.model_max_length)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = torch.cpu.get_capabilities()
        fast = device.type == "cpu" and (has.get("avx512_bf16", False) or has.get("amx_bf16", False))
    return torch.bfloat16 if fast else torch.float32
