"""The loop in figures: policies, gains, rounds, training curves, costs. Names are those of the artifacts."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from search_e1.evaluation.report.files import Run, Stage, policy_of, read_json, read_lines
from search_e1.evaluation.report.trajectories import Evaluated

_RESAMPLES = 10_000
_MOST_POINTS = 400  # of one training curve: more than a screen has room for


def overview(run: Run, evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    """All that is shown but trajectories and pairs."""
    last = next(reversed(run.stages.values()), None)
    return {
        "run": run.path.resolve().name,
        "model": run.config.get("policy", {}).get("model"),
        "seed": run.config.get("seed"),
        "rounds_planned": run.config.get("rounds"),
        "finished": _finished(run),
        "begun": list(run.begun),
        "versions": last.manifest.versions if last else {},
        "started": min((stage.manifest.started for stage in run.stages.values()), default=None),
        "policies": [_policy(stage) for stage in run.evaluations],
        "gains": gains(evaluated),
        "rounds": _rounds(run),
        "curves": _curves(run),
        "costs": [cost(stage) for stage in run.stages.values()],
        "gate": run.config.get("lead", {}).get("minimum"),
    }


def _finished(run: Run) -> bool:
    """Whether the loop got to its end: the last round was distilled and evaluated, or its distillation was refused."""
    rounds = run.config.get("rounds")
    ofsd = run.config.get("ofsd")
    last = "grpo" if ofsd == "never" or (ofsd == "first_round" and rounds != 1) else "ofsd"
    return rounds is not None and (
        f"evaluation-{last}-{rounds}" in run.stages or (str(rounds) in _refusals(run) and not run.begun)
    )


def _refusals(run: Run) -> dict[str, str]:
    """Round -> why nothing was distilled; what ``summary.json`` says."""
    path = run.path / "summary.json"
    rounds = read_json(path).get("rounds", {}) if path.is_file() else {}
    return {number: round["refused"] for number, round in rounds.items() if round.get("refused")}


def _policy(stage: Stage) -> dict[str, Any]:
    return {"stage": policy_of(stage), **read_json(stage.path / "evaluation.json")}


def gains(evaluated: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """What each stage changed in greedy EM against the policy before it, over the questions that both answered.

    ``low`` and ``high`` are the 95% percentile bootstrap interval over questions, paired.
    """
    found = []
    for before, after in pairwise(evaluated):
        shared = before.correct.keys() & after.correct.keys()
        if not shared:
            continue
        won = sum(after.correct[id] and not before.correct[id] for id in shared)
        lost = sum(before.correct[id] and not after.correct[id] for id in shared)
        low, high = _interval(won, lost, len(shared))
        gain = (won - lost) / len(shared)
        found.append(
            {"stage": after.policy, "before": before.policy, "n": len(shared), "won": won, "lost": lost}
            | {"gain": gain, "low": low, "high": high}
        )
    return found


def _interval(won: int, lost: int, n: int) -> tuple[float, float]:
    """Of the mean of n differences, of which ``won`` are 1, ``lost`` are -1 and the rest 0.

    Drawing n of them with replacement and counting is a draw of a multinomial distribution: nothing is really resampled.
    """
    shares = np.array([won, lost, n - won - lost]) / n
    drawn = np.random.default_rng(0).multinomial(n, shares, size=_RESAMPLES)
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / n, [2.5, 97.5])
    return float(low), float(high)


def _rounds(run: Run) -> list[dict[str, Any]]:
    """One entry a round: the figures of each of its stages that is complete."""
    kinds = {kind: run.of_rounds(kind) for kind in ("grpo", "pool", "pairs", "lead", "ofsd")}
    numbers = sorted({number for stages in kinds.values() for number in stages})
    refused = _refusals(run)
    return [
        {
            "round": number,
            **{kind: stages[number].figures if number in stages else None for kind, stages in kinds.items()},
            "refused": refused.get(str(number)),
        }
        for number in numbers
    ]


def _curves(run: Run) -> list[dict[str, Any]]:
    """The steps of every GRPO and OFSD stage, those of a stage at work included: figure -> values by step."""
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
    """What a stage took; counts that it does not have are ``None``."""
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
    """Tokens that the policy sampled in the stage; ``None`` where it samples none, or an old artifact does not tell."""
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
    """Tokens that entered a loss, each as often as it did."""
    kind = stage.name.partition("-")[0]
    if kind == "grpo":
        return _grpo_tokens(stage)
    if kind == "ofsd" and "positions" in stage.figures:
        return stage.figures["positions"] * stage.manifest.settings["distill"]["epochs"]
    return None


def _grpo_tokens(stage: Stage) -> int:
    settings: Mapping[str, Any] = stage.manifest.settings["grpo"]
    trajectories = settings["questions_per_step"] * settings["group_size"]
    return round(sum(s.get("sampled_tokens", 0) * trajectories for s in read_lines(stage.path / "steps.jsonl")))
