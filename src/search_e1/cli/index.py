"""The verbs ``search-e1 index ...``."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from search_e1.cli.index_update import index_update
from search_e1.cli.options import (
    ColumnOption,
    DeviceOption,
    EncoderOption,
    IndexOption,
    ParametersOption,
    PassageBytesOption,
    PrefixOption,
    SkipOption,
    encoder_settings,
    open_corpus,
    with_options,
)
from search_e1.errors import ConfigError
from search_e1.retrieval.convention import EncoderSettings
from search_e1.runs.languages import AUTO

app = typer.Typer(no_args_is_help=True, help="Build and inspect retrieval indexes.")
console = Console(markup=False, emoji=False)


@app.command("build")
@with_options(EncoderSettings, without=("model",))
def index_build(
    corpus: Annotated[
        list[str],
        typer.Option(
            "--corpus",
            help="JSON lines, CSV or TSV (plain, .gz, .zst) or Parquet with id and contents, or id, title and text; a "
            "directory of such files; or owner/name[:config[:split]] on the Hub. Repeatable.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory for the new index.")],
    column: ColumnOption = None,
    prefix_ids: PrefixOption = False,
    kind: Annotated[Literal["bm25", "dense"], typer.Option("--kind", help="bm25, or dense.")] = "bm25",
    skip_bad_lines: SkipOption = False,
    max_passage_bytes: PassageBytesOption = 2**20,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that count words (bm25). Default: one per core, at most 8."),
    ] = None,
    language: Annotated[
        str,
        typer.Option("--language", help="Language (bm25), e.g. de, or en+zh. auto: detected in a sample; none: no stemming."),
    ] = AUTO,
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="Directory of an encoder, or a Hub id. For --kind dense.")
    ] = None,
    faiss: Annotated[
        str,
        typer.Option("--faiss", help="exact, graph, compressed, or a FAISS factory string. Dense only, like all below."),
    ] = "exact",
    parameters: ParametersOption = None,
    **encoder_options: Any,
) -> None:
    """Build an index of a corpus: by words (bm25) or vectors (dense). An interrupted build is resumed."""
    from search_e1.cli.display import watch
    from search_e1.retrieval.directory import refuse_existing
    from search_e1.retrieval.indexes import DenseSettings, build_index

    settings = encoder_settings(encoder, **encoder_options)
    if (kind == "dense") != (settings is not None):
        raise ConfigError("--kind dense and --encoder go together; a bm25 index has no encoder")
    if kind == "dense" and language != AUTO:
        raise ConfigError("--language is for a bm25 index; a dense one is in the languages of its encoder")
    dense = DenseSettings(settings, faiss, parameters) if settings else None
    refuse_existing(out)  # before the corpus is read for its checksum
    read = open_corpus(corpus, column, prefix_ids, skip_bad_lines, max_passage_bytes)
    cores = processes or min(8, os.cpu_count() or 1)
    with watch(console, 1)("index") as progress:
        build_index(read, out, progress, dense=dense, source=read.checksum(), processes=cores, language=language)
    if read.skipped:
        console.print(read.report(), style="yellow", highlight=False, soft_wrap=True)
    console.print(f"{out}", highlight=False, soft_wrap=True)


@app.command("import")
@with_options(EncoderSettings, without=("model",))
def index_import(
    corpus: Annotated[list[str], typer.Option("--corpus", help="The passages, in the order of the vectors; as for `build`.")],
    faiss: Annotated[Path, typer.Option("--faiss", help="FAISS index file, e.g. e5_Flat.index.")],
    encoder: Annotated[str, typer.Option("--encoder", help="The encoder of its vectors: a directory, or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", help="Directory for the new index.")],
    column: ColumnOption = None,
    prefix_ids: PrefixOption = False,
    parameters: ParametersOption = None,
    **encoder_options: Any,
) -> None:
    """Import an existing FAISS index of a corpus; its vectors are used as they are."""
    from search_e1.cli.display import watch
    from search_e1.retrieval.directory import refuse_existing
    from search_e1.retrieval.indexes import DenseSettings, import_index

    settings = encoder_settings(encoder, **encoder_options)
    assert settings
    refuse_existing(out)
    read = open_corpus(corpus, column, prefix_ids)
    dense = DenseSettings(settings, parameters=parameters)
    with watch(console, 1)("index") as progress:
        import_index(read, out, faiss, dense, progress, read.checksum())
    console.print(f"{out}", highlight=False, soft_wrap=True)


app.command("update")(index_update)


@app.command("info")
def index_info(directory: Annotated[Path, typer.Argument(help="Directory of an index.")]) -> None:
    """Show what an index is, how it was built, and its size on disk."""
    from search_e1.cli.display import index_table
    from search_e1.retrieval.directory import read

    console.print(index_table(read(directory)))


@app.command("search")
def index_search(
    query: Annotated[str, typer.Argument(help="The query.")],
    index: IndexOption,
    topk: Annotated[int, typer.Option(min=1, help="Passages to show.")] = 3,
    encoder: EncoderOption = None,
    device: DeviceOption = "auto",
    parameters: ParametersOption = None,
) -> None:
    """Search an index, or several whose rankings are fused."""
    from search_e1.cli.display import show_passages
    from search_e1.retrieval.indexes import open_indexes

    settings = encoder_settings(encoder, device=device)
    show_passages(console, open_indexes(index, settings, parameters, device).search([query], topk)[0])
