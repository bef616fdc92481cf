"""How a stage becomes an artifact: worked at in this process, or by a group of processes on one machine or several.

What it works at is in ``stages``, which hands over each stage as a ``StageSpec``.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic_core import to_jsonable_python
from transformers import set_seed

from search_e1 import runs
from search_e1.config import Config, default_of
from search_e1.distill.arguments import micro_batch
from search_e1.errors import ConfigError, SearchE1Error
from search_e1.grpo import batching
from search_e1.lab.plan import start
from search_e1.launch.launcher import Launcher
from search_e1.launch.nodes import Facts, Waiting
from search_e1.launch.place import place
from search_e1.runs import Artifact, Make
from search_e1.runs.checkpoints import Work
from search_e1.runs.devices import device
from search_e1.runs.progress import Progress, Track
from search_e1.runs.safe import masked
from search_e1.runs.stopping import Stop
from search_e1.stages import tracking
from search_e1.stages.inputs import Watch
from search_e1.training import memory, sharding
from search_e1.training import policy as policies


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a stage's work is given."""

    out: Path
    """The artifact's directory in the making."""
    seed: int
    progress: Progress
    track: Track
    work: Work
    """What outlives a kill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """What a stage is asked to do, and all that makes its artifact what it is."""

    name: str
    """``grpo-1``, ``evaluation-base``, ..."""
    settings: Sequence[str]
    """Keys of the config that it depends on, beside ``prompts`` and ``policy``, on which all do."""
    inputs: Mapping[str, str]
    """Name of the input -> checksum."""
    work: Callable[[Attempt], Mapping[str, Any]]
    """Writes the artifact's files and returns its figures."""
    out: Path | None = None
    """The artifact's place; without it ``name`` in the run directory."""
    seed_name: str | None = None
    """What its seed is drawn for, where it is not ``name``."""
    unused: Sequence[str] = ()
    """Settings on which nothing depends as the others stand; they are kept at their defaults."""
    task: Sequence[Any] = ()
    """The method of ``Stages`` to call, and with what, where several processes can work on it."""


class Maker:
    """Makes the artifacts of the run in ``root`` under ``config``."""

    def __init__(self, config: Config, root: Path, watch: Watch, stop: Stop) -> None:
        self.config = config
        self.root = root
        self.watch = watch
        self.stop = stop

    @cached_property
    def launcher(self) -> Launcher:
        launch = self.config.launch
        # An engine of vLLM's own starts processes and threads as it likes.
        fork = launch.fork and self.config.rollout.engine != "vllm"
        return Launcher(launch.processes, place(launch.nodes, launch.node), fork=fork)

    @contextmanager
    def together(self, facts: Callable[[], Facts]) -> Iterator[None]:
        """With the run's other machines, if it has several. What ends the context ends them too, and is told there.

        ``facts``: what must be the same on all machines.

        Raises:
            RunError: one did not come, or differs in what decides about results.
        """
        with ExitStack() as stack:
            if self.launcher.place.nodes > 1:
                with self.watch("nodes") as progress:
                    met = self.launcher.together(self.root, facts(), self._waiting(), progress)
                    stack.enter_context(met)
            yield

    def follow(self, facts: Callable[[], Facts]) -> bool:
        """On all machines of a run but the first: take part in its stages until it is done. ``False`` on the first.

        Raises:
            SearchE1Error: what went wrong, there or here.
            Stopped: a signal, there or here.
        """
        if not self.launcher.place.node:
            return False
        found: Facts = {}
        problem: SearchE1Error | None = None
        try:
            self.check()
            found = facts()
        except SearchE1Error as error:
            problem = error
        self.launcher.follow(self.root, found, problem, self._waiting(), self.stop)
        return True

    def _waiting(self) -> Waiting:
        launch = self.config.launch
        return Waiting(launch.wait_seconds, launch.address or os.environ.get("MASTER_ADDR"), launch.port)

    def check(self) -> None:
        """Raise what is wrong with the number of processes, before any of them starts.

        Raises:
            ConfigError: it does not fit the devices, the sizes of batches, or what is divided.
        """
        here, all, name = self.launcher.count, self.launcher.all, self.config.policy.device
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
            micro_batch(distill, all)
        self.launcher.prepare()

    def check_memory(self, policy: str | Path, stages: Sequence[str]) -> None:
        """Refuse what cannot fit the GPU in ``stages`` (``grpo``, ``distill``): see ``planning.start``.

        Raises:
            ConfigError: weights and states alone are more than its memory.
        """
        there, all = device(self.config.policy.device), self.launcher.all
        if found := start.cuda_device(there, all, self.config.launch.sharding):
            start.check_memory(self.config, str(policy), found, stages)

    def artifact(self, stage: StageSpec) -> Artifact:
        """The artifact of ``stage``: made, or as it lies there if it is complete. See ``runs.artifact``."""
        processes = self.launcher.all if stage.task else 1
        dumped = self._shown()
        dumped["data.max_eval"], dumped["data.max_train"] = dumped["data"]["max_eval"], dumped["data"]["max_train"]
        return runs.artifact(
            stage.out or self.root / stage.name,
            stage=stage.name,
            settings={
                key: default_of((key,)) if key in stage.unused else dumped[key]
                for key in (*stage.settings, "prompts", "policy")
            },
            inputs=stage.inputs,
            seed=self._seed(stage),
            make=self.launched(stage) if processes > 1 else self.here(stage),
            defaults=default_of,
            gpus=0
            if stage.name.startswith(("pairs-", "ceiling"))
            else policies.accelerators(self.config.policy, processes),
        )

    def here(self, stage: StageSpec) -> Make:
        """The stage's work, in this process."""

        def make(out: Path) -> Mapping[str, Any]:
            run, step = tracking.run_of(stage.name)
            tracker = tracking.tracked(self.config.tracking, self.root, run, self._shown(), anew=run == stage.name)
            work = Work(out / runs.WORK, **self.config.checkpoints.model_dump(), stop=self.stop)
            with self.watch(stage.name) as progress, tracker as track, memory.told(stage.name):
                seed = self._seed(stage)
                set_seed(seed)
                result = stage.work(Attempt(out, seed, progress, track, work))
                if figures := tracking.figures_of(stage.name, result):
                    track(step, figures)
                return result

        return make

    def launched(self, stage: StageSpec) -> Make:
        """The stage's work, in a group of processes."""

        def make(out: Path) -> Mapping[str, Any]:
            logs = (out / runs.WORK / "processes").absolute()
            method, *arguments = stage.task
            told = {
                "config": self.config.model_dump(mode="json"), "root": self.root, "out": out, "logs": logs,
                "stage": method, "arguments": arguments,
            }  # fmt: skip
            with self.watch(stage.name) as progress:
                return self.launcher.run(to_jsonable_python(told), logs, progress, self.stop)

        return make

    def _seed(self, stage: StageSpec) -> int:
        return runs.derived_seed(self.config.seed, stage.seed_name or stage.name)

    def _shown(self) -> dict[str, Any]:
        """The config, as manifests and trackers show it."""
        return masked(self.config.model_dump(mode="json"))
