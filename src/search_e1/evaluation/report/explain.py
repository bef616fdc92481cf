"""Sentences about a run: why EM fell after a distillation, and why a view is empty."""

from collections.abc import Mapping, Sequence
from typing import Any

from search_e1.evaluation.report.files import Run

Figures = Mapping[str, Any]
_SAVING = 0.05
"""Smallest saving (a share of sampled tokens) worth mentioning."""


def falls(gains: Sequence[Figures], policies: Sequence[Figures], rounds: Sequence[Figures], config: Figures) -> dict[str, str]:
    """Distilled policy -> why its EM is lower than the previous policy's. See docs/distillation.md."""
    scores = {policy["stage"]: policy for policy in policies}
    by_round = {round["round"]: round for round in rounds}
    found = {}
    for gain in gains:
        kind, _, number = gain["stage"].partition("-")
        if kind == "ofsd" and number.isdigit() and gain["gain"] < 0:
            lead = by_round.get(int(number), {}).get("lead")
            after = [stage for stage in scores if stage == f"grpo-{int(number) + 1}"]
            causes = f"{_lead(lead, config)}; {_states(gain, scores, config)}; {_after(after, scores)}"
            found[gain["stage"]] = f"{_head(gain)} {causes}."
    return found


def _head(gain: Figures) -> str:
    interval = f"95% {_signed(gain['low'])} to {_signed(gain['high'])}"
    noise = ", which may be chance" if gain["high"] >= 0 else ""
    return f"Greedy EM fell by {-gain['gain']:.3f} from {gain['before']} to {gain['stage']} ({interval}){noise}:"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _lead(lead: Figures | None, config: Figures) -> str:
    if lead is None:
        sft = config.get("distill", {}).get("objective") == "sft"
        return "it was fine-tuned on references, without a teacher" if sft else "its teacher's lead was not measured"
    value = lead["em_privileged"] - lead["em_plain"]
    measured = f"({_signed(value)} EM, 95% {_signed(lead['low'])} to {_signed(lead['high'])}, {lead['pairs']} pairs)"
    told = (
        f"its teacher had a lead {measured}"
        if lead["low"] > 0
        else f"its teacher had no significant lead to pass on {measured}"
    )
    plain, privileged = lead.get("tokens_plain"), lead.get("tokens_privileged")
    saving = 1 - privileged / plain if plain and privileged is not None else 0.0
    return f"{told} but was {saving:.0%} shorter" if saving >= _SAVING else told


def _states(gain: Figures, scores: Mapping[str, Figures], config: Figures) -> str:
    before, after = scores[gain["before"]], scores[gain["stage"]]
    moved = (
        f"searches {before['searches']:.2f} to {after['searches']:.2f}, tokens {before['tokens']:.0f} to {after['tokens']:.0f}"
    )
    if config.get("distill", {}).get("students", "stored") == "fresh":
        return f"it learned on fresh trajectories of its own ({moved} per question), so its states were not stale"
    return (
        f"it learned on stored trajectories of {gain['before']}, and once its own words change ({moved} per question) it is in "
        "states that none of them visits"
    )


def _after(after: Sequence[str], scores: Mapping[str, Figures]) -> str:
    if not after:
        return "judge a round after the GRPO that follows, which teaches the decisions again in the new words"
    return f"the GRPO that follows teaches the decisions again in the new words: {after[0]} has EM {scores[after[0]]['em']:.3f}"


def empty(run: Run, *, finished: bool) -> dict[str, str]:
    """View -> why it is empty, and what would fill it; only for empty views."""
    outlook = _outlook(run, finished)
    found = {}
    if not run.stages:
        found["cost"] = f"No cost: no stage is complete. {outlook}"
    if not run.evaluations:
        found["loop"] = f"No figures: no policy is evaluated. {outlook}"
        found["questions"] = f"No questions yet: they appear once an evaluation is complete. {outlook}"
        found["trajectories"] = f"No trajectories: neither an evaluation nor a pool is complete. {outlook}"
    if reason := _no_pairs(run):
        found["pairs"] = f"No pairs: {reason}. {outlook if not run.of_rounds('pairs') else ''}".rstrip()
    return found


def _no_pairs(run: Run) -> str | None:
    pairs = run.of_rounds("pairs")
    if any(stage.figures.get("held_out_pairs") for stage in pairs.values()):
        return None
    if pairs:
        counts = [f"round {round}: {stage.figures.get('usable', 0)} usable questions" for round, stage in pairs.items()]
        return f"none was held out to measure the lead on ({'; '.join(counts)}); raise pool.questions to get some"
    if run.config.get("ofsd") == "never":
        return 'the run does not distill (ofsd = "never"), so it mines none'
    return "the run has not reached pair mining, which follows GRPO and the pool"


def _outlook(run: Run, finished: bool) -> str:
    if finished:
        return "The run is finished; `search-e1 evaluate` and the stage verbs can still add to it."
    begun = f"Begun: {', '.join(run.begun)}. " if run.begun else ""
    if run.holder:
        return f"{begun}The run is in progress ({run.holder})."
    return f"{begun}No process is working on the run; `search-e1 train` with its config resumes it."
