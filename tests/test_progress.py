"""What is told within a step, how time left is reckoned, and how both are drawn, in a terminal and in a notebook."""

import sys
from contextlib import suppress
from io import StringIO
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

from search_e1.cli import display
from search_e1.rollout import progress as telling
from search_e1.rollout.progress import RolloutProgress, StepRollouts
from search_e1.runs import notebook
from search_e1.runs.progress import Pace, tell_within
from search_e1.training import record
from search_e1.training.record import Passes
from search_e1.types import ActionKind, StopReason, Trajectory, Turn


def trajectory_of(tokens: int, reward: float) -> Trajectory:
    turn = Turn(action_ids=(1,) * tokens, action_text="x", kind=ActionKind.ANSWER, argument="x")
    return Trajectory(
        question_id="q", prompt_ids=(1,), turns=(turn,), stop_reason=StopReason.ANSWERED, answer="x", reward=reward
    )


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Listener:
    """Notes what it is told of whole steps, and of parts of them."""

    def __init__(self) -> None:
        self.whole: list[tuple[float, int, str]] = []
        self.parts: list[tuple[float, int, str]] = []

    def __call__(self, done: int, total: int, figure: str = "") -> None:
        self.whole.append((done, total, figure))

    def within(self, done: float, total: int, figure: str = "") -> None:
        self.parts.append((done, total, figure))


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for module in (telling, record):
        monkeypatch.setattr(module.time, "perf_counter", clock)
    return clock


def test_time_left_runs_down_between_reports() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert str(pace) == "0:00<-:--"
    clock.now += 10
    pace.report(0.5, 8)  # half a step in 10 seconds
    assert str(pace) == "0:10<2:30"
    clock.now += 30
    assert str(pace) == "0:40<2:00"
    pace.report(4, 8)
    assert str(pace) == "0:40<0:40"
    clock.now += 3600
    assert str(pace) == "1:00:40<0:00"
    pace.report(9, 8)
    assert str(pace) == "1:00:40<0:00"


def test_a_resumed_stage_does_not_count_what_was_done_before() -> None:
    clock = Clock()
    pace = Pace(clock)
    clock.now += 5  # the model is loaded
    pace.report(500, 1000)
    assert str(pace) == "0:05<-:--"
    clock.now += 10
    pace.report(501, 1000)
    assert str(pace) == "0:15<1:23:10"
    unknown = Pace(clock)
    unknown.report(3, 0)
    assert str(unknown) == "0:00<-:--"


def test_rollouts_tell_their_number_their_mean_and_their_rate(clock) -> None:
    told = Listener()
    rollouts = RolloutProgress(told, 10, "greedy EM", before=2)
    on_trajectory = rollouts.after({"trajectories": 2, "em": 2})
    clock.now += 2
    on_trajectory(0, trajectory_of(tokens=30, reward=0.0))
    assert told.parts == [(4, 10, "")]  # before the first has ended
    clock.now += 100  # between two chunks
    on_trajectory = rollouts.after({"trajectories": 3, "em": 2})
    clock.now += 4
    on_trajectory(0, trajectory_of(tokens=60, reward=1.0))
    assert told.whole == [(5, 10, "greedy EM 0.667, 15 tok/s"), (6, 10, "greedy EM 0.750, 15 tok/s")]


def test_a_step_s_rollouts_are_its_share_of_the_step_before(clock) -> None:
    told = Listener()
    rollouts = StepRollouts(told, 8)
    for step, tokens in ((0, 40), (1, 80)):
        on_trajectory = rollouts.of(step, 2)
        for i in range(2):
            clock.now += 5
            on_trajectory(i, trajectory_of(tokens=tokens, reward=float(i)))
        clock.now += 30  # the update
    assert not told.whole  # nothing is done before the step is
    assert [round(done, 3) for done, *_ in told.parts] == [0, 0.25, 0.5, 1, 1.125, 1.25]  # 10 of 40 seconds
    assert told.parts[-1][1:] == (8, "rollouts 2/2, 16 tok/s, reward 0.500")


def test_passes_are_their_share_of_the_step_s_time(clock) -> None:
    told = Listener()
    clock.now += 20
    passes = Passes(told, 3, 8, "loss 0.5, ", begun=clock.now - 20, updates=2)  # samples took 20 seconds
    clock.now += 5
    passes.tell(0, 1, 4)  # so 2 x 4 passes will take 40
    clock.now += 20
    passes.tell(1, 1, 4)
    assert told.parts == [
        (3 + 25 / 60, 8, "loss 0.5, pass 1/8"),
        (3 + 45 / 60, 8, "loss 0.5, pass 5/8"),
    ]
    tell_within(lambda done, total, figure="": told(done, total, figure), 0.5, 1)
    assert not told.whole


def test_a_bar_fits_80_columns_with_its_figure() -> None:
    stream = StringIO()
    console = Console(file=stream, width=80, force_terminal=True, color_system=None)
    with display.watch(console, 2)("evaluation-grpo-1") as progress:
        tell_within(progress, 0, 320)
        progress(120, 320, "sampled EM 0.412, 1240 tok/s")
    last = stream.getvalue().replace("\x1b[2K", "").split("\r")[-1]
    assert "evaluation grpo 1/2" in last
    assert "sampled EM 0.412, 1240 tok/s" in last
    assert "  120/320 " in stream.getvalue()
    quiet = StringIO()
    with display.watch(Console(file=quiet, width=80), 2)("grpo-1") as progress:
        tell_within(progress, 0.5, 8, "rollouts 3/6")
        progress(8, 8, "reward 0.41")
        tell_within(progress, 8, 8)
    [line] = quiet.getvalue().splitlines()
    assert line.split() == ["grpo", "1/2", "━━━━━━", "8/8", "0:00", "reward", "0.41"]


class Handle:
    def __init__(self) -> None:
        self.shown: list[str] = []

    def update(self, line: object) -> None:
        self.shown.append(line._repr_html_())


@pytest.fixture
def kernel(monkeypatch) -> list[Handle]:
    """A stand-in for IPython in a kernel; returns the handles of what is displayed."""
    handles: list[Handle] = []

    def show(line: object, display_id: bool) -> Handle:
        handles.append(Handle())
        handles[-1].shown.append(line._repr_html_())
        return handles[-1]

    ipython, inner = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())
    inner.display = show
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", inner)
    return handles


def test_a_notebook_has_a_line_a_stage(kernel, monkeypatch) -> None:
    monkeypatch.setattr(notebook, "_INTERVAL", 0.0)
    assert notebook.in_notebook()
    with notebook.watch(2)("grpo-1") as progress:
        tell_within(progress, 0.5, 8, "rollouts 3/6, <b>")
        progress(8, 8, "reward 0.41")
        tell_within(progress, 8, 8)
    [handle] = kernel
    assert "grpo 1/2" in handle.shown[0]
    assert '<progress max="8" value="0.5"' in handle.shown[1]
    assert "rollouts 3/6, &lt;b&gt;" in handle.shown[1]
    assert "8/8  0:00  reward 0.41" in handle.shown[-1]
    with suppress(ValueError), notebook.watch(2)("pool-2") as progress:
        progress(1, 4)
        raise ValueError
    assert 'max="4" value="1"' in kernel[-1].shown[-1]  # what failed is not shown as done


def test_outside_a_kernel_there_is_no_notebook(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not notebook.in_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not notebook.in_notebook()
