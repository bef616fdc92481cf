"""A stage as a group of processes: what the first makes, what is told of the first that fails, and that none is left."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import PASSAGES, ended
from forking import wait_until
from search_e1.config import Config, LaunchConfig
from search_e1.errors import ConfigError, RetrievalError, TrainingError
from search_e1.launch import group, processes
from search_e1.launch.group import Meeting
from search_e1.launch.launcher import Launcher
from search_e1.launch.place import Place
from search_e1.launch.processes import ForkServer, Start
from search_e1.runs import cpu
from search_e1.runs.progress import Progress, silent
from search_e1.runs.stopping import Stopped, on_signals
from search_e1.stages.all import Stages
from taught import LIMITS, QUESTIONS, teach

MEETING = Meeting("127.0.0.1", 4321, 0, 2, 2)


@pytest.fixture
def acting(monkeypatch) -> None:
    """Processes that are no workers."""
    monkeypatch.setattr(processes, "MODULE", "acting_rank")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """What such processes can be copies of."""
    with pytest.MonkeyPatch.context() as patch:
        acting.__wrapped__(patch)  # type: ignore[attr-defined]
        made = ForkServer(group.variables(2))
    assert made.usable()
    yield made
    made.close()


@pytest.fixture(params=["copies", "anew"])
def start(acting, server, request) -> Start:
    return server.start if request.param == "copies" else processes.fresh


def act(logs: Path, start: Start, *acts: str, progress: Progress = silent, **kwargs: Any) -> Any:
    return group.run(MEETING, {"act": acts, "logs": str(logs)}, logs, progress=progress, start=start, **kwargs)


def all_ended(logs: Path) -> bool:
    return all(ended(int(path.read_text())) for path in logs.glob("pid-*"))


def test_the_first_tells_how_far_it_is_and_what_it_made(tmp_path, start):
    told: list[tuple[int, int, str]] = []
    made = act(tmp_path, start, "work", "work", progress=lambda *args: told.append(args))
    assert made == {"made": [1, 2], "at": "4321"}
    assert told == [(1, 2, "half"), (2, 2, "all")]
    assert [(tmp_path / f"rank-{i}.log").read_text() for i in (0, 1)] == [
        "rank 0 of 2, here 0\n",
        "rank 1 of 2, here 1\n",
    ]


@pytest.mark.parametrize(
    ("acts", "error", "message"),
    [
        (("wait", "fail"), RetrievalError, r"^http://nowhere: no answer$"),
        (("follow", "fail"), RetrievalError, r"^http://nowhere: no answer$"),
        (("wait", "fall over"), TrainingError, r"^process 1 of 2: KeyError: 'missing'; more in .*rank-1\.log$"),
        (
            ("wait", "die"),
            TrainingError,
            r"^process 1 of 2 was ended by SIGKILL; the machine may have run out of memory",
        ),
        (("notice", "die"), TrainingError, r"^process 1 of 2 was ended by SIGKILL"),
        (("vanish", "wait"), TrainingError, r"^process 0 of 2 left with status 3; see .*rank-0\.log"),
    ],
)
def test_the_first_cause_is_told_and_all_end(tmp_path, monkeypatch, start, acts, error, message):
    monkeypatch.setattr(group, "_GRACE", 0.7)
    with pytest.raises(error, match=message) as raised:
        act(tmp_path, start, *acts)
    assert "\n" not in str(raised.value)
    assert all_ended(tmp_path)


def test_a_signal_is_passed_on_and_all_save_first(tmp_path, start):
    def stop_when_told(done: int, total: int, figure: str = "") -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with on_signals() as stop, pytest.raises(Stopped):
        act(tmp_path, start, "wait", "wait", progress=stop_when_told, stop=stop)
    assert [(tmp_path / f"saved-{i}").exists() for i in (0, 1)] == [True, True]
    assert all_ended(tmp_path)


@pytest.mark.usefixtures("acting")
@pytest.mark.parametrize("start", ["processes.ForkServer(os.environ).start", "processes.fresh"], ids=["copies", "anew"])
def test_processes_end_with_the_one_that_started_them(tmp_path, start):
    code = (
        "import os, pathlib, sys; from search_e1.launch import group, processes; processes.MODULE = 'acting_rank';"
        "group.run(group.Meeting('127.0.0.1', 1, 0, 2, 2), {'act': ['wait', 'wait'], 'logs': sys.argv[1]},"
        f"pathlib.Path(sys.argv[1]), start={start},"
        "progress=lambda *_: os._exit(9))"  # as one that is killed: nothing is cleaned up
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    wait_until(lambda: all_ended(tmp_path))


def test_a_process_that_starts_others_tells_why_it_cannot(tmp_path, monkeypatch, caplog):
    """A thread that importing has started would not be there in a copy. Then all are started anew."""
    monkeypatch.setattr(processes, "MODULE", "threading_rank")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parent), *sys.path]))
    (tmp_path / "threading_rank.py").write_text(
        "import threading, time\nfrom acting_rank import main\n"
        "if __name__ == '__main__':\n    main()\nelse:\n"
        "    threading.Thread(target=time.sleep, args=[600], daemon=True).start()\n"
    )
    launching = Launcher(2, Place())
    launching.prepare()
    logs = tmp_path / "logs"
    assert launching.run({"act": ["work", "work"], "logs": str(logs)}, logs)["made"] == [1, 2]
    assert caplog.messages == ["processes are started anew, which takes longer: importing has started threads"]
    assert launching._server is None


def test_the_time_of_copies_counts_once(tmp_path, acting):
    launching = Launcher(2, Place())
    before = cpu.seconds()
    launching.run({"act": ["work", "work"], "logs": str(tmp_path)}, tmp_path)
    added = cpu._elsewhere
    launching.close()
    assert cpu._elsewhere < added
    assert cpu.seconds() - before > 0


def test_a_process_that_starts_others_may_be_killed(tmp_path, acting, monkeypatch):
    monkeypatch.setattr(group, "_GRACE", 0.1)
    launching = Launcher(2, Place())

    def kill(*_: object) -> None:
        assert launching._server
        launching._server._server.kill()

    with pytest.raises(TrainingError, match="process 0 of 2 was ended by SIGKILL"):
        launching.run({"act": ["wait", "wait"], "logs": str(tmp_path)}, tmp_path, kill)
    wait_until(lambda: all_ended(tmp_path))
    assert launching.run({"act": ["work", "work"], "logs": str(tmp_path)}, tmp_path)["made"] == [1, 2]
    launching.close()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_one_of_several_that_somebody_else_has_started_is_refused(config, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "4")
    with pytest.raises(ConfigError, match=f"{name} = 4: started as one of 4 processes, on 1 machine; start one"):
        Stages(config, tmp_path).check(config.policy.model)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"launch\.processes"):
        Stages(config, tmp_path).grpo(config.policy.model, 1)
    assert not (tmp_path / ".grpo-1.partial").exists()


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    place = tmp_path_factory.mktemp("inputs")
    teach().save(place / "policy")
    (place / "corpus.jsonl").write_text(
        "".join(json.dumps({"id": p.id, "contents": p.contents}) + "\n" for p in PASSAGES)
    )
    lines = [{"id": q.id, "question": q.text, "golden_answers": q.answers} for q in QUESTIONS]
    (place / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Config.model_validate(
        {
            "run": place / "run",
            "policy": {"model": str(place / "policy"), "device": "cpu"},
            "data": {
                "corpus": place / "corpus.jsonl",
                "train": [place / "questions.jsonl"],
                "eval": {"tiny": place / "questions.jsonl"},
            },
            "rollout": LIMITS.model_dump(),
            "grpo": {"steps": 4, "questions_per_step": 2, "group_size": 4, "learning_rate": 0.01},
            "distill": {"batch_size": 4},
            "checkpoints": {"every_seconds": 0, "share": 1},
            "launch": {"processes": 2, "sharding": "fsdp2"},
        }
    )


class KillOne:
    """Progress that kills the second of the processes after a step, once."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def __enter__(self) -> Progress:
        del self.told[:]
        return self

    def __exit__(self, *_: object) -> None: ...

    def __call__(self, done: int, total: int, figure: str = "") -> None:
        self.told.append(done)
        if self.told == [1, 2]:
            *_, server = sorted(psutil.Process().children(), key=psutil.Process.create_time)
            _, second = sorted(server.children(), key=psutil.Process.create_time)
            second.kill()


def test_a_stage_goes_on_after_one_of_its_processes_was_killed(config, tmp_path):
    killing = KillOne()
    stages = Stages(config, tmp_path, watch=lambda name: killing)
    policy = config.policy.model
    with pytest.raises(TrainingError, match="process 1 of 2 was ended by SIGKILL"):
        stages.grpo(policy, 1)
    assert not (tmp_path / "grpo-1").exists()
    # Also for another number of processes; to start as many again would only take longer.
    stages = Stages(config.model_copy(update={"launch": LaunchConfig()}), tmp_path, watch=lambda name: killing)
    made = stages.grpo(policy, 1)
    assert killing.told[0] in (2, 3)
    assert killing.told[-1] == 4
    assert (made.manifest.attempts, made.manifest.result["steps"], made.manifest.gpus) == (2, 4, 0)
    assert [json.loads(line)["step"] for line in (made.path / "steps.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert sorted(made.manifest.files)[-1] == "steps.jsonl"
    assert stages.grpo(policy, 1).manifest == made.manifest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"launch": {"processes": 3}}, r"= 8 trajectories cannot be shared by 3 processes; .* launch 1, 2, 4 or 8"),
        ({"launch": {"processes": 8}}, r"distill\.batch_size = 4 cannot be shared by 8 processes"),
        (
            {"launch": {"processes": 2, "sharding": "fsdp2"}, "grpo": {"hindsight": {"weight": 0.1}}},
            r'launch\.sharding = "fsdp2": grpo\.hindsight and grpo\.evidence need the whole weights',
        ),
        (
            {"policy": {"model": "small", "device": "meta:1"}},
            r"device = 'meta:1': 2 processes take a device each; write",
        ),
    ],
)
def test_what_cannot_be_launched_is_refused_before_any_work(config, tmp_path, changes, message):
    config = Config.model_validate({**config.model_dump(), **changes})
    with pytest.raises(ConfigError, match=message) as error:
        Stages(config, tmp_path).check(config.policy.model)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())
