"""Trajectories and pairs for the page: text without token ids, each question and passage stored once.

Trajectories come from three sources: evaluations (greedy), pools, and the groups that GRPO keeps (both sampled).
"""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_e1.errors import DataError
from search_e1.evaluation.report.files import Run, Stage, policy_of, read_json, read_lines
from search_e1.text.prompts import seen_passages
from search_e1.types import ActionKind

_STOPS = {
    "answered": "wrong answer",
    "max_turns": "out of searches",
    "max_tokens": "out of tokens",
    "malformed": "no action",
    "refused": "refused",
}
RIGHT = "right"
EVALUATION, POOL, GRPO = "evaluation", "pool", "GRPO"
_GROUPS = "groups.jsonl"
_QUESTION = b'{"question":'
_DECODER = json.JSONDecoder()


@dataclass(slots=True)
class Evaluated:
    """The greedy outcome of every question of one evaluation, including questions that the page leaves out."""

    policy: str
    correct: dict[str, bool] = field(default_factory=dict)
    """Benchmark and question id -> whether the answer is right."""


@dataclass(slots=True)
class _Table:
    """Distinct values and their indices."""

    values: list[Any] = field(default_factory=list)
    _at: dict[str, int] = field(default_factory=dict)

    def add(self, key: str, value: Any) -> int:
        if key not in self._at:
            self._at[key] = len(self.values)
            self.values.append(value)
        return self._at[key]


class Collector:
    """Collects the questions, passages, trajectories and pairs of the page."""

    def __init__(self) -> None:
        self._questions = _Table()
        self._passages = _Table()
        self.trajectories: list[dict[str, Any]] = []
        self.pairs: list[dict[str, Any]] = []
        self.left_out: list[int] = []
        """For each run, the number of trajectories beyond the limit."""

    def records(self) -> dict[str, Any]:
        """Everything collected, in the page's format."""
        return {
            "questions": self._questions.values,
            "passages": self._passages.values,
            "trajectories": self.trajectories,
            "pairs": self.pairs,
        }

    def add(self, run: Run, most: int) -> list[Evaluated]:
        """Add the trajectories of ``run``, at most about ``most``, and the pairs that its leads were measured on.

        Beyond ``most``, questions are sampled by a hash of their ids: the same questions in every evaluation, so that policies
        are comparable. Each source gets an equal part of ``most``; what one does not need goes to the others.
        """
        number, before = len(self.left_out), len(self.trajectories)
        sampled = {kind: _sampled(run, kind) for kind in (POOL, GRPO)}
        totals = [sum(read_json(stage.path / "evaluation.json")["n"] for stage in run.evaluations)]
        totals += [sum(_count(stage.path / _GROUPS) for stage in stages.values()) for stages in sampled.values()]
        share, *shares = _shares(totals, most)
        evaluated = [self._evaluation(number, stage, share) for stage in run.evaluations]
        for (kind, stages), part in zip(sampled.items(), shares, strict=True):
            for round, stage in stages.items():
                self._groups(number, kind, round, stage, part)
        self.left_out.append(sum(totals) - (len(self.trajectories) - before))
        self._pairs(number, run)
        return evaluated

    def _evaluation(self, number: int, stage: Stage, share: float) -> Evaluated:
        made = Evaluated(policy_of(stage))
        judged = {_key(row): row for row in read_lines(stage.path / "questions.jsonl")}
        for group in read_lines(stage.path / "trajectories.jsonl"):
            question, [trajectory] = group["question"], group["trajectories"]
            key = _key(question)
            made.correct[key] = trajectory["reward"] >= 1
            if not _shown(key, share):
                continue
            row = judged.get(key, {})
            failure = row.get("failure") or _STOPS[trajectory["stop_reason"]]
            self.trajectories.append(
                {"run": number, "source": EVALUATION, "stage": made.policy, "question": self._question(question)}
                | {"class": RIGHT if made.correct[key] else failure.replace("_", " "), "recall": _recall(row)}
                | self._trajectory(trajectory)
            )
        return made

    def _groups(self, number: int, kind: str, round: int, stage: Stage, share: float) -> None:
        for group in read_lines(stage.path / _GROUPS, lambda line: _is_shown(line, share)):
            question = self._question(group["question"])
            for i, trajectory in enumerate(group["trajectories"], 1):
                shown = self._trajectory(trajectory)
                self.trajectories.append(
                    {"run": number, "source": kind, "stage": stage.name, "round": round, "sample": i, "question": question}
                    | {"class": RIGHT if shown["right"] else _STOPS[trajectory["stop_reason"]], "recall": None}
                    | shown
                )

    def _pairs(self, number: int, run: Run) -> None:
        for round, stage in run.of_rounds("pairs").items():
            measured = {row["question_id"]: row for row in _divergences(run, round)}
            for pair in _first_of_question(read_lines(stage.path / "held_out.jsonl")):
                student = self._trajectory(pair["student"])
                divergence = measured.get(pair["question"]["id"])
                self.pairs.append(
                    {
                        "run": number,
                        "round": round,
                        "question": self._question(pair["question"]),
                        "reference": self._trajectory(pair["reference"]),
                        "student": student,
                        "lengths": [len(turn["action_ids"]) for turn in pair["student"]["turns"]],
                        "kl": divergence and {k: v for k, v in divergence.items() if k != "question_id"},
                    }
                )

    def _question(self, question: Mapping[str, Any]) -> int:
        shown = {k: question[k] for k in ("id", "text", "answers", "benchmark", "hops")}
        return self._questions.add(json.dumps(shown, sort_keys=True), shown)  # runs may use an id for different questions

    def _trajectory(self, trajectory: Mapping[str, Any]) -> dict[str, Any]:
        turns = trajectory["turns"]
        return {
            "right": trajectory["reward"] >= 1,
            "f1": round(trajectory["f1"], 4),
            "answer": trajectory["answer"],
            "stop": trajectory["stop_reason"],
            "searches": sum(turn["kind"] == "search" and bool(turn["observation_ids"]) for turn in turns),
            "tokens": sum(len(turn["action_ids"]) for turn in turns),
            "turns": [self._turn(turn) for turn in turns],
        }

    def _turn(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        shown: dict[str, Any] = {"kind": turn["kind"], "text": turn["action_text"], "argument": turn["argument"]}
        if turn.get("tool"):
            shown["tool"] = turn["tool"]
        passages = list(_documents(turn)) if ActionKind(turn["kind"]).is_call else []
        if passages or (turn["kind"] == "search" and turn["observation_ids"]):
            shown["passages"] = [self._passages.add(f"{id}\n{text}", [id, text]) for id, text in passages]
        elif turn["observation_text"]:
            shown["said"] = turn["observation_text"]
        return shown


def _key(question: Mapping[str, Any]) -> str:
    return f"{question['benchmark']}\n{question['id']}"


def _shown(key: str, share: float) -> bool:
    return zlib.crc32(key.encode()) < share * 2**32


def _is_shown(line: bytes, share: float) -> bool:
    """Whether the group on ``line`` is shown. Parses only its question, since most lines of a large pool are not shown."""
    if not line.startswith(_QUESTION):
        return True
    try:
        question, _ = _DECODER.raw_decode(line.decode(), len(_QUESTION))
        return _shown(_key(question), share)
    except (ValueError, LookupError, TypeError):  # damage is reported where the line is parsed
        return True


def _shares(totals: Sequence[int], most: int) -> list[float]:
    """The share of each source that is shown."""
    shares, left = [1.0] * len(totals), most
    for place, i in enumerate(sorted(range(len(totals)), key=totals.__getitem__)):
        part = min(totals[i], left // (len(totals) - place))
        left -= part
        shares[i] = part / totals[i] if totals[i] else 1.0
    return shares


def _sampled(run: Run, kind: str) -> dict[int, Stage]:
    """Round -> the stage with stored groups. A pool that GRPO sampled is shown as GRPO's."""
    stages = run.of_rounds(kind.lower())
    if kind == POOL:
        stages = {n: stage for n, stage in stages.items() if stage.manifest.settings["pool"].get("source") != "grpo"}
    return {round: stage for round, stage in stages.items() if (stage.path / _GROUPS).is_file()}


def _count(groups: Path) -> int:
    """Number of trajectories in a file of groups, which all have one size."""
    with groups.open("rb") as file:
        first = file.readline()
        lines = bool(first) + sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    try:
        return lines * len(json.loads(first)["trajectories"]) if lines else 0
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{groups}:1: damaged; remove {groups.parent} and run the stage again") from error


def _recall(row: Mapping[str, Any]) -> dict[str, bool] | None:
    """Where an answer occurs, as far as measured: ``read``, ``in_topk``, ``in_corpus``."""
    known = {name: row[name] for name in ("read", "in_topk", "in_corpus") if row.get(name) is not None}
    return known or None


def _divergences(run: Run, round: int) -> Iterator[Any]:
    lead = run.of_rounds("lead").get(round)
    return read_lines(lead.path / "kl.jsonl") if lead else iter(())


def _first_of_question(pairs: Iterator[Any]) -> Sequence[Any]:
    """The first pair of each question. A question's pairs share their reference; the lead is measured on the first."""
    first: dict[str, Any] = {}
    for pair in pairs:
        first.setdefault(pair["question"]["id"], pair)
    return list(first.values())


def _documents(turn: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Id and text (``(Title: ...) ...``) of each passage as the policy read it, truncations included."""
    lines = [line[line.index("(") :] for line in seen_passages(turn["observation_text"])]
    # A long observation is truncated: the last passages may be missing.
    return zip(turn["passage_ids"], lines, strict=False)
