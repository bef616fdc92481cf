"""The verbs ``search-e1 index ...``."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from search_e1.cli.serve import DeviceOption, EncoderOption, IndexOption, encoder_settings
from search_e1.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Make and look into retrieval indexes.")
console = Console(markup=False, emoji=False)


@app.command("build")
def index_build(
    corpus: Annotated[
        list[str],
        typer.Option(
            "--corpus",
            help="JSON lines (plain, .gz, .zst) or Parquet with id and contents, or id, title and text; a directory of such "
            "files; or owner/name[:config[:split]] on the Hub. May be given several times.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory of the new index.")],
    kind: Annotated[Literal["bm25", "dense"], typer.Option("--kind", help="bm25, or dense.")] = "bm25",
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Leave out records that cannot be used, and say how many.")
    ] = False,
    max_passage_bytes: Annotated[int, typer.Option(min=1, help="A longer passage is a bad line.")] = 2**20,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="That count words at the same time (bm25). Default: one a core, at most 8."),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="Directory of an encoder, or a Hub id. For --kind dense.")
    ] = None,
    faiss: Annotated[
        str,
        typer.Option(
            "--faiss", help="exact, graph, compressed, or a factory string of FAISS. Dense only, as all below."
        ),
    ] = "exact",
    parameters: Annotated[
        str | None, typer.Option("--parameters", help="How it is searched, e.g. nprobe=128,k_factor_rf=40.")
    ] = None,
    query_prefix: Annotated[str | None, typer.Option(help="Put before queries. Default: as the encoder says.")] = None,
    passage_prefix: Annotated[
        str | None, typer.Option(help="Put before passages. Default: as the encoder says.")
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="mean, cls or last. Default: as the encoder says.")] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Vectors of length 1. Default: as the encoder says."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a text. Default: as the encoder says.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="While passages are encoded.")
    ] = "auto",
    device: DeviceOption = "auto",
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a batch. Default: 2048 on a CPU, else 65536.")
    ] = None,
) -> None:
    """Build an index of a corpus: of its words (bm25), or of vectors (dense). Run again, it goes on where it was killed."""
    from search_e1.cli.display import watch
    from search_e1.data.corpus import Corpus
    from search_e1.retrieval.directory import refuse_existing
    from search_e1.retrieval.indexes import DenseSettings, build_index

    told = {
        "query_prefix": query_prefix, "passage_prefix": passage_prefix, "pooling": pooling, "normalize": normalize,
        "max_length": max_length, "dtype": dtype, "device": device, "batch_tokens": batch_tokens,
    }  # fmt: skip
    settings = encoder_settings(encoder, **told)
    if (kind == "dense") != (settings is not None):
        raise ConfigError("--kind dense and --encoder go together; a bm25 index has no encoder")
    dense = DenseSettings(settings, faiss, parameters) if settings else None
    refuse_existing(out)  # before the corpus is read through for its checksum
    read = Corpus(*corpus, skip_bad_lines=skip_bad_lines, most_bytes=max_passage_bytes)
    cores = processes or min(8, os.cpu_count() or 1)
    with watch(console, 1)("index") as progress:
        build_index(read, out, progress, dense=dense, source=read.checksum(), processes=cores)
    if read.skipped:
        console.print(read.report(), style="yellow", highlight=False, soft_wrap=True)
    console.print(f"{out}", highlight=False, soft_wrap=True)


@app.command("info")
def index_info(directory: Annotated[Path, typer.Argument(help="Directory of an index.")]) -> None:
    """Say what an index is, how it was made, and what it takes on disk."""
    from search_e1.cli.display import index_table
    from search_e1.retrieval.directory import read

    console.print(index_table(read(directory)))


@app.command("search")
def index_search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    index: IndexOption,
    topk: Annotated[int, typer.Option(min=1, help="Passages to show.")] = 3,
    encoder: EncoderOption = None,
    device: DeviceOption = "auto",
    parameters: Annotated[
        str | None, typer.Option("--parameters", help="How a dense index is searched, e.g. nprobe=128.")
    ] = None,
) -> None:
    """Search an index, or several whose rankings are fused."""
    from search_e1.cli.display import show_passages
    from search_e1.retrieval.indexes import open_indexes

    settings = encoder_settings(encoder, device=device)
    show_passages(console, open_indexes(index, settings, parameters, device).search([query], topk)[0])
