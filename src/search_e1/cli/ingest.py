"""The verb ``search-e1 data ingest``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from search_e1.runs.safe import printable

if TYPE_CHECKING:
    from search_e1.data.documents.ingest import Report

console = Console(highlight=False, markup=False, emoji=False)
_SHOWN = 5  # unread files listed


def ingest(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders with documents.")],
    out: Annotated[Path, typer.Option("--out", help="Directory of the corpus; an existing one is updated.")],
    words: Annotated[int, typer.Option(min=10, help="Approximate words per passage.")] = 100,
    overlap: Annotated[int, typer.Option(min=0, help="Maximum words that a passage repeats from the previous one.")] = 20,
    language: Annotated[
        str | None, typer.Option(help="Language of all files, e.g. de. Default: declared in the file, else detected.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Names or paths to leave out, e.g. '*.log' or 'old/*'. Repeatable.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that read files. Default: one per core, at most 4.")
    ] = None,
    time_limit: Annotated[float, typer.Option(min=0.1, help="Maximum seconds per file.")] = 60,
    max_file_mib: Annotated[float, typer.Option(min=0, help="Maximum size of a file.")] = 100,
    max_unpacked_mib: Annotated[float, typer.Option(min=0, help="Maximum unpacked size of a DOCX, PPTX, XLSX or EPUB.")] = 1024,
    memory_mib: Annotated[int, typer.Option(min=256, help="Maximum memory per process that reads files (Linux).")] = 4096,
) -> None:
    """Turn folders of documents into passages. When run again, it reads only new and changed files."""
    from search_e1.cli.display import watch
    from search_e1.data.documents.ingest import ingest as run
    from search_e1.data.documents.passages import Cutting
    from search_e1.data.documents.workers import Limits
    from search_e1.runs.stopping import on_signals

    cutting = Cutting(words=words, overlap=overlap, language=language)
    limits = Limits(seconds=time_limit, file_mib=max_file_mib, unpacked_mib=max_unpacked_mib, memory_mib=memory_mib)
    cores = processes or min(4, os.cpu_count() or 1)
    with on_signals(), watch(console, 1)("ingest") as progress:
        report = run(folders, out, cutting, limits, exclude=exclude or (), processes=cores, progress=progress)
    _show(report, out)


def _show(report: "Report", out: Path) -> None:
    """Print one row per kind of file, the first unread files, and the config line for the corpus. Fits 80 columns."""
    from search_e1.cli.display import plain_table
    from search_e1.data.documents.folder import kinds
    from search_e1.data.documents.ingest import NOT_READ, PASSAGES

    names = ("read", "unchanged", "duplicate", "empty", "skipped")
    table = plain_table(None, "kind", "files", *names, "passages", "s")
    for kind in [kind for kind in kinds() if report.files[kind]]:
        counts = (report.counts[name][kind] for name in names)
        row = (report.files[kind], *counts, report.passages[kind])
        table.add_row(kind, *(f"{number:,}" for number in row), f"{report.seconds.get(kind, 0):.1f}")
    totals = (report.files, *(report.counts[name] for name in names), report.passages)
    table.add_row("all", *(f"{counter.total():,}" for counter in totals), f"{sum(report.seconds.values()):.1f}")
    console.print(table)
    if report.all_again:
        console.print("Settings changed since last time: all files were read again.")
    if report.removed:
        console.print(f"{report.removed:,} files are gone or no longer read; their passages were removed.")
    silent = ("hidden", "excluded")
    told = [entry for entry in report.not_read if entry.reason not in silent and entry.status != "duplicate"]
    for entry in told[:_SHOWN]:
        console.print(
            Text(f"{entry.status}: {printable(entry.name)}: {printable(entry.reason)}", style="yellow"), soft_wrap=True
        )
    if report.not_read:
        more = f"{len(told) - _SHOWN:,} more; all" if len(told) > _SHOWN else "All unread files"
        console.print(f"{more}, with reasons: {out / NOT_READ}", soft_wrap=True)
    state = "" if report.changed else ", unchanged"
    console.print(f"\n{out / PASSAGES}: {report.passages.total():,} passages{state}, in {report.elapsed:.1f} s", soft_wrap=True)
    console.print(f'For a config: data.corpus = "{out}"', soft_wrap=True)
