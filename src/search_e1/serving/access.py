"""Access control: the key, and which web pages may send requests (the server's own, and named ones)."""

import hmac
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from search_e1.errors import ConfigError
from search_e1.serving.refusals import Refused


def is_loopback(host: str) -> bool:
    """Whether a bind address or a URL's host is reachable only from this machine."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_key(key: str | None) -> None:
    """
    Raises:
        ConfigError: ``key`` cannot be sent in a header.
    """
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError("--key: not usable in a header; give printable ASCII characters without spaces")


@dataclass(frozen=True, slots=True)
class Access:
    """ASGI middleware that passes only permitted requests to ``app``."""

    app: ASGIApp
    key: str | None = None
    """Required as ``Authorization: Bearer``."""
    origins: Collection[str] = ()
    """Origins of other web pages that may send requests; ``*``: all."""
    local: bool = False
    """Answer only requests to a name of this machine, so that no web page can reach the server by DNS rebinding."""
    open: Collection[str] = ()
    """Paths that need no key."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope["path"], Headers(scope=scope))
            except Refused as refusal:
                await refusal.response(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if self.local and host and not is_loopback(_name(host)):
            message = (
                f"this server answers to 127.0.0.1 and localhost, not to {_name(host)}; start it with a --key to change that"
            )
            raise Refused(421, message, code="wrong_host")
        origin = headers.get("origin")
        if origin and not {origin, "*"} & set(self.origins) and origin.partition("://")[2].lower() != host.lower():
            raise Refused(403, f"web pages of {origin} are not allowed; allow them with --allow-origin", code="wrong_origin")
        if self.key is None or path in self.open:
            return
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            message = "no key; send `Authorization: Bearer KEY` with the key the server was started with"
            raise Refused(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if not hmac.compare_digest(sent.strip().encode("latin-1"), self.key.encode()):
            raise Refused(401, "a wrong key", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _name(host: str) -> str:
    """``Host`` header -> name."""
    try:
        return urlsplit(f"//{host}").hostname or host
    except ValueError:
        return host
