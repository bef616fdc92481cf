"""The figures of a run: policies, gains, rounds, training curves, costs. Names are those of the artifacts.

Shares of questions get Wilson's interval whatever the artifact says: older artifacts hold the bootstrap's, which has zero
width if all questions agree.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from search_e1.evaluation.report import explain, repeat
from search_e1.evaluation.report.files import Run, Stage, policy_of, read_json, read_lines
from search_e1.evaluation.report.trajectories import Evaluated
from search_e1.evaluation.statistics import share_interval, wilson
from search_e1.runs.stage_id import OF_ROUND

_MOST_POINTS = 400  # per training curve: more than a screen resolves


def overview(run: Run, evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    """Everything that the page shows about a run except trajectories and pairs."""
    last = next(reversed(run.stages.values()), None)
    policies = [_policy(stage) for stage in run.evaluations]
    rounds, changes = _rounds(run), gains(evaluated)
    finished = _finished(run)
    return {
        "run": run.path.resolve().name,
        "model": run.config.get("policy", {}).get("model"),
        "seed": run.config.get("seed"),
        "rounds_planned": run.config.get("rounds"),
        "finished": finished,
        "holder": None if finished else run.holder,
        "begun": list(run.begun),
        "versions": last.manifest.versions if last else {},
        "started": min((stage.manifest.started for stage in run.stages.values()), default=None),
        "policies": policies,
        "gains": changes,
        "falls": explain.falls(changes, policies, rounds, run.config),
        "empty": explain.empty(run, finished=finished),
        "rounds": rounds,
        "curves": _curves(run),
        "costs": [cost(stage) for stage in run.stages.values()],
        "gate": run.config.get("lead", {}).get("minimum"),
        "repeat": repeat.repeat(run),
    }


def _finished(run: Run) -> bool:
    """Whether the last round was distilled and evaluated, or its distillation was refused."""
    rounds = run.config.get("rounds")
    ofsd = run.config.get("ofsd")
    last = "grpo" if ofsd == "never" or (ofsd == "first_round" and rounds != 1) else "ofsd"
    return rounds is not None and (
        f"evaluation-{last}-{rounds}" in run.stages or (str(rounds) in _refusals(run) and not run.begun)
    )


def _refusals(run: Run) -> dict[str, str]:
    """Round -> why its distillation was refused, from ``summary.json``."""
    path = run.path / "summary.json"
    rounds = read_json(path).get("rounds", {}) if path.is_file() else {}
    return {number: round["refused"] for number, round in rounds.items() if round.get("refused")}


def _policy(stage: Stage) -> dict[str, Any]:
    scores = read_json(stage.path / "evaluation.json")
    parts = {
        by: {name: _with_interval(part) for name, part in scores.get(by, {}).items()}
        for by in ("by_benchmark", "by_hops", "by_answer_type")
    }
    return {"stage": policy_of(stage), **_with_interval(scores), **parts}


def _with_interval(scores: dict[str, Any]) -> dict[str, Any]:
    return scores | {"em_interval": wilson(round(scores["em"] * scores["n"]), scores["n"])}


def gains(evaluated: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Each policy's change in greedy EM from the previous policy, on the questions that both were evaluated on.

    ``low`` and ``high`` are the 95% interval of the paired differences; see ``statistics.share_interval``.
    """
    found = []
    for before, after in pairwise(evaluated):
        shared = before.correct.keys() & after.correct.keys()
        if not shared:
            continue
        changes = [after.correct[id] - before.correct[id] for id in sorted(shared)]
        low, high = share_interval(changes, seed=0, least=-1)
        found.append(
            {"stage": after.policy, "before": before.policy, "n": len(shared)}
            | {"won": changes.count(1), "lost": changes.count(-1), "gain": fmean(changes), "low": low, "high": high}
        )
    return found


def _rounds(run: Run) -> list[dict[str, Any]]:
    """One entry per round: the figures of its complete stages."""
    kinds = {kind: run.of_rounds(kind) for kind in OF_ROUND}
    numbers = sorted({number for stages in kinds.values() for number in stages})
    refused = _refusals(run)
    return [
        {
            "round": number,
            "usable_interval": _usable(kinds["pairs"].get(number)),
            **{kind: stages[number].figures if number in stages else None for kind, stages in kinds.items()},
            "refused": refused.get(str(number)),
        }
        for number in numbers
    ]


def _usable(pairs: Stage | None) -> tuple[float, float] | None:
    """95% interval of the share of questions with a pair."""
    return wilson(pairs.figures["usable"], pairs.figures["questions"]) if pairs and pairs.figures.get("questions") else None


def _curves(run: Run) -> list[dict[str, Any]]:
    """The training curve of every stage that trains, including an unfinished one: figure -> values by step."""
    places = {name: stage.path for name, stage in run.stages.items()}
    places |= {name: run.path / f".{name}.partial" for name in run.begun}
    curves = []
    for name, path in places.items():
        steps = list(read_lines(path / "steps.jsonl"))
        if not steps:
            continue
        stride = -(-len(steps) // _MOST_POINTS)
        names = sorted({key for step in steps for key in step} - {"step"})
        curves.append(
            {
                "stage": name,
                "complete": name in run.stages,
                "step": [step["step"] for step in steps[::stride]],
                "figures": {key: [step.get(key) for step in steps[::stride]] for key in names},
            }
        )
    return curves


def cost(stage: Stage) -> dict[str, Any]:
    """The cost of a stage; missing counts are ``None``."""
    manifest = stage.manifest
    return {
        "stage": stage.name,
        "seconds": manifest.seconds,
        "cpu_seconds": manifest.cpu_seconds,
        "gpus": manifest.gpus,
        "gpu_hours": manifest.gpus * manifest.seconds / 3600,
        "sampled_tokens": _sampled_tokens(stage),
        "trained_tokens": _trained_tokens(stage),
    }


def _sampled_tokens(stage: Stage) -> int | None:
    """Tokens sampled in the stage; ``None`` if it samples none, or if an old artifact does not record them."""
    figures, settings = stage.figures, stage.manifest.settings
    kind = stage.name.partition("-")[0]
    if kind == "grpo":
        return _grpo_tokens(stage)
    if kind == "pool" and settings["pool"].get("source") == "grpo":
        return None
    if kind == "pool" and "tokens" in figures:
        return round(figures["tokens"] * figures["questions"] * settings["pool"]["group_size"])
    return figures.get("sampled_tokens") or None


def _trained_tokens(stage: Stage) -> int | None:
    """Tokens that entered a loss, counted once per epoch; ``None`` if the stage trains nothing or does not count them."""
    kind = stage.name.partition("-")[0]
    if kind == "grpo":
        return _grpo_tokens(stage) * stage.manifest.settings["grpo"].get("epochs", 1)
    if kind == "coldstart":
        return stage.figures.get("positions")
    if kind == "ofsd" and "positions" in stage.figures:
        return stage.figures["positions"] * stage.manifest.settings["distill"]["epochs"]
    return None


def _grpo_tokens(stage: Stage) -> int:
    settings: Mapping[str, Any] = stage.manifest.settings["grpo"]
    trajectories = settings["questions_per_step"] * settings["group_size"]
    return round(sum(s.get("sampled_tokens", 0) * trajectories for s in read_lines(stage.path / "steps.jsonl")))
