"""How good a policy is: greedy and sampled rollouts of every question, judged one by one."""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median

from search_e1.config import EvaluationConfig, Prompts, RolloutConfig
from search_e1.data.answers import cover_match
from search_e1.errors import DataError
from search_e1.evaluation import results
from search_e1.evaluation.ceiling import Ceiling, holds, is_yes_no, patterns
from search_e1.evaluation.failures import classify
from search_e1.evaluation.results import Evaluation, Result
from search_e1.retrieval.base import Retriever
from search_e1.rollout.chunks import Asking
from search_e1.rollout.engines.base import Generator
from search_e1.rollout.sharing import Part, share
from search_e1.runs import derived_seed
from search_e1.runs.checkpoints import Lines, Work
from search_e1.runs.progress import Progress, silent
from search_e1.types import Group, Question, Record, Trajectory

TRAJECTORIES, SAMPLED, TIMINGS = "trajectories.jsonl", "sampled.jsonl", "timings.json"
_DOCUMENT = re.compile(r"Doc \d+\(Title: ")

Ceilings = Mapping[tuple[str, str], Ceiling]
"""By benchmark and question id."""


class Timing(Record):
    """What ``timings.json`` holds for each benchmark. In a file of its own: all others are the same when made again."""

    seconds_a_question: float
    """Wall-clock time of the greedy rollouts over their number: what a question costs in batches."""
    latency: float | None
    """Median seconds from question to answer when nothing else is asked; ``None`` if none was asked alone."""
    longest: float | None
    """Seconds of the slowest of these."""
    alone: int
    """Questions that were asked alone."""


def evaluate(
    generator: Generator,
    retriever: Retriever,
    questions_by_benchmark: Mapping[str, Sequence[Question]],
    prompts: Prompts,
    config: EvaluationConfig,
    limits: RolloutConfig,
    *,
    seed: int,
    out: Path,
    ceilings: Ceilings | None = None,
    progress: Progress = silent,
    work: Work | None = None,
) -> Evaluation:
    """Roll out every question once greedily and ``config.samples`` times at ``config.temperature``, and judge the answers.

    Into ``out`` go groups, a JSON line for each question in order (greedy ones to ``TRAJECTORIES``, sampled ones to
    ``SAMPLED``), a ``Result`` for each question, the figures over them, and times. Each benchmark is sampled with a seed made
    of ``seed`` and its name, so that it depends on nothing that ran before.

    With the same arguments and a ``work`` that was begun, groups that lie there are kept and the others are rolled out.

    Raises:
        DataError: a benchmark has no questions, or there is no benchmark.
        RetrievalError: from the retriever.
        Stopped: a signal has asked to stop; the chunk at hand is finished and on disk.
        Left: to all processes but the first, which judges.
    """
    empty = [name for name, questions in questions_by_benchmark.items() if not questions]
    if empty or not questions_by_benchmark:
        raise DataError(
            f"no questions to evaluate on in {empty or 'data.eval'}; give files that hold some in data.eval"
        )
    work = work or Work()
    asking = Asking(generator, retriever, prompts, limits)
    told = _Told(progress, sum(map(len, questions_by_benchmark.values())) * (1 + config.samples))
    greedy = _Written(asking, out / TRAJECTORIES, work, told)
    sampled = _Written(asking, out / SAMPLED, work, told) if config.samples else None
    parts = [greedy.part(questions_by_benchmark, 1, 0.0, seed)]
    parts += [sampled.part(questions_by_benchmark, config.samples, config.temperature, seed)] if sampled else []
    share(work, parts)
    told.done, told.right = 0, 0.0  # all are read now, and told once more
    made: list[Result] = []
    timings: dict[str, Timing] = {}
    for name, questions in questions_by_benchmark.items():
        own, before = derived_seed(seed, name), greedy.lines.tally["seconds"]
        part = [
            judge(name, group, (ceilings or {}).get((name, group.question.id)))
            for group in greedy.groups(questions, 1, 0.0, own)
        ]
        if sampled:
            groups = sampled.groups(questions, config.samples, config.temperature, own)
            part = [with_samples(result, group) for result, group in zip(part, groups, strict=True)]
        made += part
        timings[name] = _timing(asking, questions, greedy.lines.tally["seconds"] - before, config.latency)
    found = results.evaluation(made, seed)
    results.write(made, out / results.QUESTIONS)
    (out / results.EVALUATION).write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    times = {name: timing.model_dump() for name, timing in timings.items()}
    (out / TIMINGS).write_text(json.dumps(times, indent=2) + "\n", encoding="utf-8")
    return found


def judge(benchmark: str, group: Group, ceiling: Ceiling | None = None) -> Result:
    """What is to be said of a greedy trajectory, the only one of ``group``."""
    [trajectory], question = group.trajectories, group.question
    covers, yes_no = cover_match(trajectory.answer, question.answers), is_yes_no(question)
    read = holds(_read(trajectory), patterns(question))
    in_corpus = ceiling.in_corpus if ceiling else None
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
        in_topk=ceiling.in_topk if ceiling else None,
        in_corpus=in_corpus,
        failure=classify(trajectory, covers=bool(covers), yes_no=yes_no, read=read, in_corpus=in_corpus),
    )


def with_samples(result: Result, group: Group) -> Result:
    """``result`` with what the question's sampled trajectories came to."""
    em = tuple(trajectory.reward for trajectory in group.trajectories)
    tokens = tuple(trajectory.sampled_tokens for trajectory in group.trajectories)
    return result.model_copy(update={"em_of_samples": em, "tokens_of_samples": tokens})


def _read(trajectory: Trajectory) -> Iterator[str]:
    """Title and text of every passage as the policy read it: tags broken, cut where it was cut."""
    for turn in trajectory.turns:
        if turn.served:
            lines = turn.observation_text.splitlines()  # a passage each, between the protocol's own
            yield from (_DOCUMENT.sub("", line, count=1) for line in lines if _DOCUMENT.match(line))


class _Written:
    """Groups in a file, chunk by chunk: as they lie there, or rolled out and written."""

    def __init__(self, asking: Asking, path: Path, work: Work, told: "_Told") -> None:
        self.asking, self.path, self.work, self.told = asking, path, work, told

    @cached_property
    def lines(self) -> Lines:
        return self.work.lines(self.path)

    def part(
        self, questions_by_benchmark: Mapping[str, Sequence[Question]], size: int, temperature: float, seed: int
    ) -> Part:
        """What ``groups`` of all benchmarks, one after the other, would write."""
        chunks = [
            (chunk, derived_seed(seed, name))
            for name, questions in questions_by_benchmark.items()
            for chunk in self.asking.chunks(questions, size)
        ]
        return Part(self.path, chunks, lambda chunk, _: self._made(chunk[0], size, temperature, chunk[1])[1:])

    def groups(self, questions: Sequence[Question], size: int, temperature: float, seed: int) -> Iterator[Group]:
        for chunk in self.asking.chunks(questions, size):
            found = self.lines.read()
            yield from self._asked(chunk, size, temperature, seed) if found is None else self._there(found)

    def _there(self, lines: Sequence[bytes]) -> Iterator[Group]:
        for line in lines:
            group = Group.model_validate_json(line)
            for trajectory in group.trajectories:
                self.told(0, trajectory)
            yield group

    def _asked(self, chunk: Sequence[Question], size: int, temperature: float, seed: int) -> list[Group]:
        with self.work.finishing():
            groups, lines, sums = self._made(chunk, size, temperature, seed)
            self.lines.append(lines, sums)
        return groups

    def _made(
        self, chunk: Sequence[Question], size: int, temperature: float, seed: int
    ) -> tuple[list[Group], Iterator[str], Mapping[str, float]]:
        clock = time.perf_counter()
        groups = self.asking.groups(chunk, size, temperature=temperature, seed=seed, on_trajectory=self.told)
        return groups, (group.model_dump_json() for group in groups), {"seconds": time.perf_counter() - clock}


class _Told:
    """Counts trajectories as they end, with the running EM."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total = progress, total
        self.done, self.right = 0, 0.0

    def __call__(self, index: int, trajectory: Trajectory) -> None:
        self.done += 1
        self.right += trajectory.reward
        self.progress(self.done, self.total, f"EM {self.right / self.done:.3f}")


def _timing(asking: Asking, questions: Sequence[Question], seconds: float, alone: int) -> Timing:
    """``seconds`` is what all of ``questions`` took together; of these, ``alone`` evenly spread ones are asked again."""
    chosen = min(alone, len(questions))
    times = []
    for i in range(chosen):
        clock = time.perf_counter()
        asking.groups([questions[i * len(questions) // chosen]], 1, temperature=0.0, seed=0)
        times.append(time.perf_counter() - clock)
    return Timing(
        seconds_a_question=seconds / len(questions),
        latency=median(times) if times else None,
        longest=max(times, default=None),
        alone=chosen,
    )
