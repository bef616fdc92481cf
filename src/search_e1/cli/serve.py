"""The verb ``search-e1 serve-retriever``, and the options that name an index."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from search_e1.errors import ConfigError

if TYPE_CHECKING:
    from search_e1.retrieval.convention import EncoderSettings

console = Console(highlight=False, markup=False, emoji=False)

IndexOption = Annotated[
    list[Path], typer.Option("--index", help="Directory of an index. Given twice, their rankings are fused.")
]
EncoderOption = Annotated[
    str | None,
    typer.Option(
        "--encoder", help="Directory of the encoder that a dense index was built with, if it is elsewhere now."
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where the encoder works: auto, cpu, cuda, cuda:1, ...")]


def encoder_settings(model: str | None, **told: Any) -> "EncoderSettings | None":
    """What the command line says about an encoder; what is None is left to its files.

    Raises:
        ConfigError: a value is impossible.
    """
    from search_e1.retrieval.convention import EncoderSettings

    if model is None:
        return None
    try:
        return EncoderSettings(model=model, **told)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{name} {problem['input']!r}: {problem['msg']}") from error


def serve_retriever(
    index: IndexOption,
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0 is all of this machine's; there is no authentication.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    topk: Annotated[int, typer.Option(min=1, help="Passages for a query where the request does not say.")] = 3,
    max_topk: Annotated[int, typer.Option(min=1, help="Most passages for a query.")] = 100,
    max_queries: Annotated[int, typer.Option(min=1, help="Most queries of one request.")] = 1024,
    max_query_chars: Annotated[int, typer.Option(min=1, help="Most characters of one query.")] = 100_000,
    max_body_mib: Annotated[int, typer.Option(min=1, help="Most MiB of one request.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Most queries of one call of the index.")] = 64,
    batch_wait_ms: Annotated[
        float, typer.Option(min=0, help="How long a call that is not full waits for more queries.")
    ] = 2.0,
    queue: Annotated[int, typer.Option(min=1, help="Queries that may wait; more are answered with 503.")] = 8192,
    cache: Annotated[int, typer.Option(min=0, help="Queries whose answers are kept in memory; 0 keeps none.")] = 50_000,
    cache_mib: Annotated[int, typer.Option(min=1, help="Most MiB of these answers.")] = 1024,
    memory_mib: Annotated[
        int, typer.Option(min=1, help="Most MiB of requests and large answers under way; more are answered with 503.")
    ] = 512,
    threads: Annotated[int, typer.Option(min=1, help="Calls of the index at the same time.")] = 1,
    connections: Annotated[
        int, typer.Option(min=1, help="Open at the same time; beyond them the slowest to ask is closed.")
    ] = 800,
    head_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds in which the head of a request has to arrive.")
    ] = 10.0,
    body_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds in which its body has to arrive.")] = 30.0,
    send_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds in which an answer has to be taken.")] = 60.0,
    shutdown_timeout: Annotated[
        int, typer.Option(min=0, help="Seconds that requests under way have left at Ctrl-C or SIGTERM.")
    ] = 30,
    encoder: EncoderOption = None,
    device: DeviceOption = "auto",
    access_log: Annotated[bool, typer.Option("--access-log", help="A line for each request.")] = False,
) -> None:
    """Serve an index over HTTP: Search-R1's /retrieve, and /healthz and /metrics."""
    from search_e1.retrieval.indexes import open_indexes

    try:
        from search_e1.retrieval import server
    except ModuleNotFoundError as error:
        raise ConfigError(f"serving needs {error.name}; install it with `pip install 'search-e1[serve]'`") from error
    settings = server.Settings(
        topk=topk,
        max_topk=max_topk,
        max_queries=max_queries,
        max_query_chars=max_query_chars,
        max_body_bytes=max_body_mib * 2**20,
        batch=batch,
        batch_wait=batch_wait_ms / 1000,
        queue=queue,
        cache=cache,
        cache_bytes=cache_mib * 2**20,
        memory_bytes=memory_mib * 2**20,
        threads=threads,
        connections=connections,
        head_timeout=head_timeout,
        body_timeout=body_timeout,
        send_timeout=send_timeout,
        shutdown_timeout=shutdown_timeout,
        access_log=access_log,
    )
    with server.bind(host, port) as bound:  # a taken port is found before an index is loaded
        names = " and ".join(map(str, index))
        opened = open_indexes(index, encoder_settings(encoder, device=device), device=device)

        def ready(url: str) -> None:
            console.print(
                f"{len(opened):,} passages of {names} at {url}/retrieve; Ctrl-C ends it",
                soft_wrap=True,
            )

        server.serve(opened, bound, settings, ready)
    console.print("stopped")
