"""What others wrote made safe to print, to open and to keep: no terminal is steered, no path leads out, no secret is stored."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, but for the tab and the new line
    "\u200b\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f"  # invisible, or turning text round
    "\ud800-\udfff]"  # halves of characters, which no terminal takes
)
_URL = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]{0,20}://\S+")
_WELL_FORMED = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]{0,20}://([^/?#\s]*@)?(\[[0-9A-Fa-f:.%]+\]|[^:/?#@\[\]\s]+)(:\d*)?([/?#].*)?", re.DOTALL
)
_CREDENTIALS = re.compile(r"(://)([^/?#\s]*)@")
_HIDDEN_START = re.compile(r".*@", re.DOTALL)
_PARAMETER = re.compile(r"(?<=[?&;#])([^=&;#]*)=([^&;#]*)")
_PARAMETER_NAME = re.compile(r"key|token|secret|passw|pwd|sig|auth|credential", re.IGNORECASE)
_PIECE = re.compile(r"(?<=[/?&;#=])[^/?&;#=]+")
_KEY = re.compile(r"(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{10,}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
"""What a name rarely looks like, and a key does: letters and digits without a break, or a UUID."""
_SECRET = re.compile(r"(?:^|_)(?:token|secret|password|passwd|api_?key)$", re.IGNORECASE)
_TOKEN = re.compile(r"(?:^|_)(?:pad|eos|bos|unk|sep|cls|mask)_token$", re.IGNORECASE)  # a tokenizer's


def printable(text: str) -> str:
    """Without characters that steer a terminal, hide or turn text round: what a model or a corpus says must not."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def plain(text: str) -> str:
    """Printable and without secrets: as errors are told."""
    return str(masked(printable(text)))


def masked(value: Any) -> Any:
    """``value`` (of JSON) without secrets: those of URLs, and what stands under names such as ``hub_token``."""
    if isinstance(value, str):
        return _URL.sub(lambda match: masked_url(match[0]), value)
    if isinstance(value, Mapping):
        return {key: _masked_under(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked(inner) for inner in value]
    return value


def masked_url(url: str) -> str:
    """``url`` without user, password and keys in its query, path or fragment; what is no URL may hold them anywhere.

    A piece of the path that looks like a key leaves a digest behind: it may as well say what is served, and two such URLs are
    not the same.
    """
    if not _WELL_FORMED.fullmatch(url):
        url = _KEY.sub(HIDDEN, _HIDDEN_START.sub(HIDDEN + "@", url))
    url = _CREDENTIALS.sub(rf"\1{HIDDEN}@", url)
    head, slashes, rest = url.rpartition("://") if "://" in url.split("?")[0] else ("", "", url)
    rest = _PARAMETER.sub(lambda m: f"{m[1]}={HIDDEN}" if m[2] and _PARAMETER_NAME.search(m[1]) else m[0], rest)
    return head + slashes + _PIECE.sub(lambda m: _digested(m[0]) if _KEY.search(m[0]) else m[0], rest)


def secrets_of(url: str) -> set[str]:
    """What ``masked_url`` takes out of ``url``, as it stands there and unquoted; without user and password."""
    found = {m[2] for m in _PARAMETER.finditer(url) if _PARAMETER_NAME.search(m[1])}
    found |= {m[0] for m in _PIECE.finditer(url.partition("://")[2]) if _KEY.search(m[0])}
    return found | {unquote(secret) for secret in found}


def _masked_under(name: str, value: Any) -> Any:
    if isinstance(value, str) and (name == "url" or name.endswith("_url")):
        return masked_url(value)
    return HIDDEN if _secret(name, value) else masked(value)


def _digested(key: str) -> str:
    return HIDDEN + hashlib.sha256(key.encode()).hexdigest()[:6]


def _secret(name: str, value: Any) -> bool:
    return isinstance(value, str) and value != "" and bool(_SECRET.search(name)) and not _TOKEN.search(name)


def inside(directory: Path, name: str) -> Path | None:
    """The file ``name`` of ``directory``, as a manifest or a model's files name it; ``None`` if that is none within it."""
    named = Path(name)
    return None if "\0" in name or named.is_absolute() or ".." in named.parts or not named.parts else directory / named


def is_name(text: str) -> bool:
    """Whether a file or directory can have this name, and nothing but a name is in it."""
    return bool(re.fullmatch(r"[\w+][\w.+ -]*", text)) and len(text.encode()) <= 200
