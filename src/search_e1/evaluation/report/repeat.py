"""How to repeat a run: its config as TOML, the commands, and the differences between the configs of several runs."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tomli_w

from search_e1.evaluation.report.files import Run
from search_e1.runs.safe import HIDDEN, masked

_HEAD = """\
# The config of the run {name}, every key with its value. `run` names another directory, so that the two can be compared.
# Not kept in a run, since they change no result: [parallel], [tracking], [checkpoints], and where servers are.
"""


def repeat(run: Run) -> dict[str, str] | None:
    """``toml``, the ``file`` to save it as, and the ``commands``; ``None`` for a run without a config."""
    if not run.config:
        return None
    name = run.path.resolve().name
    file, place, there = f"{name}.toml", f"runs/{name}-again", str(run.path)
    text = _HEAD.format(name=" ".join(name.split())) + tomli_w.dumps({"run": place, **_without_none(masked(run.config))})
    if HIDDEN in text:
        text = f"# {HIDDEN} stands for a secret, which a run does not store: set it.\n{text}"
    commands = (
        ("train", file),
        ("compare", there, place),
        ("report", there, place, "--out", f"{name}-again.html"),
    )
    return {"toml": text, "file": file, "commands": "".join(f"{shlex.join(('search-e1', *words))}\n" for words in commands)}


def _without_none(value: Any) -> Any:
    """``value`` without nulls. TOML has none; an absent key has its default, which is what null stands for in a config."""
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The keys whose values differ between the runs: ``key``, and ``values`` in the order of the runs, as JSON.

    ``None`` stands for a key that is not set.
    """
    flat = [dict(_flat(masked(run.config), "")) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [{"key": key, "values": [one.get(key) for one in flat]} for key in keys]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif value is not None:
        yield prefix, json.dumps(value, ensure_ascii=False)
