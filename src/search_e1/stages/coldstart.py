"""The cold start: fine-tunes a pretrained or newly initialized policy on demonstrations of the protocol."""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from search_e1.config import NEW, Config, Prompts
from search_e1.errors import ConfigError, DataError
from search_e1.retrieval.registry import index_kinds
from search_e1.rollout.demonstrations.forms import batches
from search_e1.rollout.demonstrations.passages import named_passages
from search_e1.rollout.demonstrations.writer import Writer
from search_e1.runs import ranks
from search_e1.runs.context import StageContext
from search_e1.runs.stage_id import StageId
from search_e1.stages import demonstrations, probe
from search_e1.stages.inputs import Inputs
from search_e1.stages.stage import Stage, sections
from search_e1.training import new_policy
from search_e1.training.loop import Schedule, train
from search_e1.training.objectives.sft import Sft
from search_e1.training.policy import Policy, context_length, with_adapter
from search_e1.training.record import mean
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Passage, Question, Sample

_LAST = 20  # steps whose mean loss is reported


class Coldstart(Stage):
    """Writes ``policy/`` and ``steps.jsonl``. Figures: demonstrations by source, questions without one, first and last loss
    in nats per token, positions (tokens in the loss), tokens per second."""

    id = StageId("coldstart")

    def settings(self, config: Config) -> Mapping[str, Any]:
        return sections(config, "coldstart", "rollout", "seed")

    def inputs(self, run: Inputs) -> Mapping[str, str]:
        model, retrieval = run.config.policy.model, run.config.retrieval
        # The index of a run that builds it stands for the corpus.
        apart = run.config.data.corpus and (retrieval.index or not index_kinds(retrieval))
        corpus = {"corpus": run.corpus_checksum} if apart else {}
        return {**run.sampled_on(None if model == NEW else model), **corpus, **demonstrations.inputs(run)}

    def check(self, run: Inputs) -> None:
        """
        Raises:
            ConfigError: the section is missing, or data that the demonstrations or a new policy need.
            DataError: see ``demonstrations.check``.
        """
        config = run.config
        if config.coldstart is None:
            raise ConfigError("section [coldstart] is missing; add it, it may be empty")
        if config.policy.model == NEW and not config.data.corpus:
            raise ConfigError(f'policy.model = "{NEW}": data.corpus is missing; its tokenizer is trained on the passages')
        demonstrations.check(run)

    def work(self, run: Inputs, context: StageContext) -> Mapping[str, Any]:
        """
        Raises:
            DataError: no question yields a demonstration, or a question names a passage that the corpus lacks; see
                ``demonstrations.gather``.
        """
        coldstart = run.config.coldstart
        assert coldstart
        everything = run.config.policy.model == NEW  # its tokenizer is trained on the passages
        named = named_passages(run.train_questions) if "passages" in demonstrations.sources(run.config) else set()
        corpus = run.corpus if everything or named else None
        passages = {passage.id: passage for passage in corpus or () if everything or passage.id in named}
        policy = _initial_policy(run, passages)
        longest = min(run.config.rollout.max_tokens, context_length(policy.model.config))
        limits = run.config.rollout.model_copy(update={"max_tokens": longest})
        writer = Writer(policy.tokenizer, policy.prompts, limits, run.retriever)
        lessons, sources = demonstrations.gather(run, writer, passages, context)
        drawn_batches = batches(lessons, coldstart, seed=run.config.seed)
        model = with_adapter(policy.model, coldstart.lora) if coldstart.lora else policy.model
        sharding = run.config.parallel.sharding
        trained = TrainedPolicy(model, coldstart.training, frozen_start=False, sharding=sharding, dtype=policy.dtype)
        schedule = Schedule(coldstart.steps, coldstart.learning_rate)
        objective = Sft(logits_mib=coldstart.training.logits_mib)
        source = BatchSource(drawn_batches, context_length(policy.model.config))
        probe_questions = probe.questions_of(run.train_questions, lessons, coldstart.probe, run.config.seed)
        probed = {}
        if probe_questions and run.config.policy.model != NEW:
            probed["before"] = probe.measure(run, trained, policy, probe_questions, "before.jsonl", context)
        steps = train(trained, source, {"sft": objective}, coldstart.training, schedule, context)
        if probe_questions:
            probed["after"] = probe.measure(run, trained, policy, probe_questions, "after.jsonl", context)
        policy.model = trained.finish()
        if ranks.is_first():
            policy.save(context.out / "policy")
        seconds = sum(step["seconds"] for step in steps)
        counted = all("positions" in step for step in steps)  # not in steps of an earlier version
        return {
            "questions": len(run.train_questions),
            "demonstrations": sources,
            "untaught": len(run.train_questions) - len({lesson.question.id for lesson in lessons}),
            "parameters": policy.model.num_parameters(),
            "steps": len(steps),
            "first_loss": steps[0]["loss"],
            "last_loss": mean(steps[-_LAST:], "loss"),
            "positions": round(sum(step["positions"] for step in steps)) if counted else None,
            "tokens_per_second": sum(step["tokens"] for step in steps) / seconds,
            "seconds": seconds,
            "halved": sum(step.get("halved", 0) for step in steps),
            **probed,
        }


def _initial_policy(run: Inputs, passages: Mapping[str, Passage]) -> Policy:
    """The config's policy, or a newly initialized one for ``policy.model = "new"``."""
    config = run.config
    assert config.coldstart
    if config.policy.model != NEW:
        training = config.coldstart.training
        return run.load_to_train(config.policy.model, training, adapters=config.coldstart.lora is not None)
    prompts = config.prompts or Prompts()
    texts = _tokenizer_texts(
        run.train_questions, passages, prompts, config.coldstart.new_policy.tokenizer_passages, config.seed
    )
    return new_policy.policy(texts, config.coldstart.new_policy, prompts, config.seed)


class BatchSource:
    """Serves the training loop from an iterator of batches, one per step. The iterator must be deterministic for resuming."""

    def __init__(self, batches: Iterator[Sequence[Sample]], context_length: int) -> None:
        self.figures: Mapping[str, float] = {}
        self._batches, self._context_length, self._drawn = batches, context_length, 0

    def next(self, step: int) -> Mapping[str, Sequence[Sample]]:
        """
        Raises:
            DataError: the iterator is exhausted, or a sample is longer than the policy's context.
        """
        batch = next(itertools.islice(self._batches, step - self._drawn, None), None)
        if not batch:
            raise DataError(f"demonstrations ran out after {step} steps; give more, or train fewer steps")
        self._drawn = step + 1
        self.figures = {
            "tokens": float(sum(map(len, batch))),
            "positions": float(sum(len(sample.positions) for sample in batch)),
        }
        if (longest := max(map(len, batch))) > self._context_length:
            raise DataError(
                f"a demonstration of {longest} tokens does not fit into the context of {self._context_length}; shorten it"
            )
        return {"sft": batch[ranks.rank() :: ranks.count()]}


def _tokenizer_texts(
    questions: Sequence[Question], passages: Mapping[str, Passage], prompts: Prompts, count: int, seed: int
) -> list[str]:
    """Training texts of the tokenizer: questions, ``count`` passages, and the prompts' and protocol's phrases, repeated."""
    sample = random.Random(seed).sample(list(passages), min(count, len(passages)))
    phrases = (
        "I need to find",
        "So the answer is",
        "I will search for the question.",
        "Doc 1(Title: ",
        "user\n",
        "assistant\n",
    )
    framed = (prompts.instruction, prompts.privileged, prompts.correction, *phrases)
    return [
        *itertools.chain.from_iterable(itertools.repeat(text, 50) for text in framed),
        *(question.text for question in questions),
        *(f"{passages[id].title}\n{passages[id].text}" for id in sample),
    ]
