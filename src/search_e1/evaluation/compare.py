"""Policies side by side on the same questions: paired differences, their intervals, and McNemar's test.

The first policy is the baseline; the others are compared with it, question by question.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from search_e1 import runs
from search_e1.config import RolloutConfig
from search_e1.errors import ConfigError, DataError
from search_e1.evaluation import published as tables
from search_e1.evaluation import results
from search_e1.evaluation.failures import Failure
from search_e1.evaluation.results import COUNTS, FIGURES, Result
from search_e1.evaluation.statistics import Interval, interval, mcnemar, share_interval
from search_e1.types import Record

MACRO, MICRO = "macro average", "micro average"
_SHOWN_IDS = 3
_NOT_PROTOCOL = ("batch_size",)  # settings of a rollout that do not affect its results


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One policy's evaluation, read from its artifact."""

    name: str
    path: Path
    results: dict[tuple[str, str], Result]
    """By benchmark and question id, in the order of the file."""
    protocol: dict[str, Any]
    """Settings that must agree for figures to be comparable: limits, answer language, prompts, retrieval."""


class Figure(Record):
    """A mean over questions, with its 95% interval: see ``statistics``."""

    mean: float
    interval: Interval

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.mean:.3f} ({low:.3f} to {high:.3f})"


class Difference(Record):
    """A policy's figures minus the baseline's on the same questions; intervals are paired."""

    em: Figure
    f1: Figure
    cover_em: Figure
    searches: Figure
    tokens: Figure
    won: int
    """Questions that only the policy answers right; ``lost``: only the baseline."""
    lost: int
    p: float | None
    """McNemar's exact two-sided p-value; ``None`` for a macro average, which weights questions unequally."""


class Row(Record):
    """One policy on one benchmark, or averaged over benchmarks."""

    benchmark: str
    """A benchmark's name, ``MACRO`` (benchmarks weighted equally) or ``MICRO`` (questions weighted equally)."""
    policy: str
    n: int
    em: Figure
    em_sampled: Figure | None
    f1: Figure
    cover_em: Figure
    searches: Figure
    tokens: Figure
    difference: Difference | None
    """``None`` for the baseline."""


class Change(Record):
    """A question that a policy wins or loses against the baseline."""

    policy: str
    won: bool
    benchmark: str
    id: str
    question: str
    answers: tuple[str, ...]
    before: str | None
    """The baseline's answer."""
    after: str | None
    failure: Failure
    """Failure class of the wrong answer."""


class Comparison(Record):
    """Rows, changed questions, published figures, notes."""

    policies: tuple[str, ...]
    """The first is the baseline."""
    rows: tuple[Row, ...]
    """By benchmark, then by policy; averages last."""
    changes: tuple[Change, ...]
    published: tuple[tables.Row, ...]
    """EM x 100 as others report it, possibly on other questions; empty unless requested."""
    notes: tuple[str, ...]
    """Caveats: excluded questions, mixed protocols."""


def load(path: Path, name: str) -> Evaluated:
    """The evaluation artifact in ``path``.

    Raises:
        RunError: it is not a complete artifact, or is damaged.
        DataError: it is not an evaluation, or one of its lines is damaged.
    """
    manifest = runs.read(path).manifest
    if results.QUESTIONS not in manifest.files:
        raise DataError(f"{path}: no {results.QUESTIONS} in it; give an artifact of `search-e1 evaluate`")
    # An older evaluation lacks newer settings; it ran with what is now their default.
    rollout = RolloutConfig().model_dump(mode="json") | manifest.settings["rollout"]
    limits = {k: v for k, v in rollout.items() if k not in _NOT_PROTOCOL}
    prompts = manifest.settings.get("prompts")
    return Evaluated(
        name,
        path,
        {(result.benchmark, result.id): result for result in results.read(path / results.QUESTIONS)},
        {"rollout": limits, "prompts": prompts, "retrieval": manifest.inputs["retrieval"]},
    )


def compare(
    evaluated: Sequence[Evaluated],
    *,
    common: bool = False,
    allow_mixed: bool = False,
    published: bool = False,
    seed: int = 0,
) -> Comparison:
    """``evaluated`` side by side; the first is the baseline.

    Args:
        common: restrict the comparison to the questions shared by all.
        allow_mixed: compare even if limits, prompts or retrieval differ.
        published: add the published rows, over the same benchmarks.
        seed: seeds the bootstrap.

    Raises:
        ConfigError: two names are equal, protocols differ without ``allow_mixed``, questions differ without ``common``, or no
            question is shared.
    """
    names = [one.name for one in evaluated]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"two evaluations are called {twice!r}; name one of them: NAME=PATH")
    notes = mixed(evaluated, allow_mixed)
    evaluated, left_out = _over_the_same(evaluated, common)
    parts = _parts(evaluated)
    rows = [_row(benchmark, one, evaluated[0], keys, seed) for benchmark, keys in parts.items() for one in evaluated]
    others = tables.comparison(dict.fromkeys(parts, 0.0))[:-1] if published else []
    if published and not others:
        left_out.append("nothing is published for these benchmarks")
    return Comparison(
        policies=tuple(names),
        rows=tuple(rows),
        changes=tuple(change for one in evaluated[1:] for change in _changes(one, evaluated[0])),
        published=tuple(others),
        notes=(*notes, *left_out),
    )


def mixed(evaluated: Sequence[Evaluated], allowed: bool) -> list[str]:
    """How each protocol differs from the first, one line per difference.

    Raises:
        ConfigError: a protocol differs, and that is not ``allowed``.
    """
    first, notes = evaluated[0], []
    for other in evaluated[1:]:
        if other.protocol != first.protocol:
            found = _differences(first.protocol, other.protocol, (first.name, other.name))
            if not allowed:
                raise ConfigError(
                    f"{first.name} and {other.name} were evaluated under different protocols: {found}; "
                    "evaluate them alike, or give --allow-mixed"
                )
            notes.append(f"mixed protocols: {found}")
    return notes


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str], prefix: str = "") -> str:
    found = []
    for key in sorted({*a, *b}):
        one, other = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += [_differences(one, other, names, f"{prefix}{key}.")] if one != other else []
        elif one != other:
            found.append(f"{prefix}{key} ({_short(one)} for {names[0]}, {_short(other)} for {names[1]})")
    return ", ".join(found)


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 24 else f"{text[:21]}..."


def _over_the_same(evaluated: Sequence[Evaluated], common: bool) -> tuple[list[Evaluated], list[str]]:
    """``evaluated`` restricted to the questions shared by all, and a note on what each loses."""
    same = [
        key for key, result in evaluated[0].results.items()
        if all(_asked(other.results.get(key)) == _asked(result) for other in evaluated[1:])
    ]  # fmt: skip
    left_out = [_left_out(one, set(same)) for one in evaluated if len(one.results) > len(same)]
    if left_out and not common:
        hint = "give --common to compare over the others" if same else "they have none in common"
        raise ConfigError(f"the questions differ: {'; '.join(left_out)}; {hint}")
    if not same:
        raise ConfigError("the evaluations have no question in common; evaluate them on the same benchmarks")
    return [replace(one, results={key: one.results[key] for key in same}) for one in evaluated], left_out


def _asked(result: Result | None) -> tuple[str, frozenset[str]] | None:
    """The identity of a question: its text and its answers."""
    return (result.question, frozenset(result.answers)) if result else None


def _left_out(one: Evaluated, same: set[tuple[str, str]]) -> str:
    """By benchmark, the number and ids of the questions in ``one`` that are missing or different in the others."""
    missing: dict[str, list[str]] = {}
    for benchmark, id in one.results:
        if (benchmark, id) not in same:
            missing.setdefault(benchmark, []).append(id)
    parts = [
        f"{len(ids)} of {benchmark} ({', '.join(ids[:_SHOWN_IDS])}{', ...' if len(ids) > _SHOWN_IDS else ''})"
        for benchmark, ids in missing.items()
    ]
    return f"{one.name} has {', '.join(parts)} that the others lack or have differently"


Keys = list[list[tuple[str, str]]]


def _parts(evaluated: Sequence[Evaluated]) -> dict[str, Keys]:
    """Benchmark -> its questions; then, with several benchmarks, the averages."""
    by_benchmark: dict[str, list[tuple[str, str]]] = {}
    for key in evaluated[0].results:
        by_benchmark.setdefault(key[0], []).append(key)
    parts: dict[str, Keys] = {name: [keys] for name, keys in by_benchmark.items()}
    if len(parts) > 1:
        parts |= {MACRO: list(by_benchmark.values()), MICRO: [list(evaluated[0].results)]}
    return parts


def _row(benchmark: str, one: Evaluated, baseline: Evaluated, keys: Keys, seed: int) -> Row:
    parts = [[one.results[key] for key in part] for part in keys]
    sampled = all(result.em_of_samples for part in parts for result in part)
    return Row(
        benchmark=benchmark,
        policy=one.name,
        n=sum(map(len, parts)),
        **{name: _figure(name, parts, attrgetter(name), seed) for name in FIGURES},
        em_sampled=_figure("em_sampled", parts, lambda result: fmean(result.em_of_samples), seed) if sampled else None,
        difference=None if one is baseline else _difference(benchmark, one, baseline, keys, seed),
    )


def _difference(benchmark: str, one: Evaluated, baseline: Evaluated, keys: Keys, seed: int) -> Difference:
    pairs = [[(one.results[key], baseline.results[key]) for key in part] for part in keys]
    em = [(after.em, before.em) for part in pairs for after, before in part]
    won, lost = sum(after > before for after, before in em), sum(after < before for after, before in em)

    def of(name: str) -> Callable[[tuple[Result, Result]], float]:
        return lambda pair: getattr(pair[0], name) - getattr(pair[1], name)

    return Difference(
        **{name: _figure(name, pairs, of(name), seed, least=-1.0) for name in FIGURES},
        won=won,
        lost=lost,
        p=None if benchmark == MACRO else mcnemar(won, lost),
    )


def _figure(name: str, parts: Sequence[Sequence[Any]], value: Callable[[Any], float], seed: int, least: float = 0.0) -> Figure:
    values = [[value(item) for item in part] for part in parts]
    ends = interval(*values, seed=seed) if name in COUNTS else share_interval(*values, seed=seed, least=least)
    return Figure(mean=fmean(map(fmean, values)), interval=ends)


def _changes(one: Evaluated, baseline: Evaluated) -> list[Change]:
    """Wins first, in the order of the questions."""
    found = []
    for key, after in one.results.items():
        before = baseline.results[key]
        if after.em == before.em:
            continue
        won = after.em > before.em
        failure = before.failure if won else after.failure
        assert failure is not None
        change = Change(
            policy=one.name, won=won, benchmark=after.benchmark, id=after.id, question=after.question,
            answers=after.answers, before=before.answer, after=after.answer, failure=failure,
        )  # fmt: skip
        found.append(change)
    return sorted(found, key=lambda change: not change.won)
