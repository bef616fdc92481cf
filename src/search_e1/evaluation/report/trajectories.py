"""Trajectories and pairs for the page: text without token ids; every question and passage is stored once."""

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from search_e1.evaluation.report.files import Run, Stage, policy_of, read_json, read_lines

_DOCUMENT = re.compile(r"Doc \d+(\(Title: .*)", re.DOTALL)
_STOPS = {
    "answered": "wrong answer",
    "max_turns": "out of searches",
    "max_tokens": "out of tokens",
    "malformed": "no action",
}
RIGHT = "right"


@dataclass(slots=True)
class Evaluated:
    """The greedy outcome of every question of one evaluation, including those the page leaves out."""

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
        self.left_out = 0
        """Trajectories beyond the limit."""

    def records(self) -> dict[str, Any]:
        """Everything, as the page reads it."""
        return {
            "questions": self._questions.values,
            "passages": self._passages.values,
            "trajectories": self.trajectories,
            "pairs": self.pairs,
        }

    def evaluations(self, run: Run, most: int) -> list[Evaluated]:
        """Add the greedy trajectories of all evaluations, at most about ``most``.

        Beyond that, questions are sampled by a hash of their ids: the same ones in every evaluation, so that policies compare.
        """
        total = sum(read_json(stage.path / "evaluation.json")["n"] for stage in run.evaluations)
        share = most / total if total > most else 1.0
        return [self._evaluation(stage, share) for stage in run.evaluations]

    def _evaluation(self, stage: Stage, share: float) -> Evaluated:
        made = Evaluated(policy_of(stage))
        judged = {_key(row): row for row in read_lines(stage.path / "questions.jsonl")}
        for group in read_lines(stage.path / "trajectories.jsonl"):
            question, [trajectory] = group["question"], group["trajectories"]
            key = _key(question)
            made.correct[key] = trajectory["reward"] >= 1
            if zlib.crc32(key.encode()) >= share * 2**32:
                self.left_out += 1
                continue
            row = judged.get(key, {})
            failure = row.get("failure") or _STOPS[trajectory["stop_reason"]]
            self.trajectories.append(
                {"stage": made.policy, "question": self._question(question)}
                | {"class": RIGHT if made.correct[key] else failure.replace("_", " "), "recall": _recall(row)}
                | self._trajectory(trajectory)
            )
        return made

    def held_out_pairs(self, run: Run) -> None:
        """Add the pairs that the leads were measured on, with the stored divergence of each token."""
        for number, stage in run.of_rounds("pairs").items():
            measured = {row["question_id"]: row for row in _divergences(run, number)}
            for pair in _first_of_question(read_lines(stage.path / "held_out.jsonl")):
                student = self._trajectory(pair["student"])
                divergence = measured.get(pair["question"]["id"])
                self.pairs.append(
                    {
                        "round": number,
                        "question": self._question(pair["question"]),
                        "reference": self._trajectory(pair["reference"]),
                        "student": student,
                        "lengths": [len(turn["action_ids"]) for turn in pair["student"]["turns"]],
                        "kl": divergence and {k: v for k, v in divergence.items() if k != "question_id"},
                    }
                )

    def _question(self, question: Mapping[str, Any]) -> int:
        shown = {k: question[k] for k in ("id", "text", "answers", "benchmark", "hops")}
        return self._questions.add(_key(question), shown)

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
        if turn["kind"] == "search" and turn["observation_ids"]:
            shown["passages"] = [self._passages.add(f"{id}\n{text}", [id, text]) for id, text in _documents(turn)]
        elif turn["observation_text"]:
            shown["said"] = turn["observation_text"]
        return shown


def _key(question: Mapping[str, Any]) -> str:
    return f"{question['benchmark']}\n{question['id']}"


def _recall(row: Mapping[str, Any]) -> dict[str, bool] | None:
    """Where an answer occurs, as far as it was measured: in what was ``read``, ``in_topk``, ``in_corpus``."""
    known = {name: row[name] for name in ("read", "in_topk", "in_corpus") if row.get(name) is not None}
    return known or None


def _divergences(run: Run, round: int) -> Iterator[Any]:
    lead = run.of_rounds("lead").get(round)
    return read_lines(lead.path / "kl.jsonl") if lead else iter(())


def _first_of_question(pairs: Iterator[Any]) -> Sequence[Any]:
    """The pairs of one question share their reference; the lead is measured on the first of them."""
    first: dict[str, Any] = {}
    for pair in pairs:
        first.setdefault(pair["question"]["id"], pair)
    return list(first.values())


def _documents(turn: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Id and text (``(Title: ...) ...``) of each passage as it was read, cut where it was cut."""
    lines = [match[1] for line in turn["observation_text"].split("\n") if (match := _DOCUMENT.match(line))]
    # A long observation is cut at its end: the last passages may be missing.
    return zip(turn["passage_ids"], lines, strict=False)
