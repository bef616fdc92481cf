"""Finds evaluations by what users name: a directory, a run, or a stage of a run."""

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path

from search_e1.errors import ConfigError, RunError
from search_e1.evaluation.report.files import open_run, policy_of
from search_e1.runs import MANIFEST

logger = logging.getLogger(__name__)
_PREFIX = "evaluation-"


def places(words: Sequence[str]) -> dict[str, Path]:
    """Name -> directory of each evaluation in ``words``. Names are as short as possible while unambiguous.

    Raises:
        ConfigError: a name occurs twice.
        RunError: no such run, evaluation or stage; lists the alternatives.
    """
    found = [item for word in words for item in _places(word)]
    short = [name or path.name.removeprefix(_PREFIX) for name, path in found]
    names = [
        name if given or short.count(name) == 1 else f"{path.resolve().parent.name}/{name}"
        for name, (given, path) in zip(short, found, strict=True)
    ]
    for name, (_, path) in zip(names, found, strict=True):
        if names.count(name) > 1:
            raise ConfigError(f"two evaluations are called {name!r}; give this one another name: NAME={path}")
    return {name: path for name, (_, path) in zip(names, found, strict=True)}


def _places(word: str) -> list[tuple[str, Path]]:
    """The evaluations that ``word`` refers to, each with the name that it gives, if any."""
    name, equals, place = word.partition("=")
    if not equals or "/" in name:
        name, place = "", word
    path = Path(place)
    if (path / MANIFEST).is_file():
        return [(name, path)]
    if path.is_dir():
        evaluated, begun = _evaluations(path)
        if name and len(evaluated) > 1:
            raise ConfigError(
                f"{word}: {path} has {len(evaluated)} evaluations; name one: {name}={path}:{next(iter(evaluated))}"
            )
        if begun:
            logger.warning("%s: not finished, left out: %s", path, ", ".join(begun))
        return [(name, directory) for directory in evaluated.values()]
    run, colon, stage = place.rpartition(":")
    if not colon or not Path(run).is_dir():
        raise RunError(f"{place}: no such directory; give an evaluation's directory, RUN:STAGE, or RUN")
    evaluated, begun = _evaluations(Path(run))
    stage = stage.removeprefix(_PREFIX)
    if stage not in evaluated:
        close = difflib.get_close_matches(stage, evaluated, n=1)
        known = f"available: {', '.join(evaluated)}"
        hint = "it is not finished" if stage in begun else f"did you mean {close[0]!r}?" if close else known
        raise RunError(f"{run}: no evaluation of {stage!r} in it; {hint}")
    return [(name, evaluated[stage])]


def _evaluations(run: Path) -> tuple[dict[str, Path], list[str]]:
    """Policy -> its evaluation, in loop order; and the policies whose evaluation is unfinished.

    Raises:
        RunError: ``run`` is not a run, or has no evaluation.
    """
    opened = open_run(run)
    if not opened.evaluations:
        raise RunError(f"{run}: nothing in it is evaluated yet; run `search-e1 evaluate`, or wait")
    begun = [stage.removeprefix(_PREFIX) for stage in opened.begun if stage.startswith(_PREFIX)]
    return {policy_of(stage): stage.path for stage in opened.evaluations}, begun
