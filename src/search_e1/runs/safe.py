"""Makes external text safe to print, paths safe to open, and settings safe to store without secrets."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters except tab and newline
    "\u200b\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f"  # invisible characters, and direction overrides
    "\ud800-\udfff]"  # surrogates, which no terminal accepts
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
"""Looks like a key rather than a name: letters and digits without a break, or a UUID."""
_SECRET = re.compile(r"(?:^|_)(?:token|secret|password|passwd|api_?key)$", re.IGNORECASE)
_TOKEN = re.compile(r"(?:^|_)(?:pad|eos|bos|unk|sep|cls|mask)_token$", re.IGNORECASE)  # a tokenizer's


def printable(text: str) -> str:
    """``text`` without characters that control a terminal, are invisible, or reverse text; for text from models or corpora."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def plain(text: str) -> str:
    """``text``, printable and without secrets, for error messages."""
    return str(masked(printable(text)))


def masked(value: Any) -> Any:
    """The JSON ``value`` without secrets: those in URLs, and values under names such as ``hub_token``."""
    if isinstance(value, str):
        return _URL.sub(lambda match: masked_url(match[0]), value)
    if isinstance(value, Mapping):
        return {key: _masked_under(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked(inner) for inner in value]
    return value


def masked_url(url: str) -> str:
    """``url`` without user, password and keys in its query, path or fragment. Other text is searched for them everywhere.

    A path segment that looks like a key is replaced by its digest: it may instead name what is served, and two such URLs must
    stay different.
    """
    if not _WELL_FORMED.fullmatch(url):
        url = _KEY.sub(HIDDEN, _HIDDEN_START.sub(HIDDEN + "@", url))
    url = _CREDENTIALS.sub(rf"\1{HIDDEN}@", url)
    head, slashes, rest = url.rpartition("://") if "://" in url.split("?")[0] else ("", "", url)
    rest = _PARAMETER.sub(lambda m: f"{m[1]}={HIDDEN}" if m[2] and _PARAMETER_NAME.search(m[1]) else m[0], rest)
    return head + slashes + _PIECE.sub(lambda m: _digested(m[0]) if _KEY.search(m[0]) else m[0], rest)


def secrets_of(url: str) -> set[str]:
    """The secrets that ``masked_url`` removes from ``url``, quoted and unquoted, except user and password."""
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
    """The path of ``name``, taken from a manifest or a model's files, in ``directory``; ``None`` if it leads outside."""
    named = Path(name)
    return None if "\0" in name or named.is_absolute() or ".." in named.parts or not named.parts else directory / named


def is_name(text: str) -> bool:
    """Whether ``text`` is a valid name of a file or directory, and not a path."""
    return bool(re.fullmatch(r"[\w+][\w.+ -]*", text)) and len(text.encode()) <= 200
