"""The stages of a run as artifacts: each method makes its artifact, or returns it if it is complete.

A stage reads what it needs from disk and leaves what it made there, so that stages can run in different processes, on
different machines. Nothing here trains or samples; that is in the stages' own packages.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic_core import to_jsonable_python
from transformers import set_seed

from search_e1 import policy as policies
from search_e1 import runs, tracking
from search_e1.config import Config, LaunchConfig, default_of
from search_e1.data import lines as data_lines
from search_e1.distill import files as pair_files
from search_e1.distill import profile, teacher
from search_e1.distill import trainer as distill_trainer
from search_e1.distill.gold import Demonstrations
from search_e1.errors import ConfigError, DataError, ModelError, RunError, SearchE1Error
from search_e1.evaluation import ceiling as ceilings
from search_e1.evaluation.evaluate import evaluate
from search_e1.evaluation.results import EVALUATION, Evaluation
from search_e1.grpo import batching
from search_e1.grpo import trainer as grpo_trainer
from search_e1.inputs import Inputs, Watch, at_most, unwatched
from search_e1.launch.launcher import Launcher
from search_e1.launch.nodes import Facts, Waiting
from search_e1.launch.place import place
from search_e1.loading import device
from search_e1.planning import start
from search_e1.policy import Policy, Reader
from search_e1.progress import Progress, Track, untracked
from search_e1.prompts import TEMPLATE_TOKENS, Prompts, plain_prompt
from search_e1.rollout import pool, vllm
from search_e1.rollout.endpoint import Endpoint, EndpointGenerator
from search_e1.rollout.generator import Generator
from search_e1.rollout.hf import HFGenerator
from search_e1.rollout.protocols import protocol_of
from search_e1.rollout.vllm_server import ServerGenerator
from search_e1.runs import Artifact, Make
from search_e1.runs.checkpoints import Work
from search_e1.runs.stopping import Stop
from search_e1.safe import is_name, masked
from search_e1.training import memory, sharding
from search_e1.warmstart.stage import warm_start


class Stages(Inputs):
    """The stages of the run in ``root`` under ``config``.

    A ``policy`` argument is the directory of a policy, a Hub id, or ``small``. ``out`` is the artifact's place; without
    it the stage's own name in the run directory.
    """

    def __init__(self, config: Config, root: Path, watch: Watch = unwatched, stop: Stop | None = None) -> None:
        """``stop`` says when to stop; see ``stopping.on_signals``."""
        super().__init__(config, root, watch)
        self.stop = stop or Stop()
        # Of the stage at work:
        self._track: Track = untracked
        self._work = Work()

    def check(self, policy: str | Path | Endpoint) -> None:
        """Find every mistake that can be found before training: questions, retriever, policy, prompt length.

        Raises:
            SearchE1Error: the first mistake found.
        """
        self._check_questions()
        tracking.check(self.config.tracking)
        self._check_launch()
        if isinstance(policy, Endpoint):
            EndpointGenerator(policy, self.config.prompts or Prompts())
            assert self.retriever
            return
        if self.config.rollout.engine == "vllm":
            vllm.check(self.config.policy, self.config.vllm)
        self._reader(policy)  # before an index is built
        assert self.retriever
        # Its weights are not needed again: they had better not lie where groups of processes need the room.
        alone = self._launcher.all == 1
        loaded = self._policy(policy, self.config.policy.device if alone else "cpu")
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

    @cached_property
    def _launcher(self) -> Launcher:
        launch = self.config.launch
        # An engine of vLLM's own starts processes and threads as it likes.
        fork = launch.fork and self.config.rollout.engine != "vllm"
        return Launcher(launch.processes, place(launch.nodes, launch.node), fork=fork)

    @contextmanager
    def together(self) -> Iterator[None]:
        """With the run's other machines, if it has several. What ends the context ends them too, and is told there.

        Raises:
            RunError: one did not come, or differs in what decides about results.
        """
        with ExitStack() as stack:
            if self._launcher.place.nodes > 1:
                with self.watch("nodes") as progress:
                    met = self._launcher.together(self.root, self._facts(), self._waiting(), progress)
                    stack.enter_context(met)
            yield

    def follow(self) -> bool:
        """On all machines of a run but the first: take part in its stages until it is done. ``False`` on the first.

        Raises:
            SearchE1Error: what went wrong, there or here.
            Stopped: a signal, there or here.
        """
        if not self._launcher.place.node:
            return False
        facts: Facts = {}
        problem: SearchE1Error | None = None
        try:
            self._check_launch()
            facts = self._facts()
        except SearchE1Error as error:
            problem = error
        self._launcher.follow(self.root, facts, problem, self._waiting(), self.stop)
        return True

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

    def _waiting(self) -> Waiting:
        launch = self.config.launch
        return Waiting(launch.wait_seconds, launch.address or os.environ.get("MASTER_ADDR"), launch.port)

    def _check_launch(self) -> None:
        """Raise what is wrong with the number of processes, before any of them starts."""
        here, all, name = self._launcher.count, self._launcher.all, self.config.policy.device
        if all == 1:
            return
        there = device(name)
        if there.index is not None:
            raise ConfigError(f"policy.device = {name!r}: {all} processes take a device each; write {there.type!r}")
        if there.type != "cpu" and (gpus := torch.accelerator.device_count()) < here:
            raise ConfigError(
                f"launch.processes = {here}, and {gpus} {there.type} devices are visible here; lower it, or mend "
                "CUDA_VISIBLE_DEVICES"
            )
        grpo, distill = self.config.grpo, self.config.distill
        trainers = {"grpo.trainer": grpo.trainer, "distill.trainer": distill.trainer}
        divided = self.config.launch.sharding
        if divided != "none" and (grpo.hindsight.weight or grpo.evidence.strength):
            raise ConfigError(
                f'launch.sharding = "{divided}": grpo.hindsight and grpo.evidence need the whole weights in each process; set '
                'grpo.hindsight.weight and grpo.evidence.strength to 0, or launch.sharding = "none"'
            )
        sharding.check(divided, self.config.policy.dtype, trainers)
        batching.split(grpo.questions_per_step * grpo.group_size, all, grpo.trainer)
        if self.config.distillations:
            distill_trainer.micro_batch(distill, all)
        self._launcher.prepare()

    def check_memory(self, policy: str | Path, *stages: str) -> None:
        """Refuse what cannot fit the GPU in ``stages`` (``grpo``, ``distill``): see ``planning.start``.

        Raises:
            ConfigError: weights and states alone are more than its memory.
        """
        there, all = device(self.config.policy.device), self._launcher.all
        if found := start.cuda_device(there, all, self.config.launch.sharding):
            start.check_memory(self.config, str(policy), found, stages)

    def warmstart(self, out: Path | None = None) -> Artifact:
        """A policy made from nothing and taught by demonstrations, in ``policy/``."""

        def train(out: Path, seed: int, progress: Progress) -> Mapping[str, Any]:
            return warm_start(
                self.train_questions, self.retriever, self.config, out=out, progress=progress, track=self._track,
                work=self._work,
            )  # fmt: skip

        return self._stage("warmstart", out, ("warmstart", "rollout", "seed"), self._asking(None), train)

    # The stages of a round.

    def grpo(self, policy: str | Path, round: int, out: Path | None = None) -> Artifact:
        """``policy`` trained for one round; the new one is in ``policy/``."""

        def train(out: Path, seed: int, progress: Progress) -> Mapping[str, Any]:
            limits = self.config.rollout
            with_vllm = limits.engine == "vllm" and self.config.grpo.steps > 0
            return grpo_trainer.train(
                self._policy(policy), self.train_questions, self.retriever, self.config.grpo, limits,
                self.config.reference, seed=seed, out=out, sharding=self.config.launch.sharding, progress=progress,
                track=self._track, work=self._work,
                engine=self._engine(policy, limits.max_tokens, shared=True) if with_vllm else None,
            )  # fmt: skip

        unused = () if self.config.grpo.shows_references else ("reference",)
        settings = ("grpo", "rollout", "reference")
        task = ("grpo", policy, round)
        return self._stage(f"grpo-{round}", out, settings, self._asking(policy), train, unused=unused, task=task)

    def pool(self, policy: str | Path, round: int, out: Path | None = None) -> Artifact:
        """Groups sampled from ``policy``, in ``groups.jsonl``; or for ``pool.source = "grpo"`` those that its GRPO kept.

        Raises:
            RunError: there are none beside the policy.
        """
        if self.config.pool.source == "grpo":
            return self._taken(policy, round, out)

        def sample(out: Path, seed: int, progress: Progress) -> Mapping[str, Any]:
            questions = at_most(self.train_questions, self.config.pool.questions, seed)
            with self.asked(policy) as (generator, prompts):
                return pool.sample(
                    generator, self.retriever, questions, prompts, self.config.pool, self.config.rollout,
                    seed=seed, out=out, progress=progress, work=self._work,
                )  # fmt: skip

        return self._stage(
            f"pool-{round}", out, ("pool", "rollout"), self._asking(policy), sample, task=("pool", policy, round)
        )

    def _taken(self, policy: str | Path, round: int, out: Path | None) -> Artifact:
        source = Path(policy).parent / pool.FILE
        if not source.is_file():
            raise RunError(
                f"{source}: not there; give a policy that GRPO has trained with grpo.keep_groups = true, or set "
                'pool.source = "fresh"'
            )

        def take(out: Path, seed: int, progress: Progress) -> Mapping[str, Any]:
            return pool.take(source, out, self.config.pool.questions)

        inputs = {"policy": self._checksum(policy), "groups": runs.checksum(source)}
        return self._stage(f"pool-{round}", out, ("pool",), inputs, take)

    def pairs(
        self, policy: str | Path, pool_path: Path, round: int, out: Path | None = None, *, other_policy: bool = False
    ) -> Artifact:
        """Pairs mined from a pool of ``policy``: ``train.jsonl``, and ``held_out.jsonl`` that the lead is measured on.

        Raises:
            RunError: another policy sampled the pool, unless ``other_policy`` allows it.
            DataError: another tokenizer did.
        """
        sampled_by = self._sampled_by(pool_path, policy, other_policy)

        def select(out: Path, seed: int, progress: Progress) -> Mapping[str, Any]:
            reader = policies.load_reader(policy, self.config.policy, self.config.prompts)
            return pair_files.mine(pool_path / pool.FILE, reader, self.config, seed=seed, out=out)

        inputs = {"policy": sampled_by, "reader": self._checksum(policy)}
        if self.config.pairs.references_by == "gold" and self.config.data.demonstrations:
            inputs["demonstrations"] = data_lines.checksum(self.config.data.demonstrations)
        if (pool_path / pool.FILE).is_file():
            inputs["pool"] = runs.checksum(pool_path / pool.FILE)
        return self._stage(f"pairs-{round}", out, ("reference", "pairs", "lead"), inputs, select)

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

        def measure(out: Path, seed: int, progress: Progress) -> Mapping[str, Any]:
            loaded = self._policy(policy)
            pairs = pair_files.read(pairs_path / pair_files.HELD_OUT, loaded.tokenizer)
            with self._generator(policy, None, loaded) as generator:
                measured, divergences = teacher.measure(
                    loaded, generator, self.retriever, pairs, self.config.lead, self.config.rollout,
                    temperature=self.config.pool.temperature, seed=seed, progress=progress, work=self._work,
                )  # fmt: skip
            (out / "lead.json").write_text(measured.model_dump_json(indent=2) + "\n")
            lines = "".join(row.model_dump_json() + "\n" for row in divergences)
            (out / profile.FILE).write_text(lines, encoding="utf-8")
            return measured.model_dump()

        inputs = {**self._asking(policy), "pairs": runs.checksum(pairs_path / pair_files.HELD_OUT)}
        return self._stage(
            f"lead-{round}", out, ("lead", "rollout"), inputs, measure, task=("lead", policy, pairs_path, round)
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

        def train(out: Path, seed: int, progress: Progress) -> Mapping[str, Any]:
            loaded = self._policy(policy)
            return distill_trainer.train(
                loaded, pair_files.read(pairs_path / pair_files.TRAIN, loaded.tokenizer), self.config.distill,
                seed=seed, out=out, sharding=self.config.launch.sharding, progress=progress, track=self._track,
                work=self._work,
            )  # fmt: skip

        inputs = {"policy": self._checksum(policy), "pairs": runs.checksum(pairs_path / pair_files.TRAIN)}
        return self._stage(
            f"ofsd-{round}", out, ("distill",), inputs, train, task=("distill", policy, pairs_path, lead_path, round)
        )

    def ceiling(self) -> Artifact:
        """What retrieval can do for each evaluation question, whatever the policy; in ``ceiling.jsonl``."""

        def measure(out: Path, seed: int, progress: Progress) -> Mapping[str, Any]:
            rows = ceilings.measure(
                self.retriever, self.passage_texts(), self.eval_questions, self.config.rollout.topk, progress
            )
            lines = "".join(row.model_dump_json() + "\n" for row in rows)
            (out / ceilings.FILE).write_text(lines, encoding="utf-8")
            return ceilings.figures(rows)

        corpus = self.config.data.corpus
        known = {"corpus": runs.checksum(corpus)} if self.config.retrieval.url and corpus else {}
        return self._stage("ceiling", None, ("rollout", "data.max_eval"), {**self.evaluated_on(), **known}, measure)

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

        def measure(out: Path, seed: int, progress: Progress) -> Mapping[str, Any]:
            known = ceilings.read(ceiling.path / ceilings.FILE) if ceiling else ()
            with self.asked(policy) as (generator, prompts):
                evaluation = evaluate(
                    generator, self.retriever, {name: self.eval_questions[name] for name in chosen},
                    prompts, self.config.evaluation, self.config.rollout, seed=seed, out=out, progress=progress,
                    ceilings={(row.benchmark, row.id): row for row in known}, work=self._work,
                )  # fmt: skip
            return evaluation.model_dump(mode="json")

        if isinstance(policy, Endpoint):
            asked = {"endpoint": policy.address, "model": policy.model, "ids": "words of an endpoint, not trainable"}
        else:
            asked = {"policy": self._checksum(policy)}
        inputs = {**asked, **self.evaluated_on(chosen)}
        inputs |= {"ceiling": runs.checksum(ceiling.path / ceilings.FILE)} if ceiling else {}
        # The same sampling seed for every policy: what differs between two evaluations is the policy.
        return self._stage(
            f"evaluation-{name}",
            out,
            ("evaluation", "rollout", "data.max_eval"),
            inputs,
            measure,
            seed_name="evaluation",
            task=() if isinstance(policy, Endpoint) else ("evaluate", policy, name, None, benchmarks),
        )

    def _stage(
        self,
        name: str,
        out: Path | None,
        settings: Sequence[str],
        inputs: Mapping[str, str],
        work: Callable[[Path, int, Progress], Mapping[str, Any]],
        seed_name: str | None = None,
        unused: Sequence[str] = (),
        task: Sequence[Any] = (),
    ) -> Artifact:
        """``unused``: settings on which nothing depends as the others stand; they are kept at their defaults. ``task``: the
        method to call, and with what, where several processes can work on it.
        """
        processes = self._launcher.all if task else 1
        make = self._launched(name, task) if processes > 1 else self._make(name, seed_name, work)
        dumped = masked(self.config.model_dump(mode="json"))  # manifests and trackers show it
        dumped["data.max_eval"], dumped["data.max_train"] = dumped["data"]["max_eval"], dumped["data"]["max_train"]
        return runs.artifact(
            out or self.root / name,
            stage=name,
            settings={
                key: default_of((key,)) if key in unused else dumped[key] for key in (*settings, "prompts", "policy")
            },
            inputs=inputs,
            seed=runs.derived_seed(self.config.seed, seed_name or name),
            make=make,
            defaults=default_of,
            gpus=0 if name.startswith(("pairs-", "ceiling")) else policies.accelerators(self.config.policy, processes),
        )

    def _make(self, name: str, seed_name: str | None, work: Callable[[Path, int, Progress], Mapping[str, Any]]) -> Make:
        """The stage's work, in this process."""
        seed = runs.derived_seed(self.config.seed, seed_name or name)

        def make(out: Path) -> Mapping[str, Any]:
            run, step = tracking.run_of(name)
            dumped = masked(self.config.model_dump(mode="json"))
            tracker = tracking.tracked(self.config.tracking, self.root, run, dumped, anew=run == name)
            often = self.config.checkpoints.model_dump()
            self._work = Work(out / runs.WORK, **often, stop=self.stop)
            with self.watch(name) as progress, tracker as self._track, memory.told(name):
                set_seed(seed)
                result = work(out, seed, progress)
                if figures := tracking.figures_of(name, result):
                    self._track(step, figures)
                return result

        return make

    def _launched(self, name: str, task: Sequence[Any]) -> Make:
        """The stage's work, in a group of processes."""

        def make(out: Path) -> Mapping[str, Any]:
            logs = (out / runs.WORK / "processes").absolute()
            told = {
                "config": self.config.model_dump(mode="json"), "root": self.root, "out": out, "logs": logs,
                "stage": task[0], "arguments": task[1:],
            }  # fmt: skip
            with self.watch(name) as progress:
                return self._launcher.run(to_jsonable_python(told), logs, progress, self.stop)

        return make

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

    def _policy(self, policy: str | Path, device: str | None = None) -> Policy:
        there = {} if device is None else {"device": device}
        loaded = policies.load(policy, self.config.policy.model_copy(update=there), self.config.prompts)
        protocol_of(loaded.tokenizer, loaded.prompts)  # a tokenizer that does not fit is refused before the work
        return loaded

    def _reader(self, policy: str | Path) -> Reader:
        reader = policies.load_reader(policy, self.config.policy, self.config.prompts)
        protocol_of(reader.tokenizer, reader.prompts)
        return reader

    @contextmanager
    def asked(self, policy: str | Path | Endpoint) -> Iterator[tuple[Generator, Prompts]]:
        """What samples, for as long as the context is, and the prompts to ask it with."""
        if isinstance(policy, Endpoint):
            prompts = self.config.prompts or Prompts()
            yield EndpointGenerator(policy, prompts), prompts
            return
        with self._generator(policy, self.config.rollout.max_tokens) as generator:
            yield generator, self._reader(policy).prompts

    @contextmanager
    def _generator(self, policy: str | Path, room: int | None, loaded: Policy | None = None) -> Iterator[Generator]:
        """Samples from ``policy``, which is ``loaded`` where something else needs it too."""
        rows = self.config.rollout.batch_size
        if self.config.rollout.engine == "transformers":
            loaded = loaded or self._policy(policy)
            yield HFGenerator(loaded.model, loaded.tokenizer, batch_size=rows)
            return
        if self.config.vllm.url:
            yield ServerGenerator(self.config.vllm, policy, self._reader(policy).tokenizer, concurrency=rows)
            return
        engine = self._engine(policy, room, shared=loaded is not None)
        with engine.running(self._reader(policy).tokenizer) as generator:
            yield generator

    def _engine(self, policy: str | Path, room: int | None, *, shared: bool) -> vllm.Engine:
        """``room``: most ids of a trajectory; without it the policy's whole context."""
        if self.config.vllm.url:
            raise ConfigError(
                "vllm.url: GRPO changes the policy with every step, and the server would go on with the first; leave it out, "
                'or set rollout.engine = "transformers"'
            )
        context = self._reader(policy).context_length
        rows, most = self.config.rollout.batch_size, min(context, room or context)
        return vllm.Engine(policy, self.config.policy, self.config.vllm, rows, most, shared)

    def _checksum(self, policy: str | Path) -> str:
        source = policies.resolve(str(policy))
        return runs.checksum(source) if isinstance(source, Path) else source


def read_evaluation(artifact: Artifact) -> Evaluation:
    return Evaluation.model_validate(json.loads((artifact.path / EVALUATION).read_text()))


def is_first(config: Config) -> bool:
    """Whether this is the machine of a run that writes."""
    return not place(config.launch.nodes, config.launch.node).node
