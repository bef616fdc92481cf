"""What others wrote made safe to print, to open and to keep: no terminal is steered, no path leads out, no secret is stored."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HIDDEN = "***"
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, but for the tab and the new line
    "\u200b\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f"  # invisible, or turning text round
    "\ud800-\udfff]"  # halves of characters, which no terminal takes
)
_CREDENTIALS = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^/?#\s]*@")
_SECRET = re.compile(r"(?:^|_)(?:token|secret|password|passwd|api_?key)$", re.IGNORECASE)
_TOKEN = re.compile(r"(?:^|_)(?:pad|eos|bos|unk|sep|cls|mask)_token$", re.IGNORECASE)  # a tokenizer's


def printable(text: str) -> str:
    """Without characters that steer a terminal, hide or turn text round: what a model or a corpus says must not."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def plain(text: str) -> str:
    """Printable and without passwords: as errors are told."""
    return str(masked(printable(text)))


def masked(value: Any) -> Any:
    """``value`` (of JSON) without secrets: user and password of URLs, and what stands under names such as ``hub_token``."""
    if isinstance(value, str):
        return _CREDENTIALS.sub(rf"\1{HIDDEN}@", value)
    if isinstance(value, Mapping):
        return {key: HIDDEN if _secret(str(key), inner) else masked(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked(inner) for inner in value]
    return value


def _secret(name: str, value: Any) -> bool:
    return isinstance(value, str) and value != "" and bool(_SECRET.search(name)) and not _TOKEN.search(name)


def inside(directory: Path, name: str) -> Path | None:
    """The file ``name`` of ``directory``, as a manifest or a model's files name it; ``None`` if that is none within it."""
    named = Path(name)
    return None if "\0" in name or named.is_absolute() or ".." in named.parts or not named.parts else directory / named


def is_name(text: str) -> bool:
    """Whether a file or directory can have this name, and nothing but a name is in it."""
    return bool(re.fullmatch(r"[\w+][\w.+ -]*", text)) and len(text.encode()) <= 200
