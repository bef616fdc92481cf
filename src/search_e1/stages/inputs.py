"""Inputs of a run's stages: questions, passages, retriever, policies and engines."""

import difflib
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from search_e1 import runs
from search_e1.config import NEW, Config, Prompts, TrainingConfig, default_of
from search_e1.data.corpus import Corpus
from search_e1.data.questions import load_many, load_questions, subset
from search_e1.errors import ConfigError, DataError, ModelError, RunError
from search_e1.retrieval import directory as directories
from search_e1.retrieval.base import Retriever
from search_e1.retrieval.cache import CachedRetriever
from search_e1.retrieval.indexes import DenseSettings, build_index
from search_e1.retrieval.passages import Passages
from search_e1.retrieval.registry import index_kinds, open_retriever
from search_e1.rollout.demonstrations.file import Demonstrations
from search_e1.rollout.engines.base import Engine
from search_e1.rollout.engines.endpoint import Endpoint
from search_e1.rollout.engines.registry import check_engine, open_engine
from search_e1.rollout.rewards.scorer import open_scorer
from search_e1.runs import Artifact
from search_e1.runs.languages import AUTO
from search_e1.runs.progress import Progress, silent
from search_e1.text.prompts import TEMPLATE_TOKENS, plain_prompt
from search_e1.text.protocols import protocol_of
from search_e1.text.tools import tools_of
from search_e1.training import policy as policies
from search_e1.training.policy import Policy, Reader
from search_e1.training.sources import base_of, resolve
from search_e1.types import Question

logger = logging.getLogger(__name__)

Watch = Callable[[str], AbstractContextManager[Progress]]
"""Called with the name of a stage about to run; the context yields the stage's progress callback."""


def no_progress(stage: str) -> AbstractContextManager[Progress]:
    """A ``Watch`` that shows nothing."""
    return nullcontext(silent)


class Inputs:
    """Inputs of the run in ``root`` under ``config``; questions and retriever are opened on first use, once."""

    def __init__(self, config: Config, root: Path, watch: Watch = no_progress) -> None:
        self.config = config
        self.root = root
        self.watch = watch
        self._checksums: dict[str, str] = {}

    @cached_property
    def train_questions(self) -> list[Question]:
        """The training questions, at most ``data.max_train`` of them."""
        questions = load_many(self.config.data.train, not_found=self.config.rollout.rewards.not_found)
        return subsample(questions, self.config.data.max_train, self.config.seed)

    @cached_property
    def eval_questions(self) -> dict[str, list[Question]]:
        """Benchmark -> its questions."""
        data, not_found = self.config.data, self.config.rollout.rewards.not_found
        return {
            name: subsample(load_questions(path, name, not_found), data.max_eval, self.config.seed)
            for name, path in data.eval.items()
        }

    @cached_property
    def retriever(self) -> Retriever:
        """The retriever, connected and probed; behind a query cache if ``retrieval.cache`` applies."""
        section = self.config.retrieval
        if section.cache is False or (section.cache is True and self._kinds):
            return self._index
        key = self.retrieval_checksum() if self._kinds else self._server_key
        if key:
            path = section.cache if isinstance(section.cache, Path) else self.root / "retrieval-cache"
            return CachedRetriever(self._index, path, key)
        if isinstance(section.cache, Path):
            raise ConfigError(
                f"retrieval.cache: {section.url or section.kind} does not report its index's checksum; identify it with "
                "retrieval.cache_key, or leave retrieval.cache out"
            )
        return self._index

    @cached_property
    def _index(self) -> Retriever:
        section = self.config.retrieval
        if self._kinds:
            section = section.model_copy(update={"index": tuple(self._indexes)})
        return open_retriever(section, self.config.rollout.topk)

    @cached_property
    def _verified(self) -> Retriever:
        """The index, with given directories verified by checksum; an index built by the run is verified with its artifact."""
        for directory in self.config.retrieval.index:
            with self.watch("index check") as progress:
                directories.verify(directory, progress)
        return self._index

    @property
    def _indexes(self) -> Sequence[Path]:
        """Directories of the indexes, given or built; all over the same passages."""
        return self.config.retrieval.index or [self.index.path / kind for kind in self._kinds]

    @property
    def _kinds(self) -> tuple[str, ...]:
        """Kinds of the indexes searched; empty for a server or a user's own retriever."""
        return index_kinds(self.config.retrieval)

    @property
    def _server_key(self) -> str | None:
        """Identifies the passages behind a server or a user's own retriever: its checksum, else ``retrieval.cache_key``."""
        return getattr(self._index, "checksum", None) or self.config.retrieval.cache_key

    @cached_property
    def corpus(self) -> Corpus | None:
        """The passages of ``data.corpus``, read lazily; ``None`` if it is not given.

        Raises:
            DataError: a file does not exist.
        """
        data = self.config.data
        if missing := next((place for place in data.corpus if not place.exists()), None):
            raise DataError(f"data.corpus = {str(missing)!r}: no such file; give the path of a JSON lines file")
        return Corpus(*data.corpus, columns=data.corpus_columns, prefix_ids=data.prefix_ids) if data.corpus else None

    @cached_property
    def corpus_checksum(self) -> str:
        """Checksum of the files of ``data.corpus`` and of how they are read."""
        places, data = self.config.data.corpus, self.config.data
        if len(places) == 1 and places[0].is_file() and not (data.columns or data.prefix_ids):
            return runs.checksum(places[0])
        assert self.corpus
        return self.corpus.checksum()

    @cached_property
    def index(self) -> Artifact:
        """The artifact with the index of ``data.corpus``, or with both for ``hybrid``; one subdirectory per kind."""
        corpus = self.corpus
        if corpus is None:
            raise DataError("data.corpus is missing; give it, or retrieval.index, or retrieval.url")
        retrieval, checksum = self.config.retrieval, self.corpus_checksum

        def make(out: Path) -> dict[str, Any]:
            for kind in self._kinds:
                # Encoding can take hours. Partial results survive preemption here, but not in the artifact's directory.
                place = self.root / f".index-{kind}"
                shutil.rmtree(place, ignore_errors=True)  # complete, but maybe built with other settings
                dense = DenseSettings(retrieval.encoder, retrieval.faiss) if kind == "dense" and retrieval.encoder else None
                with self.watch("index") as progress:
                    build_index(corpus, place, progress, dense=dense, source=checksum, language=retrieval.language)
                place.rename(out / kind)
            return {}

        settings = {} if retrieval.kind == "bm25" else retrieval.model_dump(include={"kind", "encoder", "faiss"})
        settings |= {} if retrieval.language == AUTO else {"language": retrieval.language}
        return runs.artifact(
            self.root / "index", stage="index", settings=settings, inputs={"corpus": checksum}, seed=0, make=make,
            defaults=lambda path: default_of(("retrieval", *path)),
        )  # fmt: skip

    def passage_texts(self) -> Iterable[str] | None:
        """Title and text of all passages, from the index, else from ``data.corpus``; ``None`` if neither is available."""
        if self._kinds:
            return Passages.open(self._indexes[0]).texts()
        return (f"{passage.title} {passage.text}" for passage in self.corpus) if self.corpus else None

    @property
    def passage_count(self) -> int | None:
        """Number of passages searched; ``None`` for a server or a user's own retriever."""
        return len(Passages.open(self._indexes[0])) if self._kinds else None

    def benchmarks(self, names: Sequence[str] = ()) -> list[str]:
        """The benchmarks of ``data.eval``, or ``names`` of them, in the config's order.

        Raises:
            ConfigError: an unknown benchmark; suggests the closest name.
        """
        known = list(self.config.data.eval)
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"data.eval has {', '.join(known)}"
                raise ConfigError(f"no benchmark {name!r} in data.eval; {hint}")
        return [name for name in known if name in names or not names]

    def check(self, policy: str | Path | Endpoint) -> None:
        """Check everything that can be checked before any work: questions, retriever, policy, prompt length.

        Raises:
            SearchE1Error: the first mistake found.
        """
        config = self.config
        for questions in (self.train_questions, *self.eval_questions.values()):
            if not questions:
                raise DataError("no questions; give data.train and data.eval files that hold some")
        asked = [*self.train_questions, *(question for part in self.eval_questions.values() for question in part)]
        open_scorer(config.rollout).check(asked)
        if not isinstance(policy, Endpoint):
            check_engine(config, None if policy == NEW else policy)
        if isinstance(policy, Endpoint):
            with self.engine(policy):
                _ = self.retriever  # opens it
            return
        if policy == NEW:
            return
        reader = self.load_reader(policy)  # before an index is built
        open_scorer(config.rollout, reader.prompts.instruction)
        protocol_of(reader.tokenizer, reader.prompts).observe("", [], config.rollout.max_observation_tokens)  # has it room?
        for tool in tools_of(reader.prompts):
            tool.open(self.retriever, config.rollout.topk)
        if config.pairs.references_by == "gold" and config.data.demonstrations and config.distillations:
            Demonstrations(config.data.demonstrations, reader.tokenizer, reader.prompts).check(self.train_questions)
        room = min(config.rollout.max_tokens, reader.context_length)
        for question in asked:
            # A prompt has at most as many tokens as bytes: only long ones need to be tokenized.
            size = len(question.text.encode()) + len(reader.prompts.instruction.encode())
            if size + TEMPLATE_TOKENS[reader.prompts.protocol] < room:
                continue
            needed = len(plain_prompt(reader.tokenizer, reader.prompts, question.text))
            if needed >= room:
                raise ModelError(
                    f"question {question.id!r}: its prompt has {needed} tokens, the context {room}; raise rollout.max_tokens, "
                    "shorten prompts.instruction, or use a policy with a longer context"
                )

    def load(self, policy: str | Path, *, master_weights: bool = False) -> Policy:
        """Load ``policy`` onto this rank's device; ``master_weights``: in float32, for training.

        Raises:
            ModelError: it cannot be loaded, or its tokenizer does not fit the protocol.
        """
        loaded = policies.load(policy, self.config.policy, self.config.prompts, master_weights=master_weights)
        protocol_of(loaded.tokenizer, loaded.prompts)
        return loaded

    def load_to_train(self, policy: str | Path, training: TrainingConfig, *, adapters: bool) -> Policy:
        """Load ``policy`` with float32 master weights; base weights under adapters stay in the compute dtype.

        FSDP2 shards weights of a single dtype, so with sharding all weights are float32.
        """
        frozen = adapters and self.config.parallel.sharding == "none"
        loaded = self.load(policy, master_weights=training.master_weights and not frozen)
        computes, kept = (str(dtype).removeprefix("torch.") for dtype in (loaded.dtype, loaded.model.dtype))
        trained = "adapters, in float32" if adapters else f"all weights, in {kept}"
        logger.info("computes in %s (policy.dtype = %s); trains %s", computes, self.config.policy.dtype, trained)
        return loaded

    def load_reader(self, policy: str | Path) -> Reader:
        """``policy`` without its weights (tokenizer, prompts, context length). Raises like ``load``."""
        reader = policies.load_reader(policy, self.config.policy, self.config.prompts)
        protocol_of(reader.tokenizer, reader.prompts)
        return reader

    def has_prompts(self, policy: str | Path) -> bool:
        """Whether prompts were saved with ``policy``, as a run does."""
        source = resolve(str(policy))
        return isinstance(source, Path) and Prompts.saved_in(source)

    def engine(
        self, policy: str | Path | Endpoint, loaded: Policy | None = None
    ) -> AbstractContextManager[tuple[Engine, Prompts]]:
        """An engine that samples from ``policy``, and its prompts; ``loaded``: the policy, if already in memory."""
        return open_engine(self.config, policy, loaded)

    def checksum(self, policy: str | Path) -> str:
        """Checksum of a policy's directory or of a file, cached; a Hub id as is. An adapter's includes its base's."""
        key = str(policy)
        if key not in self._checksums:
            source = resolve(key) if not Path(key).is_file() else Path(key)
            found = runs.checksum(source) if isinstance(source, Path) else source
            base = base_of(key) if not Path(key).is_file() else None
            self._checksums[key] = runs.sha256_text(found + self.checksum(base)) if base else found
        return self._checksums[key]

    def sampled_on(self, policy: str | Path | None) -> dict[str, str]:
        """Checksums of all that sampling on the training questions depends on."""
        train = {f"train.{i}": self.checksum(path) for i, path in enumerate(self.config.data.train)}
        start = {} if policy is None else {"policy": self.checksum(policy)}
        return {**start, "retrieval": self.retrieval_checksum(), **train, "max_train": str(self.config.data.max_train)}

    def sampled_by(self, path: Path, policy: str | Path, other_policy: bool) -> str:
        """Checksum of the policy that sampled the pool or pairs in ``path``; ``policy``'s if there is no manifest.

        Without a manifest only another tokenizer is noticed, later, by the token ids.

        Raises:
            RunError: another policy sampled them, and ``other_policy`` is false.
        """
        given = self.checksum(policy)
        known = runs.read(path).manifest.inputs.get("policy") if (path / runs.MANIFEST).exists() else None
        if known in (None, given) or other_policy:
            return known or given
        raise RunError(
            f"{path}: sampled by a policy other than {policy} (checksum {known[:12]}, not {given[:12]}); give the "
            "policy that sampled it with --policy, or sample a new pool, or allow it with --allow-other-policy"
        )

    def evaluated_on(self, benchmarks: Sequence[str] | None = None) -> dict[str, str]:
        """Checksums of the retrieval and of the files of ``benchmarks`` (default: all)."""
        files = self.config.data.eval
        chosen = {f"eval.{name}": self.checksum(files[name]) for name in (files if benchmarks is None else benchmarks)}
        return {"retrieval": self.retrieval_checksum(), **chosen}

    def retrieval_checksum(self) -> str:
        """Checksum of the index; for a server that sends none, ``retrieval.cache_key``, its URL, or the kind."""
        section = self.config.retrieval
        if self._kinds:
            return self._verified.checksum  # type: ignore[attr-defined]
        return self._server_key or section.url or section.kind


def subsample(questions: list[Question], most: int | None, seed: int) -> list[Question]:
    """A random subset of at most ``most`` questions, determined by ``seed``."""
    return questions if most is None else subset(questions, min(most, len(questions)), seed)
