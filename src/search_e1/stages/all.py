"""The stages of a run as artifacts: each method makes its artifact, or returns it if it is complete.

A stage reads what it needs from disk and leaves what it made there, so that stages can run in different processes, on
different machines. Nothing here trains or samples; that is in the stages' own packages. How an artifact is made, and by how
many processes, is in ``making``.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from search_e1 import runs
from search_e1.config import Config, LaunchConfig, Prompts
from search_e1.data import lines as data_lines
from search_e1.distill import trainer as distill_trainer
from search_e1.errors import ConfigError, DataError, ModelError, RunError
from search_e1.evaluation import ceiling as ceilings
from search_e1.evaluation.evaluate import evaluate
from search_e1.evaluation.results import EVALUATION, Evaluation
from search_e1.grpo import trainer as grpo_trainer
from search_e1.launch.nodes import Facts
from search_e1.launch.place import place
from search_e1.rollout import pool
from search_e1.rollout.engines import opening as generators
from search_e1.rollout.engines import vllm
from search_e1.rollout.engines.endpoint import Endpoint, EndpointGenerator
from search_e1.runs import Artifact
from search_e1.runs.safe import is_name, masked
from search_e1.runs.stopping import Stop
from search_e1.selfdistill import files as pair_files
from search_e1.selfdistill import lead as teacher
from search_e1.selfdistill import profile
from search_e1.selfdistill.gold import Demonstrations
from search_e1.stages import tracking
from search_e1.stages.inputs import Inputs, Watch, at_most, unwatched
from search_e1.stages.runner import Attempt, Maker, StageSpec
from search_e1.text.prompts import TEMPLATE_TOKENS, plain_prompt
from search_e1.training import policy as policies
from search_e1.warmstart.stage import warm_start


class Stages(Inputs):
    """The stages of the run in ``root`` under ``config``.

    A ``policy`` argument is the directory of a policy, a Hub id, or ``small``. ``out`` is the artifact's place; without
    it the stage's own name in the run directory.
    """

    def __init__(self, config: Config, root: Path, watch: Watch = unwatched, stop: Stop | None = None) -> None:
        """``stop`` says when to stop; see ``stopping.on_signals``."""
        super().__init__(config, root, watch)
        self.maker = Maker(config, root, watch, stop or Stop())

    def check(self, policy: str | Path | Endpoint) -> None:
        """Find every mistake that can be found before training: questions, retriever, policy, prompt length.

        Raises:
            SearchE1Error: the first mistake found.
        """
        self._check_questions()
        tracking.check(self.config.tracking)
        self.maker.check()
        if isinstance(policy, Endpoint):
            EndpointGenerator(policy, self.config.prompts or Prompts())
            assert self.retriever
            return
        if self.config.rollout.engine == "vllm":
            vllm.check(self.config.policy, self.config.vllm)
        generators.load_reader(self.config, policy)  # before an index is built
        assert self.retriever
        # Its weights are not needed again: they had better not lie where groups of processes need the room.
        alone = self.maker.launcher.all == 1
        loaded = generators.load(self.config, policy, self.config.policy.device if alone else "cpu")
        room = min(self.config.rollout.max_tokens, loaded.model.config.get_text_config().max_position_embeddings)
        if self.config.pairs.references_by == "gold" and self.config.data.demonstrations and self.config.distillations:
            Demonstrations(self.config.data.demonstrations, loaded.tokenizer, loaded.prompts).check(
                self.train_questions
            )
        for question in (*self.train_questions, *(q for qs in self.eval_questions.values() for q in qs)):
            # A prompt has at most as many tokens as bytes, so that only the long ones are worth tokenising.
            size = len(question.text.encode()) + len(loaded.prompts.instruction.encode())
            if size + TEMPLATE_TOKENS[loaded.prompts.protocol] < room:
                continue
            needed = len(plain_prompt(loaded.tokenizer, loaded.prompts, question.text))
            if needed >= room:
                raise ModelError(
                    f"question {question.id!r}: its prompt has {needed} tokens, the context {room}; raise rollout.max_tokens, "
                    "shorten prompts.instruction, or use a policy with a longer context"
                )

    def _check_questions(self) -> None:
        for questions in (self.train_questions, *self.eval_questions.values()):
            if not questions:
                raise DataError("no questions; give data.train and data.eval files that hold some")

    def together(self) -> AbstractContextManager[None]:
        """With the run's other machines; see ``Maker.together``."""
        return self.maker.together(self._facts)

    def follow(self) -> bool:
        """On all machines of a run but the first: take part in its stages until it is done; see ``Maker.follow``."""
        return self.maker.follow(self._facts)

    def _facts(self) -> Facts:
        """What must be the same on all machines."""
        self._check_questions()
        config = self.config.model_copy(update={"launch": LaunchConfig(processes=self.config.launch.processes)})
        data = self.config.data
        return {
            **masked(config.model_dump(mode="json")),
            "versions": runs.versions(),
            "checksum": {
                "policy": self._checksum(self.config.policy.model),
                **{f"train.{i}": runs.checksum(path) for i, path in enumerate(data.train)},
                **{f"eval.{name}": runs.checksum(path) for name, path in data.eval.items()},
            },
        }

    def check_memory(self, policy: str | Path, *stages: str) -> None:
        """Refuse what cannot fit the GPU in ``stages`` (``grpo``, ``distill``): see ``Maker.check_memory``."""
        self.maker.check_memory(policy, stages)

    def warmstart(self, out: Path | None = None) -> Artifact:
        """A policy made from nothing and taught by demonstrations, in ``policy/``."""

        def train(attempt: Attempt) -> Mapping[str, Any]:
            return warm_start(
                self.train_questions, self.retriever, self.config, out=attempt.out, progress=attempt.progress,
                track=attempt.track, work=attempt.work,
            )  # fmt: skip

        return self.maker.artifact(
            StageSpec(
                name="warmstart",
                out=out,
                settings=("warmstart", "rollout", "seed"),
                inputs=self._asking(None),
                work=train,
            )
        )

    # The stages of a round.

    def grpo(self, policy: str | Path, round: int, out: Path | None = None) -> Artifact:
        """``policy`` trained for one round; the new one is in ``policy/``."""

        def train(attempt: Attempt) -> Mapping[str, Any]:
            limits = self.config.rollout
            with_vllm = limits.engine == "vllm" and self.config.grpo.steps > 0
            return grpo_trainer.train(
                generators.load(self.config, policy), self.train_questions, self.retriever, self.config.grpo, limits,
                self.config.reference, seed=attempt.seed, out=attempt.out, sharding=self.config.launch.sharding,
                progress=attempt.progress, track=attempt.track, work=attempt.work,
                engine=generators.engine(self.config, policy, limits.max_tokens, shared=True) if with_vllm else None,
            )  # fmt: skip

        unused = () if self.config.grpo.shows_references else ("reference",)
        return self.maker.artifact(
            StageSpec(
                name=f"grpo-{round}",
                out=out,
                settings=("grpo", "rollout", "reference"),
                unused=unused,
                inputs=self._asking(policy),
                work=train,
                task=("grpo", policy, round),
            )
        )

    def pool(self, policy: str | Path, round: int, out: Path | None = None) -> Artifact:
        """Groups sampled from ``policy``, in ``groups.jsonl``; or for ``pool.source = "grpo"`` those that its GRPO kept.

        Raises:
            RunError: there are none beside the policy.
        """
        if self.config.pool.source == "grpo":
            return self._taken(policy, round, out)

        def sample(attempt: Attempt) -> Mapping[str, Any]:
            questions = at_most(self.train_questions, self.config.pool.questions, attempt.seed)
            with generators.asked(self.config, policy) as (generator, prompts):
                return pool.sample(
                    generator, self.retriever, questions, prompts, self.config.pool, self.config.rollout,
                    seed=attempt.seed, out=attempt.out, progress=attempt.progress, work=attempt.work,
                )  # fmt: skip

        return self.maker.artifact(
            StageSpec(
                name=f"pool-{round}",
                out=out,
                settings=("pool", "rollout"),
                inputs=self._asking(policy),
                work=sample,
                task=("pool", policy, round),
            )
        )

    def _taken(self, policy: str | Path, round: int, out: Path | None) -> Artifact:
        source = Path(policy).parent / pool.FILE
        if not source.is_file():
            raise RunError(
                f"{source}: not there; give a policy that GRPO has trained with grpo.keep_groups = true, or set "
                'pool.source = "fresh"'
            )

        def take(attempt: Attempt) -> Mapping[str, Any]:
            return pool.take(source, attempt.out, self.config.pool.questions)

        inputs = {"policy": self._checksum(policy), "groups": runs.checksum(source)}
        return self.maker.artifact(
            StageSpec(name=f"pool-{round}", out=out, settings=("pool",), inputs=inputs, work=take)
        )

    def pairs(
        self, policy: str | Path, pool_path: Path, round: int, out: Path | None = None, *, other_policy: bool = False
    ) -> Artifact:
        """Pairs mined from a pool of ``policy``: ``train.jsonl``, and ``held_out.jsonl`` that the lead is measured on.

        Raises:
            RunError: another policy sampled the pool, unless ``other_policy`` allows it.
            DataError: another tokenizer did.
        """
        sampled_by = self._sampled_by(pool_path, policy, other_policy)

        def select(attempt: Attempt) -> Mapping[str, Any]:
            reader = policies.load_reader(policy, self.config.policy, self.config.prompts)
            return pair_files.mine(pool_path / pool.FILE, reader, self.config, seed=attempt.seed, out=attempt.out)

        inputs = {"policy": sampled_by, "reader": self._checksum(policy)}
        if self.config.pairs.references_by == "gold" and self.config.data.demonstrations:
            inputs["demonstrations"] = data_lines.checksum(self.config.data.demonstrations)
        if (pool_path / pool.FILE).is_file():
            inputs["pool"] = runs.checksum(pool_path / pool.FILE)
        return self.maker.artifact(
            StageSpec(
                name=f"pairs-{round}", out=out, settings=("reference", "pairs", "lead"), inputs=inputs, work=select
            )
        )

    def lead(
        self, policy: str | Path, pairs_path: Path, round: int, out: Path | None = None, *, other_policy: bool = False
    ) -> Artifact:
        """How much better ``policy`` is when it sees the reference, on the held-out pairs; in ``lead.json``. The
        per-token divergence of these pairs is in ``kl.jsonl``.

        Raises:
            DataError: no pair is held out, so that nothing can be measured; or pairs of another tokenizer.
            RunError: pairs of another policy, unless ``other_policy`` allows them.
        """
        self._sampled_by(pairs_path, policy, other_policy)

        def measure(attempt: Attempt) -> Mapping[str, Any]:
            loaded = generators.load(self.config, policy)
            pairs = pair_files.read(pairs_path / pair_files.HELD_OUT, loaded.tokenizer)
            with generators.sampling(self.config, policy, None, loaded) as generator:
                measured, divergences = teacher.measure(
                    loaded, generator, self.retriever, pairs, self.config.lead, self.config.rollout,
                    temperature=self.config.pool.temperature, seed=attempt.seed, progress=attempt.progress,
                    work=attempt.work,
                )  # fmt: skip
            (attempt.out / "lead.json").write_text(measured.model_dump_json(indent=2) + "\n")
            lines = "".join(row.model_dump_json() + "\n" for row in divergences)
            (attempt.out / profile.FILE).write_text(lines, encoding="utf-8")
            return measured.model_dump()

        inputs = {**self._asking(policy), "pairs": runs.checksum(pairs_path / pair_files.HELD_OUT)}
        return self.maker.artifact(
            StageSpec(
                name=f"lead-{round}",
                out=out,
                settings=("lead", "rollout"),
                inputs=inputs,
                work=measure,
                task=("lead", policy, pairs_path, round),
            )
        )

    def distill(
        self,
        policy: str | Path,
        pairs_path: Path,
        lead_path: Path | None,
        round: int,
        out: Path | None = None,
        *,
        other_policy: bool = False,
    ) -> Artifact:
        """``policy`` distilled on the pairs and merged; the new one is in ``policy/``. ``lead_path`` may be ``None`` where
        there is no teacher (``distill.objective = "sft"``).

        Raises:
            DataError: no pairs, or pairs of another tokenizer.
            RunError: pairs of another policy, unless ``other_policy`` allows them.
            NoLeadError: the measured lead does not pass the gate; nothing is trained.
        """
        self._sampled_by(pairs_path, policy, other_policy)
        if self.config.distill.objective == "ofsd":
            assert lead_path, "nothing is distilled unmeasured"
            teacher.gate(teacher.Lead.model_validate_json((lead_path / "lead.json").read_text()), self.config.lead)

        def train(attempt: Attempt) -> Mapping[str, Any]:
            loaded = generators.load(self.config, policy)
            return distill_trainer.train(
                loaded, pair_files.read(pairs_path / pair_files.TRAIN, loaded.tokenizer), self.config.distill,
                seed=attempt.seed, out=attempt.out, sharding=self.config.launch.sharding, progress=attempt.progress,
                track=attempt.track, work=attempt.work,
            )  # fmt: skip

        inputs = {"policy": self._checksum(policy), "pairs": runs.checksum(pairs_path / pair_files.TRAIN)}
        return self.maker.artifact(
            StageSpec(
                name=f"ofsd-{round}",
                out=out,
                settings=("distill",),
                inputs=inputs,
                work=train,
                task=("distill", policy, pairs_path, lead_path, round),
            )
        )

    def ceiling(self) -> Artifact:
        """What retrieval can do for each evaluation question, whatever the policy; in ``ceiling.jsonl``."""

        def measure(attempt: Attempt) -> Mapping[str, Any]:
            rows = ceilings.measure(
                self.retriever, self.passage_texts(), self.eval_questions, self.config.rollout.topk, attempt.progress
            )
            lines = "".join(row.model_dump_json() + "\n" for row in rows)
            (attempt.out / ceilings.FILE).write_text(lines, encoding="utf-8")
            return ceilings.figures(rows)

        corpus = self.config.data.corpus
        known = {"corpus": runs.checksum(corpus)} if self.config.retrieval.url and corpus else {}
        inputs = {**self.evaluated_on(), **known}
        return self.maker.artifact(
            StageSpec(name="ceiling", settings=("rollout", "data.max_eval"), inputs=inputs, work=measure)
        )

    def evaluate(
        self, policy: str | Path | Endpoint, name: str, out: Path | None = None, benchmarks: Sequence[str] = ()
    ) -> Artifact:
        """``policy``, or what an endpoint serves, on the evaluation questions, or on those of some ``benchmarks``.

        See ``evaluation.evaluate`` for the files. The ceiling is measured first if ``evaluation.ceiling`` asks for it.

        Raises:
            ConfigError: ``data.eval`` has no such benchmark, or no directory can have this ``name``.
        """
        if not is_name(name):
            raise ConfigError(
                f"--name {name!r}: cannot be the name of a directory; use letters, digits, '.', '+', '-' and '_'"
            )
        chosen = self.benchmarks(benchmarks)
        ceiling = self.ceiling() if self.config.evaluation.ceiling else None

        def measure(attempt: Attempt) -> Mapping[str, Any]:
            known = ceilings.read(ceiling.path / ceilings.FILE) if ceiling else ()
            with generators.asked(self.config, policy) as (generator, prompts):
                evaluation = evaluate(
                    generator, self.retriever, {name: self.eval_questions[name] for name in chosen},
                    prompts, self.config.evaluation, self.config.rollout, seed=attempt.seed,
                    out=attempt.out, progress=attempt.progress,
                    ceilings={(row.benchmark, row.id): row for row in known}, work=attempt.work,
                )  # fmt: skip
            return evaluation.model_dump(mode="json")

        if isinstance(policy, Endpoint):
            asked = {"endpoint": policy.address, "model": policy.model, "ids": "words of an endpoint, not trainable"}
        else:
            asked = {"policy": self._checksum(policy)}
        inputs = {**asked, **self.evaluated_on(chosen)}
        inputs |= {"ceiling": runs.checksum(ceiling.path / ceilings.FILE)} if ceiling else {}
        return self.maker.artifact(
            StageSpec(
                name=f"evaluation-{name}",
                out=out,
                settings=("evaluation", "rollout", "data.max_eval"),
                inputs=inputs,
                # The same for every policy: what differs between two evaluations is the policy.
                seed_name="evaluation",
                work=measure,
                task=() if isinstance(policy, Endpoint) else ("evaluate", policy, name, None, benchmarks),
            )
        )

    def _asking(self, policy: str | Path | None) -> dict[str, str]:
        """Checksums of what sampling on the training questions depends on."""
        train = {f"train.{i}": runs.checksum(path) for i, path in enumerate(self.config.data.train)}
        limit = {"max_train": str(self.config.data.max_train)}
        start = {} if policy is None else {"policy": self._checksum(policy)}
        return {**start, "retrieval": self.retrieval_checksum(), **train, **limit}

    def _sampled_by(self, path: Path, policy: str | Path, other_policy: bool) -> str:
        """Checksum of the policy whose trajectories a pool or pairs hold: ``policy``, unless another is allowed.

        Where there is no manifest, nobody knows; another tokenizer is still told by the ids.
        """
        given = self._checksum(policy)
        known = runs.read(path).manifest.inputs.get("policy") if (path / runs.MANIFEST).exists() else None
        if known in (None, given) or other_policy:
            return known or given
        raise RunError(
            f"{path}: sampled by another policy than {policy} (checksum {known[:12]} there, {given[:12]} given); give the "
            "policy that sampled it with --policy, or sample a new pool, or allow it with --allow-other-policy"
        )

    def _checksum(self, policy: str | Path) -> str:
        source = policies.resolve(str(policy))
        return runs.checksum(source) if isinstance(source, Path) else source


def read_evaluation(artifact: Artifact) -> Evaluation:
    return Evaluation.model_validate(json.loads((artifact.path / EVALUATION).read_text()))


def is_first(config: Config) -> bool:
    """Whether this is the machine of a run that writes."""
    return not place(config.launch.nodes, config.launch.node).node
