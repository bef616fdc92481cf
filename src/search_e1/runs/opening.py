"""Open a run directory: for one process, under the config and package versions that it was started with."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from search_e1.errors import RunError
from search_e1.runs import artifacts, day, disk, locks, ranks
from search_e1.runs.drift import changes, lines
from search_e1.runs.files import write_atomically
from search_e1.runs.safe import masked

CONFIG = "config.json"
_VERSIONS = "versions.json"


@contextmanager
def opened(
    directory: Path,
    config: Mapping[str, Any],
    *,
    migrate: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
    branch_of: Path | None = None,
    shared: Path | None = None,
    other_versions: bool = False,
) -> Iterator[Path]:
    """Lock the run directory for this process; creates it if new. Within the context the day is the run's (``runs.day``).

    Args:
        migrate: turns a config stored by an earlier version into what this version would store.
        branch_of: the run that this one branches off; its finished artifacts are reused if they would be made the same.
        shared: a directory where runs share artifacts that they would make the same.
        other_versions: resume under other versions of the packages that affect results.

    Raises:
        RunError: another process works in it, it belongs to another config, to other versions or to another origin, it
            cannot be written to, or its disk is full.
    """
    if not ranks.is_first():  # rank 0 holds the directory for all
        with disk.translate_disk_errors(directory), day.pin(ranks.broadcast_object(None) if ranks.is_joined() else None):
            yield directory
        return
    if branch_of:
        _check_branch(directory, branch_of)
    with locks.held(directory), disk.translate_disk_errors(directory):
        if branch_of:
            write_atomically(directory / artifacts.ORIGIN, json.dumps({"of": str(branch_of.resolve())}) + "\n")
        if shared:
            write_atomically(directory / artifacts.SHARED, json.dumps({"in": str(shared.resolve())}) + "\n")
        _check_config(directory, masked(json.loads(json.dumps(config, default=str))), migrate)
        _check_versions(directory, branch_of, other_versions)
        begun = _begun_on(directory, branch_of, shared)
        with day.pin(ranks.broadcast_object(begun) if ranks.is_joined() else begun):
            yield directory


def _check_branch(directory: Path, origin: Path) -> None:
    if not (origin / CONFIG).exists():
        raise RunError(f"{origin}: no run there to branch from; give its directory with --run, the new one with --branch")
    if directory.resolve() == origin.resolve():
        raise RunError(f"{directory}: a run cannot branch into its own directory; give another with --branch")
    if not directory.exists() or all(file.name.startswith(".") for file in directory.iterdir()):
        return  # new, or killed before it began
    try:
        known = json.loads((directory / artifacts.ORIGIN).read_text(encoding="utf-8"))["of"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        known = None
    if known != str(origin.resolve()):
        raise RunError(f"{directory}: already exists and is not a branch of {origin}; give a new directory with --branch")


def _check_config(directory: Path, config: dict[str, Any], migrate: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
    path = directory / CONFIG
    if not path.exists() or not any(_stages(directory)):
        # Nothing was made yet, so the config can still be corrected.
        write_atomically(path, json.dumps(config, indent=2) + "\n")
        return
    try:
        there = migrate(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError, RecursionError):
        raise RunError(f"{path}: damaged; use another run directory") from None
    if found := changes(there, config):
        raise RunError(
            f"{directory} belongs to another config; restore that, or set `run` to another directory, or continue in one that "
            f"keeps what the change does not affect (search-e1 train --branch DIR):{lines(found)}"
        )


def _check_versions(directory: Path, branch_of: Path | None, allowed: bool) -> None:
    """Refuse other versions: a run resumed under them, or a branch, is not bit-identical to an uninterrupted one."""
    here, there, begun = artifacts.versions(), _begun_with(directory), directory
    if branch_of and not there:
        there, begun = _begun_with(branch_of), branch_of
    both = here.keys() & there.keys()
    found = changes({key: there[key] for key in both}, {key: here[key] for key in both})
    if found and not allowed:
        raise RunError(
            f"{begun} was begun with other versions; install those, or continue with these anyway (search-e1 "
            f"--other-versions VERB ...), which mixes both in its results:{lines(found)}"
        )
    if found or not (directory / _VERSIONS).exists():
        write_atomically(directory / _VERSIONS, json.dumps(here, indent=2) + "\n")


def _begun_on(directory: Path, branch_of: Path | None, shared: Path | None) -> date:
    """The day recorded in ``directory``, else in ``shared``, else in ``branch_of``, else today; recorded for the run."""
    places = [place for place in (directory, shared, branch_of) if place]
    begun = next((found for place in places if (found := day.recorded(place))), None) or date.today()
    if shared:
        shared.mkdir(parents=True, exist_ok=True)
        begun = day.record(shared, begun)
    return day.record(directory, begun)


def _begun_with(directory: Path) -> dict[str, str]:
    """The versions accepted last; for a run started by an earlier version of the package, those of its last artifact."""
    try:
        found: dict[str, str] = json.loads((directory / _VERSIONS).read_text(encoding="utf-8"))
        return found
    except FileNotFoundError:
        made = [json.loads(path.read_text(encoding="utf-8")) for path in _stages(directory)]
        return max(made, key=lambda manifest: manifest["started"])["versions"] if made else {}
    except ValueError:
        raise RunError(f"{directory / _VERSIONS}: damaged; remove it to accept the installed versions") from None


def _stages(directory: Path) -> Iterator[Path]:
    """Manifests of finished stages, without the index, which depends only on the corpus."""
    return (path for path in directory.glob(f"*/{artifacts.MANIFEST}") if path.parent.name != "index")
