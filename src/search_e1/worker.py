"""One process of a group that makes an artifact: what ``python -m search_e1.worker`` runs. See ``launch.group``.

It does a stage's work in the artifact's directory in the making. The process that started it has checked everything before,
keeps the run directory, and completes the artifact.
"""

import faulthandler
import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from pydantic import validate_call
from pydantic_core import to_jsonable_python

from search_e1 import runs
from search_e1.config import Config
from search_e1.launch import fork_server, group
from search_e1.retrieval.base import Index
from search_e1.runs import Artifact, disk, ranks
from search_e1.runs.allocation import keep_freed_memory
from search_e1.runs.devices import device
from search_e1.runs.progress import Progress
from search_e1.runs.stopping import Stop, Stopped, on_signals
from search_e1.stages.all import Stages
from search_e1.stages.inputs import Watch, unwatched
from search_e1.stages.runner import Maker, StageSpec

_PATIENCE = timedelta(days=7)
"""How long ranks wait for one another. One that has ended is noticed by the process that started it, and at once."""


class _Part(Stages):
    """The stages, of which one is worked at: no artifact is looked at, made or verified again."""

    def __init__(self, config: Config, root: Path, out: Path, watch: Watch, stop: Stop) -> None:
        super().__init__(config, root, watch, stop)
        self.maker: _Worker = _Worker(config, root, out, watch, stop)

    def ceiling(self) -> Artifact:
        return _at(self.root / "ceiling", "ceiling")

    def _sampled_by(self, path: Path, policy: str | Path, other_policy: bool) -> str:
        return ""

    def _checksum(self, policy: str | Path) -> str:
        return ""

    @property
    def _verified(self) -> Index:
        return self._index

    @property
    def _indexes(self) -> Sequence[Path]:
        return self.config.retrieval.index or [self.root / "index" / kind for kind in self._kinds]


class _Worker(Maker):
    """Works at the stage it is given in ``out``, the artifact's directory in the making."""

    made: Mapping[str, Any]
    """What the stage came to."""

    def __init__(self, config: Config, root: Path, out: Path, watch: Watch, stop: Stop) -> None:
        super().__init__(config, root, watch, stop)
        self.out = out

    def artifact(self, stage: StageSpec) -> Artifact:
        self.made = self.here(stage)(self.out)
        return _at(self.out, stage.name)


def _at(path: Path, stage: str) -> Artifact:
    """An artifact where it is; of its manifest nothing is asked."""
    empty: dict[str, Any] = {}
    manifest = runs.Manifest(
        stage=stage, settings=empty, inputs={}, seed=0, files={}, result=empty, versions={}, started=0, seconds=0
    )
    return Artifact(path, manifest)


def main() -> None:
    """Read the task, do this rank's part of it, and leave: 0, or a note and another status."""
    task = json.loads(_line(0))
    threading.Thread(target=_end_with_the_one_that_waits, daemon=True).start()
    faulthandler.enable()
    keep_freed_memory()
    logs = Path(task["logs"])
    try:
        with on_signals() as stop, _joined(task["config"]["policy"]["device"]):
            stages = _Part(
                Config.model_validate(task["config"]), Path(task["root"]), Path(task["out"]), _watch(_pipe()), stop
            )
            try:
                with disk.told(stages.root):
                    validate_call(getattr(stages, task["stage"]))(*task["arguments"])
            except ranks.Left:
                return
            if ranks.is_first():
                _tell(_pipe(), {"result": to_jsonable_python(stages.maker.made)})
    except Stopped as stopped:
        _leave(stopped.status)
    except BaseException as error:
        group.note(logs, ranks.rank(), error)
        traceback.print_exc()
        _leave(2)


def _leave(status: int) -> None:
    """At once: other ranks may be gone, and libraries wait for them when a process ends in the usual way."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def _joined(name: str) -> Iterator[None]:
    """Take this process's own accelerator, if policies live on one, and meet the other ranks."""
    backend = "gloo"
    if device(name).type != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        backend = f"cpu:gloo,{device(name).type}:{dist.get_default_backend_for_device(device(name))}"
    dist.init_process_group(backend, timeout=_PATIENCE)
    yield
    dist.destroy_process_group()


def _line(descriptor: int) -> bytes:
    """Unbuffered, so that nothing is read beyond it."""
    read = bytearray()
    while (byte := os.read(descriptor, 1)) not in (b"\n", b""):
        read += byte
    return bytes(read)


def _end_with_the_one_that_waits() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def _pipe() -> IO[str] | None:
    return open(int(os.environ[fork_server.PIPE]), "w", closefd=False) if ranks.is_first() else None


def _tell(pipe: IO[str] | None, told: Mapping[str, Any]) -> None:
    if pipe:
        pipe.write(json.dumps(told) + "\n")
        pipe.flush()


def _watch(pipe: IO[str] | None) -> Any:
    if pipe is None:
        return unwatched

    @contextmanager
    def watch(stage: str) -> Iterator[Progress]:
        yield lambda done, total, figure="": _tell(pipe, {"done": done, "total": total, "figure": figure})

    return watch


if __name__ == "__main__":
    main()
