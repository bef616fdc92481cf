"""A run directory as the loop leaves it, without any training: for tests of what reads runs, and for the report's benchmark."""

import json
import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from search_e1 import runs
from search_e1.types import ActionKind, Group, Pair, Question, StopReason, Trajectory, Turn

POLICIES = ("base", "grpo-1", "ofsd-1", "grpo-2", "ofsd-2")
SETTINGS = {
    "grpo": {"questions_per_step": 4, "group_size": 5},
    "pool": {"group_size": 8},
    "distill": {"epochs": 3},
}


def make_run(
    root: Path,
    *,
    questions: int = 12,
    policies: Sequence[str] = POLICIES,
    words: int = 12,
    seed: int = 0,
    replace: dict[str, str] | None = None,
    groups: int = 0,
    failing: Sequence[str] = (),
) -> Path:
    """A run of two rounds in ``root``; ``words`` a passage, three passages a search.

    Question i of ``base`` is right if i is even; every policy after it is right on two more questions, from the first that
    is wrong, except ``grpo-2``, which also loses question 0. ``replace`` puts texts in the place of ``QUESTION``, ``TITLE``,
    ``PASSAGE``, ``THOUGHT``, ``QUERY`` and ``ANSWER`` of question 1. Policies in ``failing`` are wrong on all questions.
    Pools and GRPO keep the groups of the first ``groups`` questions, three trajectories each, the first of them right.
    """
    maker = _Maker(root, words, random.Random(seed), replace or {}, groups)
    root.mkdir(parents=True, exist_ok=True)
    config = {"seed": seed, "rounds": 2, "policy": {"model": "small"}, "lead": {"minimum": 0.02}}
    (root / "config.json").write_text(json.dumps(config))
    right = {i for i in range(questions) if i % 2 == 0}
    asked = [maker.question(i) for i in range(questions)]
    for policy in policies:
        kind, _, round = policy.partition("-")
        if kind != "base":
            right |= set([i for i in range(questions) if i not in right][:2])
            right -= {0} if policy == "grpo-2" else set()
            maker.trained(kind, int(round), asked)
        maker.evaluation(policy, [(question, i in right and policy not in failing) for i, question in enumerate(asked)])
    return root


def trajectory(question: Question, searches: Sequence[tuple[str, str, str, Sequence[str]]], thought: str, answer: str | None,
               *, right: bool = False, stop: StopReason = StopReason.ANSWERED) -> Trajectory:  # fmt: skip
    """``searches`` are (thought, query, observation, passage ids); ids are one for each character."""
    turns = [
        _turn(f"<think> {before} </think> <search> {query} </search>", ActionKind.SEARCH, query, seen, tuple(ids))
        for before, query, seen, ids in searches
    ]
    if stop is StopReason.ANSWERED:
        turns.append(_turn(f"<think> {thought} </think> <answer> {answer} </answer>", ActionKind.ANSWER, answer))
    else:
        turns.append(_turn(thought, ActionKind.MALFORMED, None))
    return Trajectory(
        question_id=question.id, prompt_ids=(1,), turns=tuple(turns), stop_reason=stop,
        answer=answer if stop is StopReason.ANSWERED else None, reward=float(right), f1=float(right),
    )  # fmt: skip


def _turn(text: str, kind: ActionKind, argument: str | None, seen: str = "", passages: tuple[str, ...] = ()) -> Turn:
    return Turn(
        action_ids=tuple(range(len(text.split()))), action_text=text, kind=kind, argument=argument,
        observation_ids=tuple(range(len(seen.split()))), observation_text=seen, passage_ids=passages,
    )  # fmt: skip


class _Maker:
    def __init__(self, root: Path, words: int, rng: random.Random, replace: dict[str, str], groups: int) -> None:
        self.root, self.words, self.rng, self.replace, self.groups = root, words, rng, replace, groups
        self.vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(8_000)]
        # As words are spread in any language.
        self.weights = list(accumulate(1 / (rank + 2) for rank in range(len(self.vocabulary))))
        self.clock = 1_000.0

    def text(self, count: int) -> str:
        return " ".join(self.rng.choices(self.vocabulary, cum_weights=self.weights, k=count))

    def said(self, i: int, name: str, otherwise: str) -> str:
        return self.replace.get(name, otherwise) if i == 1 else otherwise

    def question(self, i: int) -> Question:
        text = self.said(i, "QUESTION", f"Who wrote {self.text(6)} ({i})?")
        return Question(
            id=f"q{i}", text=text, answers=(f"Gold {i}", f"G. {i}"), benchmark=("nq", "musique")[i % 2], hops=1 + i % 3
        )

    def rollout(self, question: Question, right: bool) -> Trajectory:
        i = int(question.id[1:])
        searches = []
        for _ in range(1 + i % 3):
            found = [(f"d{self.rng.randint(1, 10**6)}", self.text(2), self.text(self.words)) for _ in range(3)]
            found[0] = (
                found[0][0],
                self.said(i, "TITLE", found[0][1]),
                self.said(i, "PASSAGE", f"{found[0][2]} by Gold {i}."),
            )
            body = "".join(f"Doc {n}(Title: {title}) {text}\n" for n, (_, title, text) in enumerate(found, 1))
            seen = f"\n\n<information>\n{body}</information>\n\n"
            searches.append((self.said(i, "THOUGHT", f"I need {self.text(5)}"), self.said(i, "QUERY", self.text(4)), seen,
                             [id for id, _, _ in found]))  # fmt: skip
        answer = f"Gold {i}" if right else self.said(i, "ANSWER", "somebody else")
        if not right and i % 5 == 0:
            return trajectory(question, searches, "I do not know.", None, stop=StopReason.MALFORMED)
        return trajectory(question, searches, f"So it is {answer}", answer, right=right)

    def evaluation(self, policy: str, asked: Sequence[tuple[Question, bool]]) -> None:
        groups = [Group(question=q, trajectories=(self.rollout(q, right),)) for q, right in asked]
        em = sum(right for _, right in asked) / len(asked)
        trajectories = [group.trajectories[0] for group in groups]
        scores = {
            "n": len(asked), "em": em, "em_interval": [max(0, em - 0.1), min(1, em + 0.1)], "em_sampled": em / 2, "f1": em,
            "searches": sum(t.searches for t in trajectories) / len(asked),
            "tokens": sum(t.sampled_tokens for t in trajectories) / len(asked), "macro_em": em,
        }  # fmt: skip
        parts = {"by_benchmark": {"nq": scores, "musique": scores}, "by_hops": {"1": scores}}
        stops = {reason: sum(t.stop_reason == reason for t in trajectories) for reason in ("answered", "malformed")}

        def write(out: Path) -> dict[str, Any]:
            (out / "evaluation.json").write_text(json.dumps(scores | parts | {"stop_reasons": stops}))
            (out / "trajectories.jsonl").write_text("".join(group.model_dump_json() + "\n" for group in groups))
            return {"em": em}

        self.artifact(f"evaluation-{policy}", write)

    def trained(self, kind: str, round: int, asked: Sequence[Question]) -> None:
        if kind == "grpo":
            steps = _steps("reward", "searches", "sampled_tokens", "mixed", "entropy", "grad_norm")
            self.artifact(f"grpo-{round}", self.keeping(steps, asked))
            return
        figures = {"questions": 10, "em": 0.5, "tokens": 30.0}
        self.artifact(f"pool-{round}", self.keeping(lambda out: figures, asked))
        pairs = [
            Pair(question=q, reference=self.rollout(q, True), student=self.rollout(q, False).model_copy(update={"reward": 0.0}))
            for q in asked[:4]
        ]  # fmt: skip
        self.artifact(f"pairs-{round}", _pairs(pairs))
        self.artifact(f"lead-{round}", _lead(pairs))
        self.artifact(f"ofsd-{round}", _steps("loss", "grad_norm", result={"positions": 700, "kl_first": 0.4, "kl_last": 0.2}))

    def keeping(self, make: runs.Make, asked: Sequence[Question]) -> runs.Make:
        def write(out: Path) -> dict[str, Any]:
            kept = [
                Group(question=q, trajectories=tuple(self.rollout(q, i == 0) for i in range(3))) for q in asked[: self.groups]
            ]
            if kept:
                (out / "groups.jsonl").write_text("".join(group.model_dump_json() + "\n" for group in kept))
            return dict(make(out))

        return write

    def artifact(self, name: str, make: runs.Make) -> None:
        runs.artifact(
            self.root / name,
            stage=name,
            settings=SETTINGS,
            inputs={},
            seed=0,
            make=make,
            gpus=2 if name.startswith("grpo") else 0,
        )
        self.clock += 100  # times that no clock changes
        manifest = self.root / name / runs.MANIFEST
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"started": self.clock, "seconds": 90.0}))


def _steps(*names: str, result: dict[str, Any] | None = None) -> runs.Make:
    def write(out: Path) -> dict[str, Any]:
        rows = [{"step": i, **{name: 10.0 + i + n for n, name in enumerate(names)}} for i in range(1, 6)]
        (out / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"steps": 5, **(result or {})}

    return write


def _pairs(pairs: Sequence[Pair]) -> runs.Make:
    health = {
        "questions": 10, "usable": 6, "nothing_to_learn": 1, "never_correct": 3, "pairs": 8, "wrong_students": 5, "em": 0.5,
        "divergence": 0.4, "reference_searches": 1.0, "student_searches": 2.0, "reference_tokens": 20.0, "student_tokens": 30.0,
        "train_pairs": 4, "held_out_pairs": len(pairs),
    }  # fmt: skip

    def write(out: Path) -> dict[str, Any]:
        (out / "held_out.jsonl").write_text("".join(pair.model_dump_json() + "\n" for pair in pairs))
        return health

    return write


def _lead(pairs: Sequence[Pair]) -> runs.Make:
    """The n-th token of a student diverges by n / 10 nats."""
    lead = {
        "em_plain": 0.5, "em_privileged": 0.75, "low": 0.05, "high": 0.45, "pairs": len(pairs), "em_plain_off_track": 0.2,
        "em_privileged_off_track": 0.6, "sampled_tokens": 400,
        "kl": {"answer": {"tokens": 4, "mean": 1.5, "share": 0.75}, "thought": {"tokens": 9, "mean": 0.1, "share": 0.25}},
    }  # fmt: skip

    def row(pair: Pair) -> dict[str, Any]:
        pieces = [f"{word} " for turn in pair.student.turns for word in turn.action_text.split()]
        count = len(pieces)
        return {
            "question_id": pair.question.id, "pieces": pieces, "classes": ["thought"] * count,
            "kl": [i / 10 for i in range(count)], "student": [0.25] * count, "teacher": [0.5] * count,
            "preferred": [" instead"] * count,
        }  # fmt: skip

    def write(out: Path) -> dict[str, Any]:
        (out / "kl.jsonl").write_text("".join(json.dumps(row(pair)) + "\n" for pair in pairs))
        return lead

    return write
