"""The verbs that serve: the agent over HTTP (`serve`) and by MCP (`mcp`), and an index (`serve-retriever`)."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from search_e1.agent.settings import ServeSettings
from search_e1.cli.options import DeviceOption, EncoderOption, IndexOption, encoder_settings, settings_of, with_options
from search_e1.errors import ConfigError
from search_e1.retrieval.settings import Settings

if TYPE_CHECKING:
    from search_e1.agent.agent import Agent

logger = logging.getLogger(__name__)
console = Console(highlight=False, markup=False, emoji=False)

BundleArgument = Annotated[
    str, typer.Argument(metavar="DIR", help="Bundle (`search-e1 bundle`), or its owner/name on the Hub.")
]
PlaceOption = Annotated[
    list[Path] | None, typer.Option("--index", help="Current directory of its index, if the bundle holds none.")
]
UrlOption = Annotated[str | None, typer.Option("--url", help="Retrieval server with its passages, instead of an index.")]
HostOption = Annotated[str, typer.Option(help="Address to listen on. 0.0.0.0: all addresses of this machine.")]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")]
KeyOption = Annotated[
    str | None,
    typer.Option(
        envvar="SEARCH_E1_SERVE_KEY",
        help="Key that clients must send as `Authorization: Bearer`. Other users can see options.",
    ),
]
OriginOption = Annotated[
    list[str] | None,
    typer.Option("--allow-origin", help="Origin of a web page that may send requests, e.g. https://example.org; *: any."),
]


@with_options(ServeSettings)
def serve(
    bundle: BundleArgument,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    key: KeyOption = None,
    allow_origin: OriginOption = None,
    index: PlaceOption = None,
    url: UrlOption = None,
    encoder: EncoderOption = None,
    device: DeviceOption = "auto",
    **options: Any,
) -> None:
    """Serve an agent over HTTP: OpenAI's chat completions, a web page at /, passages, /healthz and /metrics."""
    with _extra("serve"):
        from search_e1.agent import server
        from search_e1.serving import listening
    settings = settings_of(ServeSettings, options)
    _check_access(host, key)
    with listening.bind(host, port) as bound, _opened(bundle, index, url, encoder, device) as agent:

        def ready(url: str) -> None:
            told = "" if key is None else " (key required)"
            console.print(f"{agent.name} answers at {url}/v1, with a page at {url}/{told}; Ctrl-C stops it", soft_wrap=True)

        server.serve(agent, bound, settings, key=key, origins=allow_origin or (), ready=ready)
    console.print("stopped")


@with_options(ServeSettings)
def mcp(
    bundle: BundleArgument,
    http: Annotated[
        bool, typer.Option("--http", help="Serve streamable HTTP at /mcp instead of standard input and output.")
    ] = False,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    key: KeyOption = None,
    allow_origin: OriginOption = None,
    index: PlaceOption = None,
    url: UrlOption = None,
    encoder: EncoderOption = None,
    device: DeviceOption = "auto",
    **options: Any,
) -> None:
    """Serve an agent to other agents by MCP: the tools ask and search. The MCP client starts it; --http starts a server."""
    with _extra("mcp"):
        from search_e1.agent import mcp as server
        from search_e1.serving import listening
    settings = settings_of(ServeSettings, options)
    if not http:
        with redirect_stdout(sys.stderr):  # standard output belongs to the client
            agent = _opened(bundle, index, url, encoder, device)
        with agent:
            server.run_stdio(agent, settings)
        return
    _check_access(host, key)
    with listening.bind(host, port) as bound, _opened(bundle, index, url, encoder, device) as agent:

        def ready(url: str) -> None:
            told = "" if key is None else " (key required)"
            console.print(f"{agent.name} over MCP at {url}/mcp{told}; Ctrl-C stops it", soft_wrap=True)

        server.run_http(agent, bound, settings, key=key, origins=allow_origin or (), ready=ready)
    console.print("stopped")


@with_options(Settings)
def serve_retriever(
    index: IndexOption,
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0: all addresses of this machine; there is no authentication.")
    ] = "127.0.0.1",
    port: PortOption = 8000,
    encoder: EncoderOption = None,
    device: DeviceOption = "auto",
    **options: Any,
) -> None:
    """Serve an index over HTTP: Search-R1's /retrieve, and /healthz and /metrics."""
    from search_e1.retrieval.indexes import open_indexes

    with _extra("serve"):
        from search_e1.retrieval import server
        from search_e1.serving import listening
    settings = settings_of(Settings, options)
    with listening.bind(host, port) as bound:  # a port in use stops this before an index is loaded
        names = " and ".join(map(str, index))
        opened = open_indexes(index, encoder_settings(encoder, device=device), device=device)

        def ready(url: str) -> None:
            console.print(f"{len(opened):,} passages of {names} at {url}/retrieve; Ctrl-C stops it", soft_wrap=True)

        server.serve(opened, bound, settings, ready)
    console.print("stopped")


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """
    Raises:
        ConfigError: a package of the extra is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        needed = f"this needs {error.name}"
        raise ConfigError(f"{needed}; install it with `pip install 'search-e1[{name}]'`") from error


def _check_access(host: str, key: str | None) -> None:
    """
    Raises:
        ConfigError: the key cannot be sent.
    """
    from search_e1.serving.access import check_key, is_loopback

    check_key(key)
    if key is None and not is_loopback(host):
        logger.warning("%s: anyone who can reach this address can ask and read the passages; give --key to prevent that", host)


def _opened(bundle: str, index: list[Path] | None, url: str | None, encoder: str | None, device: str) -> "Agent":
    from search_e1.agent.agent import Agent

    return Agent.open(bundle, device=device, url=url, index=index or (), encoder=encoder)
