"""Several machines of one run, as two processes that meet on this one: they work, differ, fail and end together."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conftest import ended
from forking import end, fork, wait_until
from search_e1.errors import ConfigError, DataError, RetrievalError, RunError, SearchE1Error, TrainingError
from search_e1.launch import group, launcher, nodes, processes, wire
from search_e1.launch.launcher import Launcher
from search_e1.launch.nodes import Waiting
from search_e1.launch.place import Place, place
from search_e1.runs.progress import Progress, silent
from search_e1.runs.stopping import Stopped, on_signals

WAITING = Waiting(30.0)
FACTS = {"grpo": {"steps": 8}, "versions": {"torch": "2.13.0"}}


@pytest.fixture(autouse=True)
def acting(monkeypatch) -> None:
    monkeypatch.setattr(processes, "MODULE", "acting_rank")
    monkeypatch.setattr(group, "_GRACE", 0.7)
    monkeypatch.setattr(launcher, "_GRACE", 0.4)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))


class Second:
    """The second machine: a copy of this process that follows, with processes of ``acting_rank``."""

    def __init__(self, run: Path, facts: Any, number: int, problem: str) -> None:
        self.path = run / f"said-{number}-{time.monotonic_ns()}"
        self.process = fork(self._follow, run, facts, number, DataError(problem) if problem else None)
        assert self.process.pid
        self.pid = self.process.pid

    def _follow(self, *args: Any) -> None:
        status, said = self._ended(*args)
        self.path.write_text(said)
        os._exit(status)  # nothing of pytest's is to end here

    def _ended(self, run: Path, facts: Any, number: int, problem: DataError | None) -> tuple[int, str]:
        try:
            with on_signals() as stop:
                Launcher(1, Place(number, 2), fork=False).follow(run, facts, problem, WAITING, stop)
            return 0, ""
        except SearchE1Error as error:
            return 2, f"{type(error).__name__}: {error}"
        except Stopped as stopped:
            return stopped.status, str(stopped)

    @property
    def status(self) -> int | None:
        return self.process.exitcode

    @property
    def said(self) -> str:
        return self.path.read_text()


@contextmanager
def second(run: Path, facts: Any = FACTS, number: int = 1, problem: str = "") -> Iterator[Second]:
    """It has ended by itself when the context ends."""
    run.mkdir(exist_ok=True)
    made = Second(run, facts, number, problem)
    try:
        yield made
    finally:
        end([made.process], 30)


def act(run: Path, *tasks: tuple[str, str], progress: Progress = silent, **kwargs: Any) -> list[Any]:
    """What both machines make of each of ``tasks``, as the first one's process sees it."""
    first = Launcher(1, Place(0, 2), fork=False)
    with first.together(run, FACTS, WAITING, silent):
        return [first.run({"act": acts, "logs": str(run)}, run, progress, **kwargs) for acts in tasks]


def all_ended(run: Path) -> bool:
    return all(ended(int(path.read_text())) for path in run.glob("pid-*"))


def test_they_work_on_stage_after_stage_and_end_together(tmp_path):
    told: list[tuple[int, int, str]] = []
    with second(tmp_path) as other:
        made = act(tmp_path, ("work", "work"), ("work", "work"), progress=lambda *args: told.append(args))
    assert [one["made"] for one in made] == [[1, 2], [1, 2]]
    assert told == [(1, 2, "half"), (2, 2, "all")] * 2
    assert (other.status, other.said) == (0, "")
    assert (tmp_path / "rank-1.log").read_text() == "rank 1 of 2, here 0\n"
    assert not (tmp_path / nodes.FILE).exists()


@pytest.mark.parametrize(
    ("acts", "error", "message"),
    [
        (("wait", "fail"), RetrievalError, "http://nowhere: no answer"),
        (("fail", "wait"), RetrievalError, "http://nowhere: no answer"),
        (
            ("wait", "die"),
            TrainingError,
            "process 1 of 2 was ended by SIGKILL; the machine may have run out of memory; run",
        ),
        (("notice", "die"), TrainingError, "process 1 of 2 was ended by SIGKILL"),
        (("wait", "fall over"), TrainingError, "process 1 of 2: KeyError: 'missing'; more in"),
    ],
)
def test_all_tell_the_first_cause(tmp_path, acts, error, message):
    with second(tmp_path) as other, pytest.raises(error, match=message) as raised:
        act(tmp_path, acts)
    assert "\n" not in str(raised.value)
    assert other.status == 2
    assert other.said == f"{error.__name__}: {raised.value}"
    assert all_ended(tmp_path)


def test_a_machine_that_is_lost_ends_the_stage(tmp_path):
    with second(tmp_path) as other, pytest.raises(TrainingError, match=r"^node 1 \(\S+\) is gone: .* it goes on$"):
        act(tmp_path, ("wait", "wait"), progress=lambda *_: other.process.kill())
    wait_until(lambda: all_ended(tmp_path))


def test_and_so_does_one_that_says_nothing_any_more(tmp_path, monkeypatch):
    """As when the network is cut: nobody closes the connection."""
    monkeypatch.setattr(wire, "_SILENCE", 0.5)
    with second(tmp_path) as other:
        with pytest.raises(TrainingError, match=r"^node 1 \(\S+\) is gone"):
            act(tmp_path, ("wait", "wait"), progress=lambda *_: os.kill(other.pid, signal.SIGSTOP))
        other.process.kill()


def test_the_others_end_when_the_first_is_lost(tmp_path):
    def cut(*_: object) -> None:
        for node in first.others:
            node.wire._socket.shutdown(socket.SHUT_RDWR)

    first = Launcher(1, Place(0, 2), fork=False)
    with second(tmp_path) as other, pytest.raises(TrainingError), first.together(tmp_path, FACTS, WAITING, silent):
        first.run({"act": ("wait", "wait"), "logs": str(tmp_path)}, tmp_path, cut)
    assert other.status == 2
    assert other.said.startswith("TrainingError: node 1 of 2: node 0 is gone")
    assert all_ended(tmp_path)


@pytest.mark.parametrize("which", ["first", "second"])
def test_a_signal_to_one_stops_all_and_all_save(tmp_path, which):
    with second(tmp_path) as other, on_signals() as stop:
        pid = os.getpid() if which == "first" else other.pid
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            act(tmp_path, ("wait", "wait"), progress=lambda *_: os.kill(pid, signal.SIGTERM), stop=stop)
    assert (other.status, other.said) == (
        75,
        "stopped by SIGTERM; run the same command again to go on",
    )
    assert (tmp_path / "saved-1").exists()
    assert all_ended(tmp_path)


def test_machines_that_differ_are_refused_with_all_that_does(tmp_path):
    theirs = {"grpo": {"steps": 16}, "versions": {"torch": "2.12.0"}}
    message = (
        r"^node 1 \(\S+\) is not as node 0 is: grpo\.steps: 16 there, 8 on node 0; "
        r'versions\.torch: "2\.12\.0" there, "2\.13\.0" on node 0; make them the same$'
    )
    with second(tmp_path, theirs) as other, pytest.raises(RunError, match=message) as raised:
        act(tmp_path)
    assert other.said == f"RunError: {raised.value}"


def test_what_is_wrong_on_one_is_told_on_all(tmp_path):
    message = r"^node 1 \(\S+\): q.jsonl: no such file$"
    with second(tmp_path, problem="q.jsonl: no such file") as other, pytest.raises(DataError, match=message):
        act(tmp_path)
    assert other.said.startswith("DataError: node 1 (")


def test_two_of_one_number(tmp_path):
    message = r"^node 1 of 3 has come twice \(from \S+ and \S+\)"
    with second(tmp_path), second(tmp_path), pytest.raises(RunError, match=message):
        nodes.gather(tmp_path, Place(0, 3), FACTS, WAITING, silent)


def test_machines_that_do_not_come(tmp_path):
    little = Waiting(0.2)
    with pytest.raises(RunError, match=r"^nodes 1, 2 of 3 did not come within 0.2 s \(launch.wait_seconds\); start"):
        nodes.gather(tmp_path, Place(0, 3), FACTS, little, silent)
    (tmp_path / nodes.FILE).write_text('{"addresses": ["127.0.0.1"], "port": 9, "token": "old"}')
    with pytest.raises(RunError, match=r"^node 1 of 3: node 0 did not come within 0.2 s .* it left no word in"):
        nodes.find(tmp_path, Place(1, 3), FACTS, None, little)


def test_a_stranger_is_not_let_in(tmp_path):
    """Who listens is told in a file that nobody else may read, with a word that a caller must know."""
    hello = {"node": 1, "host": "b", "facts": FACTS, "problem": None, "time": 0.0}

    def call() -> list[str]:
        wait_until((tmp_path / nodes.FILE).exists)
        assert (tmp_path / nodes.FILE).stat().st_mode & 0o777 == 0o600
        word = json.loads((tmp_path / nodes.FILE).read_text())
        told = []
        for greeting in ("GET / HTTP/1.1", json.dumps({**hello, "token": "?"}), json.dumps({**hello, **word})):
            reached = nodes._reached("127.0.0.1", word["port"])
            assert reached
            with reached:
                reached.sendall(greeting.encode() + b"\n")
                told.append(reached.recv(100).decode())
        return told

    with ThreadPoolExecutor(1) as pool:
        caller = pool.submit(call)
        (node,) = nodes.gather(tmp_path, Place(0, 2), FACTS, WAITING, silent)
        node.wire.close()
    assert node.number == 1
    assert caller.result() == ["", "", '{"welcome": true}\n']


@pytest.mark.parametrize(
    ("environment", "given", "found"),
    [
        ({}, (None, None), Place(0, 1)),
        ({}, (3, 2), Place(2, 3)),
        ({"NNODES": "2", "NODE_RANK": "1"}, (None, None), Place(1, 2)),
        ({"PET_NNODES": "4", "PET_NODE_RANK": "3", "WORLD_SIZE": "4"}, (None, None), Place(3, 4)),
        ({"GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1", "WORLD_SIZE": "2"}, (None, None), Place(1, 2)),
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (None, None), Place(1, 2)),
        ({"SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}, (2, 1), Place(1, 2)),
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0"}, (None, None), Place(0, 1)),  # the batch script itself
    ],
)
def test_which_machine_this_is(monkeypatch, environment, given, found):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert place(*given) == found


@pytest.mark.parametrize(
    ("environment", "given", "message"),
    [
        ({}, (2, 2), "node 2 of 2: nodes are counted from 0"),
        ({}, (None, 1), "node 1 of 1: nodes are counted from 0; set launch.nodes and launch.node"),
        (
            {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "16"},
            (None, None),
            "SLURM_STEP_NUM_TASKS = 16: started as one of 16 processes, on 2 machines; start one on each",
        ),
        ({"WORLD_SIZE": "8"}, (None, None), "WORLD_SIZE = 8: started as one of 8 processes, on 1 machine; start one"),
    ],
)
def test_what_makes_no_sense(monkeypatch, environment, given, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message) as error:
        place(*given)
    assert "\n" not in str(error.value)
