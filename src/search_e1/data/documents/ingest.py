"""Turns folders of files into a corpus; later runs are incremental: only new and changed files are read."""

import csv
import io
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from search_e1.data.documents.folder import Found, Skipped, walk
from search_e1.data.documents.passages import Cutting
from search_e1.data.documents.readers import MODULES
from search_e1.data.documents.store import FILE, Known, Store
from search_e1.data.documents.workers import EMPTY, FAILED, READ, Limits, Outcome, read_all
from search_e1.errors import ConfigError, DataError
from search_e1.runs import disk, locks, sha256, sync, write_atomically
from search_e1.runs.progress import Progress, silent

PASSAGES, NOT_READ = "passages.jsonl", "skipped.txt"
DUPLICATE, SKIPPED = "duplicate", "skipped"


@dataclass(slots=True)
class Report:
    """Results of one run."""

    files: Counter[str] = field(default_factory=Counter)
    """Kind -> number of files in the folder."""
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """``read`` (in this run), ``unchanged``, ``duplicate``, ``empty``, ``skipped`` -> kind -> number of files."""
    passages: Counter[str] = field(default_factory=Counter)
    """Kind -> number of passages in the corpus."""
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Kind -> seconds spent reading, summed over processes."""
    not_read: list[Skipped] = field(default_factory=list)
    """Files without passages, and files read only in part, by name."""
    removed: int = 0
    """Number of files that are gone since the last run."""
    all_again: bool = False
    """Whether settings changed since the last run, so that all files were read again."""
    changed: bool = False
    """Whether the corpus was written."""
    elapsed: float = 0.0
    """Seconds."""


def ingest(
    folders: Sequence[Path],
    out: Path,
    cutting: Cutting | None = None,
    limits: Limits | None = None,
    *,
    exclude: Sequence[str] = (),
    processes: int = 1,
    progress: Progress = silent,
) -> Report:
    """Build the corpus of ``folders`` in ``out``, or update it.

    ``out/passages.jsonl`` is replaced atomically after all files are read; an interrupted run resumes where it stopped.
    ``exclude``: see ``walk``. ``processes``: number of processes that read files in parallel.

    Raises:
        ConfigError: a package is missing, or ``out`` holds something else.
        DataError: a folder is missing or empty, or no file has any text; the corpus stays unchanged.
        RunError: another process uses ``out``, or its disk is full.
    """
    check_extra()
    clock = time.perf_counter()
    cutting, limits = cutting or Cutting(), limits or Limits()
    if cutting.overlap >= cutting.words:
        raise ConfigError(f"--overlap {cutting.overlap}: give less than --words {cutting.words}")
    _check_out(folders, out)
    folder = walk(folders, out, exclude)
    report = Report()
    with disk.translate_disk_errors(out), locks.held(out), Store.opened(out) as store:
        report.all_again = not store.under(cutting.model_dump_json())
        known = store.known()
        sums = dict(_checksums(folder.files, known, limits, folder.skipped))
        files = {file.name: file for file in folder.files if file.name in sums}
        gone = [name for name in known if name not in files]
        report.removed = len(gone)
        store.forget(gone)
        reading = _to_read(files, sums, known, limits, store)
        todo = len(reading)
        for number, (file, outcome) in enumerate(read_all(reading, cutting, limits, min(processes, todo)), 1):
            if _unchanged(file):
                store.put(file, sums[file.name], outcome, limits.model_dump_json())
                report.counts[READ][file.kind] += outcome.status == READ
            else:
                folder.skipped.append(Skipped(file.name, file.kind, "changed while it was read; run the same command again"))
                store.forget([file.name])
            report.seconds[file.kind] += outcome.seconds
            progress(number, todo, file.name)
        _summarize(report, store.known(), folder.skipped, {file.name for file in reading})
        _publish(out, store, report)
    report.elapsed = time.perf_counter() - clock
    return report


def check_extra() -> None:
    """
    Raises:
        ConfigError: a package of the extra ``documents`` is missing.
    """
    missing = next((module for module in MODULES if find_spec(module) is None), None)
    if missing:
        raise ConfigError(
            f"`data ingest` needs {missing}; install it with `pip install 'search-e1[documents]'`, in a checkout with "
            "`pip install -e '.[documents]'`"
        )


def _check_out(folders: Sequence[Path], out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: a file; give a directory")
    if any(out.resolve() == folder.resolve() for folder in folders):
        raise ConfigError(f"--out {out}: this is the folder being read; give another directory, which may be inside it")
    if out.is_dir() and not (out / FILE).exists() and any(not file.name.startswith(".") for file in out.iterdir()):
        raise ConfigError(f"--out {out}: holds something other than a corpus from `data ingest`; give a new directory")


def _checksums(
    files: Sequence[Found], known: dict[str, Known], limits: Limits, skipped: list[Skipped]
) -> Iterator[tuple[str, str]]:
    """Name and sha256 of each readable file; files with unchanged size and mtime are not read again."""
    for file in files:
        before = known.get(file.name)
        if file.size > limits.file_mib * 2**20:
            size = f"{file.size / 2**20:,.0f} MiB, more than --max-file-mib {limits.file_mib:g}"
            skipped.append(Skipped(file.name, file.kind, size))
        elif before and (before.size, before.mtime_ns) == (file.size, file.mtime_ns):
            yield file.name, before.sha256
        else:
            try:
                yield file.name, sha256(file.path)
            except OSError as error:
                skipped.append(Skipped(file.name, file.kind, f"cannot be read ({error.strerror})"))


def _to_read(
    files: dict[str, Found], sums: dict[str, str], known: dict[str, Known], limits: Limits, store: Store
) -> list[Found]:
    """The files that must be read, one per distinct content; duplicates are recorded in ``store``."""
    by_content: dict[str, list[str]] = defaultdict(list)
    for name, checksum in sums.items():
        by_content[checksum].append(name)
    reading = []
    for checksum, names in by_content.items():
        read = [name for name in names if _is_known(known.get(name), checksum, limits)]
        first = read[0] if read else names[0]
        if not read:
            reading.append(files[first])
        elif known[first].mtime_ns != files[first].mtime_ns:
            store.touch(files[first])
        for name in names:
            reason = f"the same content as {first}"
            before = known.get(name)
            if name == first or (before and (before.sha256, before.status, before.reason) == (checksum, DUPLICATE, reason)):
                continue
            store.put(files[name], checksum, Outcome(DUPLICATE, reason), "")
    return sorted(reading, key=lambda file: file.name)


def _is_known(before: Known | None, checksum: str, limits: Limits) -> bool:
    if before is None or before.sha256 != checksum:
        return False
    return before.status in (READ, EMPTY) or (before.status == FAILED and before.limits == limits.model_dump_json())


def _unchanged(file: Found) -> bool:
    """Whether the file's size and mtime are the same as when its checksum was computed."""
    try:
        about = file.path.stat()
    except OSError:
        return False
    return (about.st_size, about.st_mtime_ns) == (file.size, file.mtime_ns)


def _summarize(report: Report, rows: dict[str, Known], skipped: Sequence[Skipped], now: set[str]) -> None:
    """Fill ``report`` from the store's rows after the run; ``now``: names of files read in it."""
    for entry in skipped:
        report.counts[SKIPPED][entry.kind] += 1
        report.files[entry.kind] += 1
    not_read = list(skipped)
    for row in rows.values():
        report.files[row.kind] += 1
        report.passages[row.kind] += row.passages
        if row.status == READ and row.name not in now:
            report.counts["unchanged"][row.kind] += 1
        elif row.status != READ:
            report.counts[SKIPPED if row.status == FAILED else row.status][row.kind] += 1
        if row.status != READ or row.reason:
            status = {READ: "in part", FAILED: SKIPPED}.get(row.status, row.status)
            not_read.append(Skipped(row.name, row.kind, row.reason, status))
    report.not_read = sorted(not_read, key=lambda entry: entry.name)


def _publish(out: Path, store: Store, report: Report) -> None:
    """Write the list of files not read, and the passages, if they changed."""
    table = io.StringIO()
    writer = csv.writer(table, delimiter="\t", lineterminator="\n")
    writer.writerow(("status", "file", "reason"))
    writer.writerows((entry.status, entry.name, entry.reason) for entry in report.not_read)
    write_atomically(out / NOT_READ, table.getvalue())
    if not report.passages.total():
        raise DataError(f"none of {sum(report.files.values())} files has any text; {out / NOT_READ} gives the reason for each")
    if store.published and (out / PASSAGES).exists():
        return
    partial = out / f".{PASSAGES}.partial"
    with partial.open("wb") as stream:
        for lines in store.passages():
            stream.write(lines)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(out / PASSAGES)
    sync(out)
    store.publish()
    report.changed = True
