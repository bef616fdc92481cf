"""The verb ``search-e1 index update``."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from search_e1.cli.options import (
    ColumnOption,
    DeviceOption,
    EncoderOption,
    PassageBytesOption,
    PrefixOption,
    SkipOption,
    encoder_settings,
    open_corpus,
)

console = Console(highlight=False, markup=False, emoji=False)


def index_update(
    places: Annotated[
        list[Path], typer.Argument(metavar="INDEX...", help="Directories of indexes over one corpus, or of one bundle.")
    ],
    corpus: Annotated[list[str], typer.Option("--corpus", help="The current corpus; see `index build`. Repeatable.")],
    column: ColumnOption = None,
    prefix_ids: PrefixOption = False,
    skip_bad_lines: SkipOption = False,
    max_passage_bytes: PassageBytesOption = 2**20,
    encoder: EncoderOption = None,
    device: DeviceOption = "auto",
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that count words (bm25). Default: one per core, at most 8.")
    ] = None,
) -> None:
    """Update an index, or a bundle's, to its corpus, read as for the build. Only new and changed passages are encoded."""
    from search_e1.agent.update import update_indexes
    from search_e1.cli.display import watch

    cores = processes or min(8, os.cpu_count() or 1)
    settings = encoder_settings(encoder, device=device)
    read = open_corpus(corpus, column, prefix_ids, skip_bad_lines, max_passage_bytes)
    with watch(console, 1)("index") as progress:
        done = update_indexes(places, read, progress, encoder=settings, device=device, processes=cores)
    for index, change, encoded in done:
        outcome = "unchanged" if change.same else f"{change.added:,} new, {change.changed:,} changed, {change.removed:,} gone"
        vectors = f"; {encoded:,} encoded" if encoded else ""
        console.print(f"{index}: {change.passages:,} passages: {outcome}{vectors}", soft_wrap=True)
