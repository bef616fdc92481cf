"""The teacher's lead: how much better the policy is with the reference in its prompt. It decides whether distillation pays.

Measured on held-out pairs by sampling under both prompts: from the question, and from the middle of a wrong student's
trajectory ("off track"), where distillation queries the teacher.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from search_e1.config import LeadConfig, RolloutConfig
from search_e1.errors import DataError, NoLeadError
from search_e1.retrieval.base import Retriever
from search_e1.rollout import loop
from search_e1.rollout.engines.base import Engine
from search_e1.rollout.progress import RolloutProgress
from search_e1.rollout.sharing import Part, write_parts
from search_e1.rollout.starts import Start
from search_e1.rollout.unfinished import unfinished_in
from search_e1.runs import read_records
from search_e1.runs.checkpoints import Checkpointer
from search_e1.runs.progress import Progress, silent
from search_e1.selfdistill.profile import ClassKL, PairKL, by_class, pair_kl
from search_e1.selfdistill.samples import sample_of
from search_e1.text.tokens import TokenClass
from search_e1.training.policy import Policy
from search_e1.types import Pair, Record, Trajectory, Turn


class Lead(Record):
    """A measured lead. EM, searches and sampled tokens are averaged over each pair's samples, then over pairs."""

    pairs: int
    too_long: int
    """Held-out pairs left out because they exceed the policy's context with the reference in the prompt."""
    shortened: int = 0
    """Pairs whose reference was shortened to fit the context."""
    samples: int
    """Trajectories per pair, prompt and kind of start."""
    em_plain: float
    em_privileged: float
    low: float
    """Lower end of the 95% interval of the lead, over pairs; see ``interval``."""
    high: float
    searches_plain: float
    searches_privileged: float
    tokens_plain: float
    tokens_privileged: float
    pairs_off_track: int
    """Pairs with a wrong student that can be cut off track: after the first half of its turns, at least one."""
    em_plain_off_track: float | None
    """``None`` if there are no such pairs."""
    em_privileged_off_track: float | None
    kl: dict[TokenClass, ClassKL]
    """Per token class, on the students' trajectories; classes that do not occur are absent."""
    sampled_tokens: int = 0
    """Total over all trajectories of the measurement."""

    @property
    def lead(self) -> float:
        """The lead in EM, from the question."""
        return self.em_privileged - self.em_plain

    @property
    def saving(self) -> float:
        """Share of sampled tokens that the reference saves, from the question; negative if it costs tokens."""
        return 1 - self.tokens_privileged / self.tokens_plain if self.tokens_plain else 0.0

    @property
    def added_searches(self) -> float:
        """Searches per question that the reference adds, from the question; negative if it saves searches."""
        return self.searches_privileged - self.searches_plain


def hold_out(pairs: Sequence[Pair], config: LeadConfig, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split pairs by question into training pairs and held-out pairs, each in the original order.

    Holds out ``config.pairs`` questions, at most the share ``config.max_share``, but at least one: distillation always has a
    measured lead.
    """
    questions = sorted({pair.question.id for pair in pairs})
    count = max(1, min(config.pairs, int(config.max_share * len(questions)))) if questions else 0
    chosen = set(random.Random(seed).sample(questions, count))
    train = [pair for pair in pairs if pair.question.id not in chosen]
    return train, [pair for pair in pairs if pair.question.id in chosen]


def measure(
    policy: Policy,
    generator: Engine,
    retriever: Retriever,
    pairs: Sequence[Pair],
    config: LeadConfig,
    rollout: RolloutConfig,
    *,
    temperature: float,
    seed: int,
    progress: Progress = silent,
    checkpointer: Checkpointer | None = None,
) -> tuple[Lead, list[PairKL]]:
    """The lead, from sampling under the plain and the privileged prompt, and the per-token divergence of each measured pair.

    Pairs of one question share their reference, so only the first is measured. The token limit under the privileged prompt is
    raised by that prompt's extra length, so that both policies have the same budget. Trajectories that ``checkpointer`` holds
    are reused.

    Raises:
        DataError: no pairs, or none fits the policy's context.
        RetrievalError: from the retriever.
    """
    first = list({pair.question.id: pair for pair in reversed(pairs)}.values())[::-1]
    length = generator.context_length
    kept = [pair for pair in first if len(sample_of(pair, [])) <= length]
    if not kept:
        why = f"all {len(first)} are too long for the policy's context of {length}" if first else "there are none"
        raise DataError(f"no pair to measure the teacher's lead on: {why}; sample a larger pool (pool.questions)")
    off_track = [(i, prefix) for i, pair in enumerate(kept) if (prefix := _prefix(pair.student, rollout))]
    prefixes = [*((i, ()) for i in range(len(kept))), *off_track]
    outcomes = _sample(policy, generator, retriever, kept, prefixes, config, rollout, temperature, seed, progress, checkpointer)
    plain, privileged = outcomes[0][: len(kept)], outcomes[1][: len(kept)]
    plain_off, privileged_off = outcomes[0][len(kept) :], outcomes[1][len(kept) :]
    low, high = interval([_em(b) - _em(a) for a, b in zip(plain, privileged, strict=True)])
    divergences = pair_kl(policy, kept)
    lead = Lead(
        pairs=len(kept),
        too_long=len(first) - len(kept),
        shortened=sum(pair.shortened for pair in kept),
        samples=config.samples,
        em_plain=fmean(map(_em, plain)),
        em_privileged=fmean(map(_em, privileged)),
        low=low,
        high=high,
        searches_plain=fmean(t.searches for group in plain for t in group),
        searches_privileged=fmean(t.searches for group in privileged for t in group),
        tokens_plain=fmean(t.sampled_tokens for group in plain for t in group),
        tokens_privileged=fmean(t.sampled_tokens for group in privileged for t in group),
        pairs_off_track=len(off_track),
        em_plain_off_track=fmean(map(_em, plain_off)) if plain_off else None,
        em_privileged_off_track=fmean(map(_em, privileged_off)) if privileged_off else None,
        kl=by_class(divergences),
        sampled_tokens=sum(t.sampled_tokens for groups in outcomes for group in groups for t in group),
    )
    return lead, divergences


def refused(lead: Lead, config: LeadConfig, *, verified: bool = False) -> str | None:
    """The reason why distillation is refused; ``None`` if it is not, or if ``config.enforce`` is off.

    Refused if the reference adds more than ``config.searches`` searches, unless teachers are ``verified`` one by one. Refused
    too if the lead (mean or lower bound, see ``config.gate``) is below ``config.minimum``, unless the teacher saves the share
    ``config.saving`` of tokens and the interval of its lead does not lie below 0.
    """
    if not config.enforce:
        return None
    if not verified and lead.added_searches > config.searches:
        return (
            f"the teacher searches too far: {lead.searches_privileged:.2f} searches per question with the reference in the "
            f"prompt, {lead.searches_plain:.2f} without ({lead.pairs} pairs), and the difference exceeds "
            f"lead.searches = {config.searches:g}; a student that learns this answers worse; "
            'set distill.teachers = "verified", which leaves such teachers out'
        )
    measured = lead.lead if config.gate == "mean" else lead.low
    shorter = lead.saving >= config.saving and lead.high >= 0
    if measured >= config.minimum or shorter:
        return None
    unsure = config.gate == "low" and lead.lead >= config.minimum
    return (
        f"the teacher does not lead{' for sure' if unsure else ''}: sampled EM {lead.em_privileged:.3f} with the reference in "
        f"the prompt, {lead.em_plain:.3f} without (lead {lead.lead:+.3f}, 95% {lead.low:+.3f} to {lead.high:+.3f}, "
        f"{lead.pairs} pairs), {'whose lower end is ' if config.gate == 'low' else ''}less than lead.minimum = "
        f"{config.minimum:g}, and it saves {lead.saving:.0%} of the tokens (lead.saving = {config.saving:.0%}); "
        + ("raise lead.pairs; or " if unsure else "")
        + "change prompts.privileged, or train the policy so that it still follows a reference (grpo.replay, a lower "
        "grpo.learning_rate), or set lead.enforce = false and continue with --branch DIR"
    )


def gate(lead: Lead, config: LeadConfig, *, verified: bool = False) -> None:
    """
    Raises:
        NoLeadError: distillation is refused; see ``refused``.
    """
    if why := refused(lead, config, verified=verified):
        raise NoLeadError(why)


def with_room(rollout: RolloutConfig, pairs: Sequence[Pair]) -> RolloutConfig:
    """``rollout`` with ``max_tokens`` raised by the largest extra length of a teacher's prompt over the plain one."""
    longer = max((len(pair.teacher_prompt_ids) - len(pair.student.prompt_ids) for pair in pairs), default=0)
    return rollout.model_copy(update={"max_tokens": rollout.max_tokens + max(0, longer)})


def _prefix(student: Trajectory, rollout: RolloutConfig) -> tuple[Turn, ...]:
    """The first half of a wrong student's turns, at least one; empty if no turn or search would be left."""
    if student.correct:
        return ()
    count = max(1, len(student.turns) // 2)
    return student.turns[:count] if count < len(student.turns) and count <= rollout.max_searches else ()


def _sample(
    policy: Policy,
    generator: Engine,
    retriever: Retriever,
    pairs: Sequence[Pair],
    prefixes: Sequence[tuple[int, Sequence[Turn]]],
    config: LeadConfig,
    rollout: RolloutConfig,
    temperature: float,
    seed: int,
    progress: Progress,
    checkpointer: Checkpointer | None,
) -> list[list[list[Trajectory]]]:
    """For the plain and then the privileged prompt: the samples of each prefix (a pair's index and its first turns)."""
    plain = [pair.student.prompt_ids for pair in pairs]
    privileged = [pair.teacher_prompt_ids for pair in pairs]
    roomier = with_room(rollout, pairs)
    total = 2 * config.samples * len(prefixes)
    checkpointer, reported = checkpointer or Checkpointer(), RolloutProgress(progress, total, "sampled EM")

    def make(chunk: _Chunk, before: Mapping[str, float]) -> tuple[Iterator[str], dict[str, float]]:
        starts, limits = chunk
        sampled = loop.rollout(
            generator,
            retriever,
            starts,
            limits,
            temperature=temperature,
            seed=seed,  # the same for both prompts, so that only the prompt differs
            prompts=policy.prompts,
            on_trajectory=reported.after(before),
            unfinished=unfinished_in(checkpointer),
        )
        own = {"trajectories": float(len(sampled)), "em": sum(trajectory.reward for trajectory in sampled)}
        return (trajectory.model_dump_json() for trajectory in sampled), own

    chunks: list[_Chunk] = []
    for prompts, limits in ((plain, rollout), (privileged, roomier)):
        starts = [Start(pairs[i].question, prompts[i], turns, k) for i, turns in prefixes for k in range(config.samples)]
        at_once = rollout.batch_size
        chunks += [(starts[at : at + at_once], limits) for at in range(0, len(starts), at_once)]
    with checkpointer.scratch() as scratch:
        path = scratch / "trajectories.jsonl"
        write_parts(checkpointer, [Part(path, chunks, make)])
        sampled = list(read_records(path, Trajectory, "measure the lead again"))
    each = [sampled[at : at + config.samples] for at in range(0, len(sampled), config.samples)]
    return [each[: len(prefixes)], each[len(prefixes) :]]


_Chunk = tuple[Sequence[Start], RolloutConfig]


def _em(samples: Sequence[Trajectory]) -> float:
    return fmean(t.reward for t in samples)


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the mean of paired differences in [-1, 1] (EM with the reference minus EM without).

    Agresti and Min's interval for matched proportions (Statistics in Medicine 24, 2005): a normal interval after adding half
    an observation to each cell of the table (+1, -1 and twice 0). The plain normal interval has zero width if all pairs agree
    and is too narrow for few pairs; so is the bootstrap.
    """
    n = len(differences) + 2
    mean = sum(differences) / n
    variance = (sum(d * d for d in differences) + 1) / n - mean**2
    half = 1.96 * math.sqrt(variance / n)
    return max(-1.0, mean - half), min(1.0, mean + half)
