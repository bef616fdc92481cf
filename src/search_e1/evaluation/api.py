"""The Python API: ``search_e1.evaluate``, ``search_e1.compare`` and ``search_e1.report``."""

import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from search_e1 import runs
from search_e1.config import EvaluationConfig, PolicyConfig, RolloutConfig, default_of
from search_e1.data.answers import in_language
from search_e1.data.questions import load_questions, settle
from search_e1.errors import ConfigError
from search_e1.evaluation import compare as comparing
from search_e1.evaluation import results
from search_e1.evaluation.compare import Comparison
from search_e1.evaluation.evaluate import evaluate as evaluate_into
from search_e1.evaluation.places import places
from search_e1.evaluation.results import Evaluation, Result
from search_e1.evaluation.statistics import Interval
from search_e1.retrieval.base import Retriever
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.runs import notebook
from search_e1.runs.progress import Progress, silent
from search_e1.training import policy as policies
from search_e1.training.policy import Policy
from search_e1.training.sources import resolve
from search_e1.types import Question

UNNAMED = "questions"
"""Benchmark name for questions that name none."""


@dataclass(frozen=True, slots=True, repr=False)
class EvaluationResult:
    """A policy's results on a set of questions."""

    evaluation: Evaluation
    """All figures, over all questions and by benchmark and hops."""
    results: tuple[Result, ...]
    """For each question, the answer, whether it is right, and if not, why."""
    path: Path | None
    """The directory of the trajectories; ``None`` if they were not kept."""

    @property
    def n(self) -> int:
        return self.evaluation.n

    @property
    def em(self) -> float:
        """Greedy EM, mean over questions."""
        return self.evaluation.em

    @property
    def interval(self) -> Interval:
        """Wilson's 95% interval of ``em``."""
        return self.evaluation.em_interval

    @property
    def em_sampled(self) -> float | None:
        """Mean EM of the sampled trajectories; ``None`` if none were sampled."""
        return self.evaluation.em_sampled

    def __repr__(self) -> str:
        low, high = self.interval
        sampled = "" if self.em_sampled is None else f", em_sampled={self.em_sampled:.3f}"
        return f"EvaluationResult(n={self.n}, em={self.em:.3f}, interval=({low:.3f}, {high:.3f}){sampled})"


def evaluate(
    policy: Policy | str | Path,
    retriever: Retriever,
    questions: Sequence[Question] | Mapping[str, Sequence[Question]] | str | Path,
    limits: RolloutConfig | None = None,
    *,
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Roll out ``policy`` on every question once greedily and ``samples`` times at ``temperature``, and judge the answers.

    Args:
        policy: a policy in memory, or anything that ``policy.model`` accepts: a directory, a Hub id, ``"small"``.
        questions: a question file, questions (grouped by their ``benchmark``), or questions by benchmark.
        limits: turns, tokens, passages: the config's ``[rollout]``.
        out: directory for the trajectories and figures, for ``compare`` and the command line. If it already holds this
            evaluation, a policy given by path or id is not evaluated again. By default nothing is kept.
        progress: called after each trajectory; by default a progress line in a notebook, and nothing elsewhere.

    Raises:
        ConfigError: ``out`` exists, and whether it holds this evaluation cannot be checked: the policy is in memory, or the
            retriever has no checksum.
        DataError: there are no questions, or their file cannot be read.
        ModelError: the policy cannot be loaded, or a question does not fit into its context.
        RetrievalError: from the retriever.
        RunError: ``out`` holds a different artifact.
    """
    limits = limits or RolloutConfig()
    asked = _by_benchmark(questions, limits.rewards.not_found)
    settings = EvaluationConfig(samples=samples, temperature=temperature, latency=0, recall=False)
    place = Path(out) if out is not None else None
    loaded, identity = _policy(policy, place)
    searched = _retrieval(retriever, limits.topk, place) if place else ""
    engine = TorchEngine(loaded.model, loaded.tokenizer, batch_size=limits.batch_size)
    with ExitStack() as stack:
        stack.enter_context(in_language(limits.answer_language))
        if progress is None:
            shown = notebook.watch(1)("evaluation") if notebook.in_notebook() else nullcontext(silent)
            progress = stack.enter_context(shown)

        def make(directory: Path) -> Mapping[str, Any]:
            evaluation = evaluate_into(
                engine, retriever, asked, loaded.prompts, settings, limits, seed=seed, out=directory, progress=progress
            )
            return evaluation.model_dump(mode="json")

        if place is None:
            directory = Path(stack.enter_context(TemporaryDirectory(prefix="search-e1-")))
            evaluation = Evaluation.model_validate(make(directory))
        else:
            made = runs.artifact(
                place,
                stage=f"evaluation-{place.name}",
                settings={"evaluation": settings.model_dump(mode="json"), "rollout": limits.model_dump(mode="json")},
                inputs={"policy": identity, "retrieval": searched, "questions": _checksum(asked)},
                seed=seed,
                make=make,
                defaults=default_of,
            )
            directory, evaluation = made.path, Evaluation.model_validate(made.manifest.result)
        return EvaluationResult(evaluation, tuple(results.read(directory / results.QUESTIONS)), place)


def _policy(policy: Policy | str | Path, out: Path | None) -> tuple[Policy, str]:
    """The policy, loaded, and its identity."""
    if not isinstance(policy, Policy):
        source = resolve(str(policy))
        identity = runs.checksum(source) if isinstance(source, Path) else source
        return policies.load(policy, PolicyConfig(model=str(policy))), identity
    if out and out.exists():
        raise ConfigError(f"{out}: already exists; give another directory, or the policy's directory instead of one in memory")
    return policy, f"in memory, {uuid.uuid4()}"


def _by_benchmark(
    questions: Sequence[Question] | Mapping[str, Sequence[Question]] | str | Path, not_found: Sequence[str]
) -> Mapping[str, Sequence[Question]]:
    if isinstance(questions, Mapping):
        return {name: [settle(q, not_found, f"question {q.id!r}") for q in part] for name, part in questions.items()}
    if isinstance(questions, str | Path):
        questions = load_questions(questions)
    grouped: dict[str, list[Question]] = {}
    for question in questions:
        grouped.setdefault(question.benchmark or UNNAMED, []).append(settle(question, not_found, f"question {question.id!r}"))
    return grouped


def _checksum(asked: Mapping[str, Sequence[Question]]) -> str:
    return runs.sha256_text("".join(f"{name} {q.model_dump_json()}\n" for name, part in asked.items() for q in part))


def _retrieval(retriever: Retriever, topk: int, out: Path) -> str:
    """The identity of what ``retriever`` searches: its checksum, else its server's URL, else its class name."""
    if probe := getattr(retriever, "probe", None):
        probe(topk)  # a server sends its checksum with its first response
    if known := getattr(retriever, "checksum", None) or getattr(retriever, "url", None):
        return str(known)
    if out.exists():
        raise ConfigError(
            f"{out}: already exists, and a retriever without a checksum cannot be told from another; give another"
        )
    return type(retriever).__qualname__


def compare(
    *evaluations: str | Path | EvaluationResult,
    common: bool = False,
    allow_mixed: bool = False,
    published: bool = False,
    seed: int = 0,
) -> Comparison:
    """Compare evaluations question by question, as ``search-e1 compare`` does; the first is the baseline.

    Args:
        evaluations: each a run (all its evaluations), ``"RUN:STAGE"`` (``"runs/a:ofsd-1"``), the directory of an
            evaluation, or a kept result; ``"NAME=..."`` names it.
        common, allow_mixed, published, seed: see ``evaluation.compare.compare``.

    Raises:
        ConfigError: there are fewer than two evaluations, or they are not comparable; names the flag that allows it.
        RunError, DataError: an evaluation is missing or damaged.
    """
    words = []
    for one in evaluations:
        if isinstance(one, EvaluationResult) and one.path is None:
            raise ConfigError("an evaluation was not kept; give evaluate(..., out=DIRECTORY)")
        words.append(str(one.path) if isinstance(one, EvaluationResult) else str(one))
    loaded = [comparing.load(path, name) for name, path in places(words).items()]
    if len(loaded) < 2:
        found = f" ({loaded[0].path})" if loaded else ""
        raise ConfigError(f"{'only one evaluation' if loaded else 'no evaluations'}{found}; give another to compare it with")
    return comparing.compare(loaded, common=common, allow_mixed=allow_mixed, published=published, seed=seed)


def report(run: str | Path, out: str | Path | None = None, *, most: int = 5_000) -> Path:
    """Write ``run``, finished or not, as one HTML file; returns its path, by default ``report.html`` in the run.

    ``most``: approximate number of trajectories shown; beyond it, a fixed sample of questions.

    Raises:
        RunError, DataError: ``run`` is not a run, something in it is damaged, or ``out`` cannot be written.
    """
    from search_e1.evaluation.report.page import write

    place = Path(out) if out is not None else Path(run) / "report.html"
    write(Path(run), place, most)
    return place
