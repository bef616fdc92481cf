"""Checks of a GGUF file before it is loaded: it is complete, and its tensor types can be dequantized."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, dequantize
from transformers import GgufConfig, modeling_gguf_pytorch_utils
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from search_e1.errors import ModelError


def check_gguf(model: str, path: Path) -> None:
    """
    Raises:
        ModelError: ``path`` is no GGUF file, is truncated, is one of several parts, or has a type that cannot be dequantized.
    """
    if problem := _problem(path, *_identity(path)):
        raise ModelError(f"policy.model = {model!r}: {path.name} {problem}")


def tensor_sizes(path: Path) -> dict[str, int]:
    """Number of elements of each tensor of a file that passed ``check_gguf``."""
    return {name: size for name, (size, _) in _read(path, *_identity(path))[0].items()}


def metadata(path: Path, key: str) -> str | None:
    """The file's metadata under ``key``, e.g. ``general.license``; ``None`` if absent or not a string."""
    field = GGUFReader(path).get_field(key)
    value = field.contents() if field else None
    return value if isinstance(value, str) else None


@contextmanager
def bar_on_a_terminal() -> Iterator[None]:
    """Show transformers' dequantization progress bar only on a terminal (tqdm's ``disable=None``): its own switch for progress
    bars does not cover this one."""
    library: Any = modeling_gguf_pytorch_utils
    own, library.tqdm = library.tqdm, partial(library.tqdm, disable=None)
    try:
        yield
    finally:
        library.tqdm = own


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=8)
def _read(path: Path, size: int, changed: int) -> tuple[dict[str, tuple[int, GGMLQuantizationType]], int]:
    """Size and type of each tensor, and the number of parts; cached, because a large vocabulary takes seconds to read."""
    reader = GGUFReader(path)
    parts = reader.get_field("split.count")
    tensors = {tensor.name: (int(tensor.n_elements), tensor.tensor_type) for tensor in reader.tensors}
    return tensors, int(parts.contents()) if parts else 1


def _problem(path: Path, size: int, changed: int) -> str | None:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            return "is not a GGUF file (it does not begin with GGUF); download it again, or give a Hugging Face directory"
    try:
        tensors, parts = _read(path, size, changed)
    # Raised by reads past the end of the file and by corrupt lengths.
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, AttributeError):
        return "is truncated or damaged; download it again"
    if parts > 1:
        return f"is one of {parts} parts; join them with `llama-gguf-split --merge` and give the result"
    kinds = {kind: name for name, (_, kind) in tensors.items()}
    for kind, name in kinds.items():
        if not _dequantizes(kind):
            return f"holds {name} as {kind.name}, which cannot be dequantized; {_REMEDY}"
    try:
        GgufHfQuantizer(GgufConfig(dequantize=True)).read_header(str(path))  # some architectures support fewer types
    except ValueError as error:
        return f"cannot be dequantized ({str(error).removeprefix(str(path)).strip()}); {_REMEDY}"
    return None


_REMEDY = "give a file of another type, e.g. Q8_0 or F16, or the model's Hugging Face directory"


def _dequantizes(kind: GGMLQuantizationType) -> bool:
    """Whether one block of the type can be dequantized."""
    _, size = GGML_QUANT_SIZES[kind]
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    try:
        dequantize(np.zeros(1, plain[kind]) if kind in plain else np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
