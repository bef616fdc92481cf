"""Runs that share artifacts: what two would make the same is made once, by whichever comes first, and costs both the same."""

import json
import os
import time
from pathlib import Path

import pytest

from forking import end, fork
from search_e1 import runs
from search_e1.errors import RunError
from search_e1.runs import artifacts
from search_e1.runs.opening import opened


def ask(root: Path, calls: list[str], *, steps: int = 8, seed: int = 0) -> runs.Artifact:
    def make(out: Path) -> dict[str, float]:
        calls.append(root.name)
        (out / "policy").mkdir()
        (out / "policy" / "weights").write_bytes(b"abc")
        return {"em": 0.5}

    return runs.artifact(
        root / "grpo-1", stage="grpo-1", settings={"grpo": {"steps": steps}}, inputs={"policy": "x"}, seed=seed, make=make
    )  # fmt: skip


def in_run(root: Path, calls: list[str], **identity) -> runs.Artifact:
    with opened(root, {}, shared=root.parent / "shared"):
        return ask(root, calls, **identity)


def test_what_another_run_has_made_is_taken_over_with_its_cost(tmp_path):
    calls: list[str] = []
    first, second = in_run(tmp_path / "a", calls), in_run(tmp_path / "b", calls)
    assert calls == ["a"]
    assert second.path == tmp_path / "b" / "grpo-1"
    assert second.manifest == first.manifest
    places = [found.path / "policy" / "weights" for found in (first, second)]
    assert places[0].stat().st_ino == places[1].stat().st_ino
    assert places[0].stat().st_nlink == 3  # one more in the shared place


@pytest.mark.parametrize("changes", [{"steps": 9}, {"seed": 1}])
def test_what_is_made_of_something_else_is_made(tmp_path, changes):
    calls: list[str] = []
    in_run(tmp_path / "a", calls)
    in_run(tmp_path / "b", calls, **changes)
    assert calls == ["a", "b"]


def test_what_other_versions_made_is_made_again(tmp_path, monkeypatch):
    calls: list[str] = []
    in_run(tmp_path / "a", calls)
    monkeypatch.setattr(artifacts, "versions", lambda: {"torch": "0.1"})
    in_run(tmp_path / "b", calls)
    assert calls == ["a", "b"]


def test_a_run_that_shares_nothing_makes_its_own(tmp_path):
    calls: list[str] = []
    in_run(tmp_path / "a", calls)
    with opened(tmp_path / "b", {}):
        ask(tmp_path / "b", calls)
    assert calls == ["a", "b"]


def test_an_attempt_that_was_killed_gives_way_to_what_another_run_has_made_since(tmp_path):
    (tmp_path / "b" / ".grpo-1.partial" / runs.WORK).mkdir(parents=True)
    calls: list[str] = []
    in_run(tmp_path / "a", calls)
    in_run(tmp_path / "b", calls)
    assert calls == ["a"]
    assert not list((tmp_path / "b").glob(".*.partial"))


def test_what_a_run_had_made_before_it_was_killed_is_shared_when_it_goes_on(tmp_path):
    calls: list[str] = []
    with opened(tmp_path / "a", {}):
        ask(tmp_path / "a", calls)  # killed before it was left in the shared place
    in_run(tmp_path / "a", calls)
    in_run(tmp_path / "b", calls)
    assert calls == ["a"]


def test_a_damaged_artifact_is_not_taken_over(tmp_path):
    calls: list[str] = []
    made = in_run(tmp_path / "a", calls)
    (made.path / "policy" / "weights").write_bytes(b"abd")
    with pytest.raises(RunError, match=r"shared/grpo-1-.*weights: damaged"):
        in_run(tmp_path / "b", calls)


def test_a_damaged_note_of_the_shared_place_is_told(tmp_path):
    (tmp_path / runs.SHARED).write_text("{")
    with pytest.raises(RunError, match=r"shared\.json: damaged"):
        ask(tmp_path, [])


def _make_slowly(root: Path, made: Path) -> None:
    def make(out: Path) -> dict[str, float]:
        with made.open("a") as file:
            file.write(f"{root.name}\n")
        time.sleep(0.3)
        return {}

    with opened(root, {}, shared=root.parent / "shared"):
        runs.artifact(root / "pool-1", stage="pool-1", settings={}, inputs={}, seed=0, make=make)


def test_two_runs_side_by_side_make_it_once(tmp_path):
    assert end([fork(_make_slowly, tmp_path / name, tmp_path / "made") for name in "ab"]) == [0, 0]
    assert (tmp_path / "made").read_text() in ("a\n", "b\n")
    assert (tmp_path / "a" / "pool-1" / runs.MANIFEST).read_text() == (tmp_path / "b" / "pool-1" / runs.MANIFEST).read_text()


def test_cpu_time_of_an_attempt_that_failed_counts(tmp_path, monkeypatch):
    """The clock of the process ticks 5 s in the first attempt and 7 s in the second."""
    ticks = iter([100.0, 105.0, 200.0, 207.0])
    monkeypatch.setattr(os, "times", lambda: (next(ticks), 0.0, 0.0, 0.0, 0.0))

    def fail(out: Path) -> dict[str, float]:
        raise RunError("the retriever is gone")

    identity = {"stage": "pool-1", "settings": {}, "inputs": {}, "seed": 0}
    with pytest.raises(RunError, match="gone"):
        runs.artifact(tmp_path / "pool-1", make=fail, **identity)
    made = runs.artifact(tmp_path / "pool-1", make=lambda out: {}, **identity)
    assert (made.manifest.cpu_seconds, made.manifest.attempts) == (12.0, 2)
    assert json.loads((made.path / runs.MANIFEST).read_text())["cpu_seconds"] == 12.0
