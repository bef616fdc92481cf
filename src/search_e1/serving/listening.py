"""Start and stop a server: bind the address before anything is loaded, then serve requests until a signal."""

import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from search_e1.errors import ConfigError
from search_e1.serving.connections import guarded
from search_e1.serving.limits import Limits

BACKLOG = 2048
"""Connections that the kernel queues until they are accepted."""


def bind(host: str, port: int) -> socket.socket:
    """Bind the server's address. Connections are refused until ``serve`` listens on it.

    Raises:
        ConfigError: the address is in use, not this machine's, or not permitted.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        raise _cannot_listen(host, port, error) from error
    return bound


def _cannot_listen(host: str, port: int, error: Exception) -> ConfigError:
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())
    return ConfigError(f"{host}:{port}: cannot listen there ({reason}); give another --port or --host")


def serve(app: Any, bound: socket.socket, limits: Limits, ready: Callable[[str], None] | None = None) -> None:
    """Serve an ASGI application on the socket from ``bind`` until SIGINT or SIGTERM; requests in flight are finished.

    ``ready`` is called with the server's URL once it listens.

    Raises:
        ConfigError: another process has started listening on the address.
    """
    host, port = bound.getsockname()[:2]
    try:
        bound.listen(BACKLOG)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    server = make_server(app, limits)
    if ready:
        ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    # uvicorn raises the signal again after its shutdown; ignore it, since nothing is left to stop.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_server(app: Any, limits: Limits) -> uvicorn.Server:
    """The server that ``serve`` runs on a bound socket."""
    config = uvicorn.Config(
        app,
        log_level="info" if limits.access_log else "warning",
        access_log=limits.access_log,
        ws="none",
        server_header=False,
        http=guarded(limits),
        timeout_keep_alive=75,  # longer than clients keep idle connections, so that clients close them
        timeout_graceful_shutdown=limits.shutdown_timeout,
    )
    return uvicorn.Server(config)
