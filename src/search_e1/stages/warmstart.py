"""The warm start: a policy from nothing, taught the protocol by demonstrations built of supporting passages."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from search_e1.config import Config, Prompts, WarmstartConfig
from search_e1.data.corpus import read_corpus
from search_e1.errors import ConfigError, DataError
from search_e1.rollout import demonstrations
from search_e1.runs import ranks
from search_e1.runs.context import StageContext
from search_e1.runs.stage_id import StageId
from search_e1.stages.inputs import Inputs
from search_e1.stages.stage import Stage, sections
from search_e1.training import fresh
from search_e1.training.loop import Schedule, train
from search_e1.training.objectives.sft import Sft
from search_e1.training.record import mean
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Passage, Question, Sample

_LAST = 20  # steps whose mean loss is reported


class Warmstart(Stage):
    """Writes ``policy/``. Figures: questions that gave a demonstration, weights, first and last loss in nats."""

    id = StageId("warmstart")

    def settings(self, config: Config) -> Mapping[str, Any]:
        return sections(config, "warmstart", "rollout", "seed")

    def inputs(self, run: Inputs) -> Mapping[str, str]:
        return run.sampled_on(None)

    def check(self, run: Inputs) -> None:
        """
        Raises:
            ConfigError: the config lacks the section or the corpus, or asks for tools.
        """
        config = run.config
        if config.warmstart is None:
            raise ConfigError("section [warmstart] is missing; add it, it may be empty")
        if config.data.corpus is None:
            raise ConfigError("data.corpus is missing; a warm start reads the supporting passages there")
        if config.prompts and config.prompts.protocol != "tags":
            raise ConfigError(
                'prompts.protocol = "tools": the demonstrations of a warm start are written in tags; leave it out'
            )

    def work(self, run: Inputs, context: StageContext) -> Mapping[str, Any]:
        """
        Raises:
            DataError: no question gives a demonstration, or one names a passage that the corpus lacks.
        """
        config = run.config
        warmstart, corpus, prompts = config.warmstart, config.data.corpus, config.prompts or Prompts()
        assert warmstart
        assert corpus
        passages = {passage.id: passage for passage in read_corpus(corpus)}
        texts = _tokenizer_texts(run.train_questions, passages, prompts, warmstart, config.seed)
        policy = fresh.policy(texts, warmstart, prompts, config.seed)
        lessons = demonstrations.lessons(
            run.train_questions, passages, run.retriever, policy.tokenizer, prompts, config.rollout,
            seed=config.seed, progress=context.progress,
        )  # fmt: skip
        batches = demonstrations.batches(lessons, warmstart, seed=config.seed)
        trained = TrainedPolicy(policy.model, warmstart.training, frozen_start=False, sharding=config.parallel.sharding)
        schedule = Schedule(warmstart.steps, warmstart.learning_rate)
        objective = Sft(logits_mib=warmstart.training.logits_mib)
        source = BatchSource(batches, policy.model.config.get_text_config().max_position_embeddings)
        steps = train(trained, source, {"sft": objective}, warmstart.training, schedule, context)
        policy.model = trained.finish()
        if ranks.is_first():
            policy.save(context.out / "policy")
        return {
            "questions": len(run.train_questions),
            "taught": dict(Counter(lesson.question.id.rpartition("_")[0] for lesson in lessons)),
            "parameters": policy.model.num_parameters(),
            "first_loss": steps[0]["loss"],
            "last_loss": mean(steps[-_LAST:], "loss"),
            "halved": sum(step.get("halved", 0) for step in steps),
        }


class BatchSource:
    """The samples of each step from an iterator that gives a step's samples at a time, the same for a seed."""

    def __init__(self, batches: Iterator[Sequence[Sample]], context_length: int) -> None:
        self.figures: Mapping[str, float] = {}
        self._batches, self._context_length, self._drawn = batches, context_length, 0

    def next(self, step: int) -> Mapping[str, Sequence[Sample]]:
        """
        Raises:
            DataError: the iterator has ended, or a sample is longer than the policy's context.
        """
        batch = next(itertools.islice(self._batches, step - self._drawn, None), None)
        if not batch:
            raise DataError(f"demonstrations ran out after {step} steps; give more, or train fewer steps")
        self._drawn = step + 1
        if (longest := max(map(len, batch))) > self._context_length:
            raise DataError(
                f"a demonstration of {longest} tokens does not fit into the context of {self._context_length}; shorten it"
            )
        return {"sft": batch[ranks.rank() :: ranks.count()]}


def _tokenizer_texts(
    questions: Sequence[Question], passages: dict[str, Passage], prompts: Prompts, config: WarmstartConfig, seed: int
) -> list[str]:
    """What the tokenizer is trained on: questions, a sample of the passages, and the words around them."""
    sample = random.Random(seed).sample(list(passages), min(config.tokenizer_passages, len(passages)))
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
