"""What a folder holds: files to read, by kind, and what is not read and why."""

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
"""Suffix in lower case -> kind of file. A name without a suffix (README) is text."""
OTHER = "other"
_OLD_OFFICE = {".doc": ".docx", ".ppt": ".pptx", ".xls": ".xlsx"}


@dataclass(frozen=True, slots=True)
class Found:
    """A file to read."""

    name: str
    """Path below its folder, with slashes; of several folders, behind the folder's name."""
    path: Path
    kind: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """What is not read, or has nothing to read, and why."""

    name: str
    kind: str
    reason: str
    status: str = "skipped"


@dataclass(slots=True)
class Folder:
    """The content of one or more folders, sorted by name."""

    files: list[Found] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def walk(folders: Sequence[Path], out: Path, exclude: Sequence[str] = ()) -> Folder:
    """Everything in and below ``folders``, each directory once, without ``out`` and hidden names.

    ``exclude``: patterns of ``fnmatch`` that a name (``*.log``) or a path below the folder (``old/*``) matches.

    Raises:
        ConfigError: two folders have the same name.
        DataError: a folder cannot be opened, or nothing is in it.
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
        visited.add(_identity(out.stat()))  # else each run would read the passages of the last
    waiting, linked = [(folder, prefix)], list[tuple[Path, str]]()
    while waiting or linked:
        if waiting:
            directory, before = waiting.pop()
        else:  # after all folders themselves, so that a file goes by the name of its place
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
            if any(fnmatch.fnmatch(part, pattern) for pattern in exclude for part in (_text(entry.name), name)):
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
        found.skipped.append(Skipped(name, OTHER, f"{suffix} is no kind of document that is read"))
    else:
        found.files.append(Found(name, path, KINDS.get(suffix, "text"), about.st_size, about.st_mtime_ns))


def _identity(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino


def _text(name: str) -> str:
    """A file name as text; bytes that are no UTF-8 as ``\\xe9``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def kinds() -> Iterator[str]:
    """Kinds in the order in which tables show them."""
    yield from _SUFFIXES
    yield OTHER
