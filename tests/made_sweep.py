"""Finished runs of a sweep as the loop leaves them, without any training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from search_e1 import runs
from search_e1.config import Config
from search_e1.evaluation import results
from search_e1.evaluation.failures import Failure
from search_e1.evaluation.results import Result
from search_e1.lab.sweep import running
from search_e1.lab.sweep.spec import Run
from search_e1.types import StopReason

Right = Sequence[int]
"""EM of each question, 0 or 1; even questions are of nq, odd ones of musique."""


def make(
    directory: Path,
    variant: str,
    seed: int,
    policies: dict[str, Right],
    *,
    lead: float = 0.25,
    refused: Sequence[str] = (),
    seconds: float = 10.0,
    topk: int = 3,
) -> Run:
    """A run whose policies answered so. Its stages took ``seconds`` each, and half of that in CPU time.

    ``refused``: rounds that measured a lead and were not distilled.
    """
    config = Config.model_validate(
        {
            "run": directory / "runs" / variant / str(seed),
            "seed": seed,
            "policy": {"model": "small"},
            "data": {"corpus": "c.jsonl", "train": ["t.jsonl"], "eval": {"nq": "e.jsonl"}},
        }
    )
    made = _Made(config.run, seconds, topk)
    for policy, right in policies.items():
        kind, _, number = policy.partition("-")
        if kind == "coldstart":
            made.stage(policy, {"steps": 3, "positions": 900})
        if kind == "grpo":
            made.trained(policy)
            if number in refused:
                made.led(number, lead)
        if kind == "ofsd":
            made.led(number, lead)
            made.stage(policy, {"steps": 4, "positions": 700})
        made.evaluated(policy, right)
    rounds = {number: {"refused": "no lead" if number in refused else None} for number in ("1", "2")}
    (config.run / "summary.json").write_text(json.dumps({"rounds": rounds}))
    (config.run / running.FINISHED).write_text(json.dumps(running.finished_record(config)))
    return Run(variant, seed, config)


class _Made:
    def __init__(self, root: Path, seconds: float, topk: int) -> None:
        self.root, self.seconds, self.topk, self.clock = root, seconds, topk, 0.0
        root.mkdir(parents=True)

    def trained(self, name: str) -> None:
        """Two of five steps, of 4 trajectories with 30 and 20 sampled tokens each: 200 tokens, and 400 in two epochs."""
        lines = [json.dumps({"step": i, "sampled_tokens": tokens}) for i, tokens in ((1, 30.0), (2, 20.0))]
        self.stage(name, {"steps": 2}, {"steps.jsonl": "\n".join(lines) + "\n"})

    def led(self, number: str, lead: float) -> None:
        self.stage(f"pool-{number}", {"tokens": 25.0, "questions": 3})  # x 8 trajectories: 600 tokens
        self.stage(f"pairs-{number}", {})
        figures = {
            "em_plain": 0.5,
            "em_privileged": 0.5 + lead,
            "low": lead - 0.1,
            "high": lead + 0.1,
            "sampled_tokens": 50,
        }
        self.stage(f"lead-{number}", figures)

    def evaluated(self, policy: str, right: Right) -> None:
        asked = [_result(i, em) for i, em in enumerate(right)]
        text = "".join(result.model_dump_json() + "\n" for result in asked)
        self.stage(f"evaluation-{policy}", {"em": sum(right) / len(right)}, {results.QUESTIONS: text})

    def stage(self, name: str, result: dict[str, Any], files: dict[str, str] | None = None) -> None:
        def write(out: Path) -> dict[str, Any]:
            for file, text in (files or {}).items():
                (out / file).write_text(text)
            return result

        settings = {
            "grpo": {"steps": 5, "questions_per_step": 2, "group_size": 2, "epochs": 2},
            "pool": {"group_size": 8},
            "distill": {"epochs": 1},
            "rollout": {"topk": self.topk},
            "prompts": None,
        }
        path = self.root / name
        runs.artifact(path, stage=name, settings=settings, inputs={"retrieval": "x"}, seed=0, make=write)
        self.clock += 100
        manifest = json.loads((path / runs.MANIFEST).read_text())
        manifest |= {"started": self.clock, "seconds": self.seconds, "cpu_seconds": self.seconds / 2}
        runs.write_summed(path / runs.MANIFEST, json.dumps(manifest))


def _result(i: int, em: int) -> Result:
    """Searches of a wrong answer: 2, else 1; tokens: ten times that. Of two samples, one is right where the answer is."""
    return Result(
        benchmark=("nq", "musique")[i % 2], id=f"q{i}", hops=1 + i % 2, question=f"Question {i}?", answers=("yes it is",),
        answer="x", em=em, f1=em, cover_em=em, searches=2 - em, tokens=20 - 10 * em, stop_reason=StopReason.ANSWERED,
        em_of_samples=(float(em), 0.0), tokens_of_samples=(10, 10), yes_no=False, read=True, in_topk=True, in_corpus=True,
        failure=None if em else Failure.NOT_READ_OUT,
    )  # fmt: skip
