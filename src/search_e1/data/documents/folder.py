"""Lists a folder: files to read, by kind, and skipped entries with reasons."""

import fnmatch
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from search_e1.errors import ConfigError, DataError

_SUFFIXES = {
    "markdown": ".md .markdown .mdx .mkd",
    "text": ".txt .text .rst .adoc .org .log .tex",
    "html": ".html .htm .xhtml",
    "pdf": ".pdf",
    "docx": ".docx .docm",
    "pptx": ".pptx .pptm",
    "xlsx": ".xlsx .xlsm",
    "epub": ".epub",
    "mail": ".eml",
    "table": ".csv .tsv",
    "code": ".py .pyi .js .mjs .ts .tsx .jsx .java .kt .scala .c .h .cc .cpp .cxx .hpp .cs .go .rs .rb .php .pl .lua .r .jl .m "
    ".swift .dart .sh .bash .ps1 .bat .sql .css .scss .vue .svelte .json .yaml .yml .toml .ini .cfg .conf .xml .proto .ipynb "
    ".cmake .gradle .tf .ex .exs .erl .hs .ml .clj .f90 .zig",
}
KINDS = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
"""Lower-case suffix -> kind of file. A file without a suffix (README) is text."""
OTHER = "other"
_OLD_OFFICE = {".doc": ".docx", ".ppt": ".pptx", ".xls": ".xlsx"}


@dataclass(frozen=True, slots=True)
class Found:
    """A file to read."""

    name: str
    """Path below its folder, with slashes; prefixed with the folder's name if there are several."""
    path: Path
    kind: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """An entry that was not read or yielded no passages, and the reason."""

    name: str
    kind: str
    reason: str
    status: str = "skipped"


@dataclass(slots=True)
class Folder:
    """The contents of one or more folders, sorted by name."""

    files: list[Found] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def walk(folders: Sequence[Path], out: Path, exclude: Sequence[str] = ()) -> Folder:
    """Everything in and below ``folders``, each directory once; ``out`` is left out, hidden names are skipped.

    ``exclude``: ``fnmatch`` patterns for names (``*.log``) or paths below the folder (``old/*``).

    Raises:
        ConfigError: two folders have the same name.
        DataError: a folder does not exist, or all are empty.
    """
    prefixes = [f"{folder.resolve().name}/" if len(folders) > 1 else "" for folder in folders]
    if len(set(prefixes)) < len(folders):
        raise ConfigError(f"{' and '.join(map(str, folders))}: folders of the same name; give the folder that holds them")
    found = Folder()
    for folder, prefix in zip(folders, prefixes, strict=True):
        if not folder.is_dir():
            raise DataError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; give one with documents")
        _walk(folder, prefix, out, exclude, found)
    if not found.files and not found.skipped:
        raise DataError(f"{', '.join(map(str, folders))}: an empty folder; give one with documents")
    found.files.sort(key=lambda file: file.name)
    found.skipped.sort(key=lambda entry: entry.name)
    return found


def _walk(folder: Path, prefix: str, out: Path, exclude: Sequence[str], found: Folder) -> None:
    visited = {_identity(folder.stat())}
    if out.exists():
        visited.add(_identity(out.stat()))  # else each run would read the last run's passages
    waiting, linked = [(folder, prefix)], list[tuple[Path, str]]()
    while waiting or linked:
        if waiting:
            directory, before = waiting.pop()
        else:  # links come after all real folders, so that a file is named by its real path
            directory, before = linked.pop()
            if _identity(directory.stat()) in visited:
                if not (out.exists() and out.samefile(directory)):
                    reason = "a symbolic link to a folder that is read already"
                    found.skipped.append(Skipped(before.rstrip("/"), OTHER, reason))
                continue
            visited.add(_identity(directory.stat()))
        try:
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            found.skipped.append(Skipped(before, OTHER, f"a folder that cannot be opened ({error.strerror})"))
            continue
        for entry in entries:
            name = before + _text(entry.name)
            names = (_text(entry.name), name, name.removeprefix(prefix))
            if any(fnmatch.fnmatch(part, pattern) for pattern in exclude for part in names):
                found.skipped.append(Skipped(name, OTHER, "excluded"))
                continue
            if entry.name.startswith("."):
                found.skipped.append(Skipped(name, OTHER, "hidden"))
                continue
            try:
                about = entry.stat()
            except OSError as error:
                broken = entry.is_symlink() and not Path(entry.path).exists()
                reason = "a symbolic link that leads nowhere" if broken else f"cannot be read ({error.strerror})"
                found.skipped.append(Skipped(name, OTHER, reason))
                continue
            if not stat.S_ISDIR(about.st_mode):
                _add(Path(entry.path), name, about, found)
            elif entry.is_symlink():
                linked.append((Path(entry.path), name + "/"))
            elif _identity(about) not in visited:
                visited.add(_identity(about))
                waiting.append((Path(entry.path), name + "/"))


def _add(path: Path, name: str, about: os.stat_result, found: Folder) -> None:
    suffix = path.suffix.lower()
    if not stat.S_ISREG(about.st_mode):
        found.skipped.append(Skipped(name, OTHER, "not a regular file"))
    elif suffix in _OLD_OFFICE:
        found.skipped.append(Skipped(name, OTHER, f"{suffix} is an old format; save it as {_OLD_OFFICE[suffix]}"))
    elif suffix and suffix not in KINDS:
        found.skipped.append(Skipped(name, OTHER, f"{suffix} files are not supported"))
    else:
        found.files.append(Found(name, path, KINDS.get(suffix, "text"), about.st_size, about.st_mtime_ns))


def _identity(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino


def _text(name: str) -> str:
    """A file name as text; bytes that are not UTF-8 as ``\\xe9``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def kinds() -> Iterator[str]:
    """All kinds, in display order."""
    yield from _SUFFIXES
    yield OTHER
