"""The demonstrations of a cold start, from wherever ``coldstart.demonstrations`` says."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from search_e1.config import Config
from search_e1.errors import ConfigError
from search_e1.rollout import pool
from search_e1.rollout.demonstrations import endpoint, hops, passages, questions
from search_e1.rollout.demonstrations.file import Demonstrations
from search_e1.rollout.demonstrations.forms import Lesson
from search_e1.rollout.demonstrations.writer import Writer
from search_e1.runs.context import StageContext
from search_e1.stages.inputs import Inputs, subsample
from search_e1.types import Passage

Source = Literal["passages", "questions", "endpoint", "file"]


class Taught(NamedTuple):
    lessons: Sequence[Lesson]
    figures: Mapping[str, Any]
    """Demonstrations by source, and more of what the source has to say."""


def sources(config: Config) -> tuple[Source, ...]:
    """Where demonstrations come from. Of passages and questions, questions are for those that name no passages."""
    assert config.coldstart
    if config.coldstart.demonstrations != "auto":
        return (config.coldstart.demonstrations,)
    if config.coldstart.endpoint:
        return ("endpoint",)
    if config.data.demonstrations:
        return ("file",)
    return ("passages", "questions") if config.data.corpus else ("questions",)


def check(config: Config) -> None:
    """
    Raises:
        ConfigError: what the source needs is missing, or the endpoint's URL is none.
    """
    chosen = sources(config)
    if chosen == ("passages",) and not config.data.corpus:
        raise ConfigError("data.corpus is missing; supporting passages are read there")
    if chosen == ("file",) and config.data.demonstrations is None:
        raise ConfigError('coldstart.demonstrations = "file": data.demonstrations is missing; give the path of that file')
    if chosen == ("endpoint",):
        assert config.coldstart
        assert config.coldstart.endpoint
        assert endpoint.endpoint_of(config.coldstart.endpoint).address


def inputs(run: Inputs) -> Mapping[str, str]:
    """What demonstrations are made of, beside the training questions and the passages."""
    path = run.config.data.demonstrations
    return {"demonstrations": run.checksum(path)} if path and sources(run.config) == ("file",) else {}


def gather(run: Inputs, writer: Writer, corpus: Mapping[str, Passage], context: StageContext) -> Taught:
    """The demonstrations of the training questions.

    Raises:
        DataError: a question names a passage that ``corpus`` lacks; see ``Demonstrations.lessons`` for the file.
        EndpointError: see ``endpoint.sample``.
        RetrievalError: from the retriever.
    """
    chosen = sources(run.config)
    if chosen == ("file",):
        return _from_file(run, writer)
    if chosen == ("endpoint",):
        return _from_endpoint(run, writer, context)
    taught_by_passages = (q for q in run.train_questions if passages.names_passages(q) and not q.unanswerable)
    named = list(taught_by_passages) if "passages" in chosen else []
    supported = hops.lessons(passages.plans(named, corpus, seed=run.config.seed), writer, context.progress)
    if "questions" not in chosen:
        return Taught(supported, {"passages": len(supported)})
    known = {question.id for question in named}
    rest = [question for question in run.train_questions if question.id not in known]
    plans = questions.plans(rest, writer, seed=run.config.seed, progress=context.progress)
    found = hops.lessons(plans, writer, context.progress)
    return Taught([*supported, *found], {"passages": len(supported), "questions": len(found)})


def _from_file(run: Inputs, writer: Writer) -> Taught:
    path = run.config.data.demonstrations
    assert path
    given = Demonstrations(path, writer.tokenizer, writer.prompts)
    lessons, left_out = given.lessons(run.train_questions, writer, seed=run.config.seed)
    return Taught(lessons, {"file": len(lessons), "wrong or too long": left_out})


def _from_endpoint(run: Inputs, writer: Writer, context: StageContext) -> Taught:
    config = run.config
    assert config.coldstart
    assert config.coldstart.endpoint
    asked = subsample(run.train_questions, config.coldstart.endpoint.questions, config.seed)
    figures = endpoint.sample(
        config.coldstart.endpoint, asked, run.retriever, writer.prompts, config.rollout,
        seed=context.seed, out=context.out, progress=context.progress, checkpointer=context.checkpointer,
    )  # fmt: skip
    lessons = endpoint.lessons(pool.read(context.out / pool.FILE), writer, seed=config.seed)
    return Taught(lessons, {"endpoint": len(lessons), "em": figures["em"], "stop_reasons": figures["stop_reasons"]})
