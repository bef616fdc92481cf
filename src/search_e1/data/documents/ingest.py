"""A folder's files become a corpus; run again, it follows the folder: only new and changed files are read."""

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
    """What one run did."""

    files: Counter[str] = field(default_factory=Counter)
    """Kind -> files of the folder."""
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """``read`` (now), ``unchanged``, ``duplicate``, ``empty``, ``skipped`` -> kind -> files."""
    passages: Counter[str] = field(default_factory=Counter)
    """Kind -> passages of the corpus."""
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Kind -> seconds of reading, over all processes."""
    not_read: list[Skipped] = field(default_factory=list)
    """Files without passages, and files of which a part was not read, by name."""
    removed: int = 0
    """Files of the last run that are gone."""
    all_again: bool = False
    """Other settings than the last run's: what it had read was read again."""
    changed: bool = False
    """The corpus was written."""
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
    """Make ``out`` the corpus of ``folders``, or bring it up to date.

    ``out/passages.jsonl`` is replaced as a whole, after all files were read; an interrupted run goes on where it was.
    ``exclude``: see ``walk``. ``processes`` read files in parallel.

    Raises:
        ConfigError: a package is missing, or ``out`` holds something else.
        DataError: a folder is not there or empty, or no file has any text; the corpus stays as it was.
        RunError: another process works in ``out``, or its disk is full.
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
            if _same(file):
                store.put(file, sums[file.name], outcome, limits.model_dump_json())
                report.counts[READ][file.kind] += outcome.status == READ
            else:
                folder.skipped.append(Skipped(file.name, file.kind, "changed while it was read; run the same command again"))
                store.forget([file.name])
            report.seconds[file.kind] += outcome.seconds
            progress(number, todo, file.name)
        _tell(report, store.known(), folder.skipped, {file.name for file in reading})
        _publish(out, store, report)
    report.elapsed = time.perf_counter() - clock
    return report


def check_extra() -> None:
    """Raise ``ConfigError`` if a package of the extra ``documents`` is missing."""
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
        raise ConfigError(f"--out {out}: the folder that is read; give another directory, which may be inside it")
    if out.is_dir() and not (out / FILE).exists() and any(not file.name.startswith(".") for file in out.iterdir()):
        raise ConfigError(f"--out {out}: holds something else than a corpus of `data ingest`; give a new directory")


def _checksums(
    files: Sequence[Found], known: dict[str, Known], limits: Limits, skipped: list[Skipped]
) -> Iterator[tuple[str, str]]:
    """Name and sha256 of each file that can be read; those that are as they were need not be read for it."""
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
    """The files of which nothing is known, one for each content; duplicates are noted in ``store``."""
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


def _same(file: Found) -> bool:
    """Whether the file is still the one that its checksum was computed of."""
    try:
        about = file.path.stat()
    except OSError:
        return False
    return (about.st_size, about.st_mtime_ns) == (file.size, file.mtime_ns)


def _tell(report: Report, rows: dict[str, Known], skipped: Sequence[Skipped], now: set[str]) -> None:
    """Fill ``report`` from what is known after the run."""
    for entry in skipped:
        report.counts[SKIPPED][entry.kind] += 1
        report.files[entry.kind] += 1
    told = list(skipped)
    for row in rows.values():
        report.files[row.kind] += 1
        report.passages[row.kind] += row.passages
        if row.status == READ and row.name not in now:
            report.counts["unchanged"][row.kind] += 1
        elif row.status != READ:
            report.counts[SKIPPED if row.status == FAILED else row.status][row.kind] += 1
        if row.status != READ or row.reason:
            status = {READ: "in part", FAILED: SKIPPED}.get(row.status, row.status)
            told.append(Skipped(row.name, row.kind, row.reason, status))
    report.not_read = sorted(told, key=lambda entry: entry.name)


def _publish(out: Path, store: Store, report: Report) -> None:
    """Write the list of what was not read, and the passages, if they are others than those that lie there."""
    table = io.StringIO()
    writer = csv.writer(table, delimiter="\t", lineterminator="\n")
    writer.writerow(("status", "file", "reason"))
    writer.writerows((entry.status, entry.name, entry.reason) for entry in report.not_read)
    write_atomically(out / NOT_READ, table.getvalue())
    if not report.passages.total():
        raise DataError(f"no file has any text ({sum(report.files.values())} looked at); {out / NOT_READ} says why of each")
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
