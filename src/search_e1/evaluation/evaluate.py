"""Evaluation of a policy: greedy and sampled rollouts of every question, each judged."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from search_e1.config import EvaluationConfig, Prompts, RolloutConfig
from search_e1.data.answers import cover_match
from search_e1.errors import DataError
from search_e1.evaluation import results
from search_e1.evaluation.failures import classify
from search_e1.evaluation.recall import Recall, Recalls, holds, is_yes_no, patterns
from search_e1.evaluation.results import Evaluation, Result
from search_e1.retrieval.base import Retriever
from search_e1.rollout.engines.base import Engine
from search_e1.rollout.progress import RolloutProgress
from search_e1.rollout.rewards.scorer import Scorer, open_scorer
from search_e1.rollout.sampler import RolloutSampler, empty_searches, warn_of_empty_searches
from search_e1.rollout.sharing import Part, write_parts
from search_e1.runs import derived_seed, ranks, read_records
from search_e1.runs.checkpoints import Checkpointer
from search_e1.runs.progress import Progress, silent
from search_e1.text.prompts import seen_passages, split_passage
from search_e1.types import Group, Question, Record, Trajectory

TRAJECTORIES, SAMPLED, TIMINGS = "trajectories.jsonl", "sampled.jsonl", "timings.json"


class Timing(Record):
    """Times of one benchmark, in ``timings.json``. All other files of an evaluation are reproducible to the byte."""

    seconds_a_question: float
    """Wall-clock time of the batched greedy rollouts divided by their number."""
    latency: float | None
    """Median seconds from question to answer with nothing else running; ``None`` if no question was run alone."""
    longest: float | None
    """Seconds of the slowest question run alone."""
    alone: int
    """Number of questions run alone."""


def evaluate(
    generator: Engine,
    retriever: Retriever,
    questions_by_benchmark: Mapping[str, Sequence[Question]],
    prompts: Prompts,
    config: EvaluationConfig,
    limits: RolloutConfig,
    *,
    seed: int,
    out: Path,
    recalls: Recalls | None = None,
    progress: Progress = silent,
    checkpointer: Checkpointer | None = None,
) -> Evaluation:
    """Roll out every question once greedily and ``config.samples`` times at ``config.temperature``, and judge the answers.

    Writes to ``out``: groups in question order (greedy in ``TRAJECTORIES``, sampled in ``SAMPLED``), a ``Result`` per
    question, the figures, and times. Each benchmark's seed derives from ``seed`` and its name alone, so its results do not
    depend on the other benchmarks.

    Resumes an interrupted call with the same arguments from the chunks in ``checkpointer``.

    Raises:
        DataError: a benchmark has no questions, or there is no benchmark.
        RetrievalError: from the retriever.
        Stopped: a signal asked to stop; the current chunk is finished and on disk.
    """
    empty = [name for name, questions in questions_by_benchmark.items() if not questions]
    if empty or not questions_by_benchmark:
        raise DataError(f"no questions to evaluate on in {empty or 'data.eval'}; give files that hold some in data.eval")
    checkpointer = checkpointer or Checkpointer()
    scorer = open_scorer(limits, prompts.instruction)
    sampler = RolloutSampler(generator, retriever, prompts, limits.without_reward, checkpointer)
    count = sum(map(len, questions_by_benchmark.values()))

    def part(file: str, size: int, temperature: float, done: int) -> Part:
        return _part(sampler, out / file, questions_by_benchmark, size, temperature, seed, (progress, done, total))

    total = count * (1 + config.samples)
    parts = [part(TRAJECTORIES, 1, 0.0, 0)]
    parts += [part(SAMPLED, config.samples, config.temperature, count)] if config.samples else []
    sums, *_ = write_parts(checkpointer, parts)
    if not ranks.is_first():
        return ranks.broadcast_object(None)  # type: ignore[return-value]
    warn_of_empty_searches(sums["empty"], sums["searches"])
    judged = list(_judged(questions_by_benchmark, parts, recalls or {}))
    if not scorer.is_default:
        judged = _scored(judged, scorer, [q for questions in questions_by_benchmark.values() for q in questions])
    evaluation = results.evaluation(judged, seed, None if scorer.is_default else scorer.name)
    sampled = "" if evaluation.em_sampled is None else f", sampled {evaluation.em_sampled:.3f}"
    progress(total, total, f"EM greedy {evaluation.em:.3f}{sampled}")
    timings = {
        name: _timing(sampler, questions, sums[f"seconds.{name}"], config.latency).model_dump()
        for name, questions in questions_by_benchmark.items()
    }
    results.write(judged, out / results.QUESTIONS)
    (out / results.EVALUATION).write_text(evaluation.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (out / TIMINGS).write_text(json.dumps(timings, indent=2) + "\n", encoding="utf-8")
    return ranks.broadcast_object(evaluation)


def _part(
    sampler: RolloutSampler,
    path: Path,
    questions_by_benchmark: Mapping[str, Sequence[Question]],
    size: int,
    temperature: float,
    seed: int,
    shown: tuple[Progress, int, int],
) -> Part:
    """The file of all groups of ``size`` trajectories. ``shown``: the progress callback, the number of trajectories in
    earlier parts, and in all parts."""
    chunks = [(name, chunk) for name, questions in questions_by_benchmark.items() for chunk in sampler.chunks(questions, size)]
    progress, before, total = shown
    reporter = RolloutProgress(progress, total, "sampled EM" if temperature else "greedy EM", before=before)

    def make(chunk: tuple[str, Sequence[Question]], sums: Mapping[str, float]) -> tuple[Iterable[str], Mapping[str, float]]:
        name, questions = chunk
        clock, own = time.perf_counter(), derived_seed(seed, name)
        groups = sampler.groups(questions, size, temperature=temperature, seed=own, on_trajectory=reporter.after(sums))
        made = [trajectory for group in groups for trajectory in group.trajectories]
        tally = {
            "trajectories": len(made), "em": sum(t.reward for t in made), "searches": sum(t.searches for t in made),
            "empty": sum(map(empty_searches, made)), f"seconds.{name}": time.perf_counter() - clock,
        }  # fmt: skip
        return (group.model_dump_json() for group in groups), tally

    return Part(path, chunks, make)


def _judged(
    questions_by_benchmark: Mapping[str, Sequence[Question]], parts: Sequence[Part], recalls: Recalls
) -> Iterator[Result]:
    names = [name for name, questions in questions_by_benchmark.items() for _ in questions]
    greedy, *sampled = [read_records(part.path, Group, "evaluate again") for part in parts]
    for name, group in zip(names, greedy, strict=True):
        result = judge(name, group, recalls.get((name, group.question.id)))
        yield with_samples(result, next(sampled[0])) if sampled else result


def _scored(judged: Sequence[Result], scorer: Scorer, questions: Sequence[Question]) -> list[Result]:
    """``judged`` with the run's reward and each question's answer type added."""
    for result, question in zip(judged, questions, strict=True):  # lets an LLM judge work on many answers at once
        scorer.begin(result.answer, question)
    made = []
    for result, question in zip(judged, questions, strict=True):
        kind = "unanswerable" if question.unanswerable else question.metadata.get("answer_type")
        worth = scorer(result.answer, question)
        made.append(result.model_copy(update={"reward": worth, "answer_type": kind if isinstance(kind, str) else None}))
    scorer.tell()
    return made


def judge(benchmark: str, group: Group, recall: Recall | None = None) -> Result:
    """The result of the one greedy trajectory in ``group``."""
    [trajectory], question = group.trajectories, group.question
    covers, yes_no = cover_match(trajectory.answer, question.answers), is_yes_no(question)
    read = holds(_read_passages(trajectory), patterns(question))
    in_corpus, nowhere = recall.in_corpus if recall else None, question.unanswerable
    return Result(
        benchmark=benchmark,
        id=question.id,
        hops=question.hops,
        question=question.text,
        answers=question.answers,
        answer=trajectory.answer,
        em=trajectory.reward,
        f1=trajectory.f1,
        cover_em=covers,
        searches=trajectory.searches,
        tokens=trajectory.sampled_tokens,
        stop_reason=trajectory.stop_reason,
        yes_no=yes_no,
        read=read,
        in_topk=recall.in_topk if recall else None,
        in_corpus=in_corpus,
        failure=classify(trajectory, covers=bool(covers), yes_no=yes_no, read=read, in_corpus=in_corpus, unanswerable=nowhere),
    )


def with_samples(result: Result, group: Group) -> Result:
    """``result`` with the outcomes of the question's sampled trajectories."""
    em = tuple(trajectory.reward for trajectory in group.trajectories)
    tokens = tuple(trajectory.sampled_tokens for trajectory in group.trajectories)
    return result.model_copy(update={"em_of_samples": em, "tokens_of_samples": tokens})


def _read_passages(trajectory: Trajectory) -> Iterator[str]:
    """Title and text of every passage as the policy read it: tags neutralized, truncations included."""
    for turn in trajectory.turns:
        if turn.kind.is_call:  # `open` shows passages, too
            yield from (" ".join(split_passage(passage)) for passage in seen_passages(turn.observation_text))


def _timing(sampler: RolloutSampler, questions: Sequence[Question], seconds: float, alone: int) -> Timing:
    """Runs ``alone`` evenly spaced questions again, one at a time; ``seconds`` is the batched time of all ``questions``."""
    chosen = min(alone, len(questions))
    # An answer kept from an interrupted call would take no time, so this sampler starts without any.
    sampler = replace(sampler, checkpointer=Checkpointer(stop=sampler.checkpointer.stop))
    times = []
    for i in range(chosen):
        clock = time.perf_counter()
        sampler.groups([questions[i * len(questions) // chosen]], 1, temperature=0.0, seed=0)
        times.append(time.perf_counter() - clock)
    return Timing(
        seconds_a_question=seconds / len(questions),
        latency=median(times) if times else None,
        longest=max(times, default=None),
        alone=chosen,
    )
