"""The demonstrations of a cold start, from the source that ``coldstart.demonstrations`` names."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from search_e1.config import NEW, Config, Prompts
from search_e1.errors import ConfigError
from search_e1.rollout import pool
from search_e1.rollout.demonstrations import endpoint, hops, passages, questions
from search_e1.rollout.demonstrations.file import Demonstrations
from search_e1.rollout.demonstrations.forms import Lesson
from search_e1.rollout.demonstrations.writer import Writer
from search_e1.rollout.engines.words import Words
from search_e1.runs.context import StageContext
from search_e1.stages.inputs import Inputs, subsample
from search_e1.training.policy import Reader
from search_e1.types import Passage

Source = Literal["passages", "questions", "endpoint", "file"]


class Taught(NamedTuple):
    lessons: Sequence[Lesson]
    figures: Mapping[str, Any]
    """Number of demonstrations by source, and the source's own figures."""


def sources(config: Config) -> tuple[Source, ...]:
    """The sources of demonstrations. With both passages and questions, "questions" serves questions that name no passages."""
    assert config.coldstart
    if config.coldstart.demonstrations != "auto":
        return (config.coldstart.demonstrations,)
    if config.coldstart.endpoint:
        return ("endpoint",)
    if config.data.demonstrations:
        return ("file",)
    return ("passages", "questions") if config.data.corpus else ("questions",)


def check(run: Inputs) -> None:
    """Check the source before any work. An endpoint is not asked: it may be gone once it has served.

    Raises:
        ConfigError: data that the source needs is missing, or the endpoint's URL is invalid.
        DataError: see ``Demonstrations.check_form``.
    """
    config, chosen = run.config, sources(run.config)
    if chosen == ("passages",) and not config.data.corpus:
        raise ConfigError("data.corpus is missing; supporting passages are read from it")
    if chosen == ("file",) and config.data.demonstrations is None:
        raise ConfigError('coldstart.demonstrations = "file": data.demonstrations is missing; give the path of that file')
    if chosen == ("file",):
        assert config.data.demonstrations
        new = config.policy.model == NEW
        reader = Reader(Words(), config.prompts or Prompts(), sys.maxsize) if new else run.load_reader(config.policy.model)
        Demonstrations(config.data.demonstrations, reader.tokenizer, reader.prompts).check_form(run.train_questions)
    if chosen == ("endpoint",):
        assert config.coldstart
        assert config.coldstart.endpoint
        _ = endpoint.endpoint_of(config.coldstart.endpoint).address  # checks the URL


def inputs(run: Inputs) -> Mapping[str, str]:
    """Checksum of the demonstration file, if it is the source; questions and passages are inputs of the cold start itself."""
    path = run.config.data.demonstrations
    return {"demonstrations": run.checksum(path)} if path and sources(run.config) == ("file",) else {}


def gather(run: Inputs, writer: Writer, corpus: Mapping[str, Passage], context: StageContext) -> Taught:
    """The demonstrations of the training questions.

    Raises:
        DataError: a question names a passage that ``corpus`` lacks; for a file, see ``Demonstrations.lessons``.
        EndpointError: see ``endpoint.sample``.
        RetrievalError: from the retriever.
    """
    chosen = sources(run.config)
    if chosen == ("file",):
        return _from_file(run, writer)
    if chosen == ("endpoint",):
        return _from_endpoint(run, writer, context)
    naming_passages = (q for q in run.train_questions if passages.names_passages(q) and not q.unanswerable)
    named = list(naming_passages) if "passages" in chosen else []
    supported = hops.lessons(passages.plans(named, corpus, seed=run.config.seed), writer, context.progress)
    if "questions" not in chosen:
        return Taught(supported, {"passages": len(supported)})
    named_ids = {question.id for question in named}
    rest = [question for question in run.train_questions if question.id not in named_ids]
    plans = questions.plans(rest, writer, seed=run.config.seed, progress=context.progress)
    searched = hops.lessons(plans, writer, context.progress)
    return Taught([*supported, *searched], {"passages": len(supported), "questions": len(searched)})


def _from_file(run: Inputs, writer: Writer) -> Taught:
    path = run.config.data.demonstrations
    assert path
    demonstrations = Demonstrations(path, writer.tokenizer, writer.prompts)
    lessons, left_out = demonstrations.lessons(run.train_questions, writer, seed=run.config.seed)
    return Taught(lessons, {"file": len(lessons), "left_out": left_out})


def _from_endpoint(run: Inputs, writer: Writer, context: StageContext) -> Taught:
    config = run.config
    assert config.coldstart
    assert config.coldstart.endpoint
    questions = subsample(run.train_questions, config.coldstart.endpoint.questions, config.seed)
    figures = endpoint.sample(
        config.coldstart.endpoint, questions, run.retriever, writer.prompts, config.rollout,
        seed=context.seed, out=context.out, progress=context.progress, checkpointer=context.checkpointer,
    )  # fmt: skip
    lessons = endpoint.lessons(pool.read(context.out / pool.FILE), writer, seed=config.seed)
    return Taught(lessons, {"endpoint": len(lessons), "em": figures["em"], "stop_reasons": figures["stop_reasons"]})
