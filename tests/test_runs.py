"""The run directory: complete or not there, returned and not made again, refused when something else lies there."""

import json
import multiprocessing
import os
import random
import shutil
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_e1 import runs
from search_e1.errors import RunError
from search_e1.runs import artifacts
from search_e1.runs.checkpoints import Lines
from search_e1.runs.opening import opened
from search_e1.runs.safe import is_name
from search_e1.runs.stage_id import StageId


def make_once(calls: list[int]):
    def make(out: Path) -> dict[str, float]:
        calls.append(1)
        (out / "policy").mkdir()
        (out / "policy" / "weights").write_bytes(b"abc")
        return {"em": 0.5}

    return make


def ask(path: Path, calls: list[int], **changes) -> runs.Artifact:
    identity = {"stage": "grpo-1", "settings": {"grpo": {"steps": 8}}, "inputs": {"policy": "x"}, "seed": 0} | changes
    return runs.artifact(path, make=make_once(calls), **identity)


def test_a_complete_artifact_is_returned_and_not_made_again(tmp_path):
    calls: list[int] = []
    first = ask(tmp_path / "grpo-1", calls)
    second = ask(tmp_path / "grpo-1", calls)
    assert len(calls) == 1
    assert second.manifest == first.manifest
    assert second.manifest.result == {"em": 0.5}
    # sha256 of b"abc", from FIPS 180-2
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert second.manifest.files == {"policy/weights": abc}
    assert second.manifest.versions["torch"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"grpo": {"steps": 9}}}, r"\n  grpo\.steps: was 8, now 9"),
        ({"inputs": {"policy": "y"}}, r'\n  inputs\.policy: was "x", now "y"'),
        ({"seed": 1}, r"\n  seed: was 0, now 1"),
    ],
)
def test_another_identity_is_refused_and_named(tmp_path, changes, said):
    calls: list[int] = []
    ask(tmp_path / "grpo-1", calls)
    with pytest.raises(RunError, match=said):
        ask(tmp_path / "grpo-1", calls, **changes)
    assert len(calls) == 1


def test_a_stage_that_fails_leaves_nothing_that_looks_complete(tmp_path):
    def fails(out: Path) -> dict:
        (out / "half").write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        runs.artifact(tmp_path / "pool-1", stage="pool-1", settings={}, inputs={}, seed=0, make=fails)
    assert not (tmp_path / "pool-1").exists()
    made = runs.artifact(tmp_path / "pool-1", stage="pool-1", settings={}, inputs={}, seed=0, make=lambda out: {})
    assert made.manifest.files == {}  # the half file of the first try is gone


class Killed(BaseException):
    pass


def half_made(path: Path, seed: int = 0) -> None:
    """A stage that was killed after a chunk of lines and a file."""

    def make(out: Path) -> dict:
        (out / runs.WORK / "step-0000000003").mkdir()
        Lines(out / "groups.jsonl", out / runs.WORK / "groups.jsonl.journal").append(["a group"])
        (out / "half").write_text("half")
        raise Killed

    with pytest.raises(Killed):
        runs.artifact(path, stage="pool-1", settings={}, inputs={}, seed=seed, make=make)


def go_on(path: Path, seed: int = 0) -> tuple[runs.Artifact, list[str]]:
    """Makes the same; also what it found."""
    found: list[str] = []

    def make(out: Path) -> dict:
        found.extend(str(p.relative_to(out)) for p in sorted(out.rglob("*")))
        return {}

    return runs.artifact(path, stage="pool-1", settings={}, inputs={}, seed=seed, make=make), found


def test_a_killed_stage_goes_on_from_what_it_kept_and_from_nothing_else(tmp_path):
    half_made(tmp_path / "pool-1")
    made, found = go_on(tmp_path / "pool-1")
    work = [".work", ".work/begun.json", ".work/groups.jsonl.journal", ".work/step-0000000003"]
    assert found == [*work, "groups.jsonl"]
    assert list(made.manifest.files) == ["groups.jsonl"]
    assert made.manifest.attempts == 2
    left = ["groups.jsonl", "manifest.json", "manifest.json.sha256", "pool-1"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == left


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("seed", "pool-1.partial: begun with other settings or inputs; starting over:\n  seed: was 0, now 1"),
        ("versions", "\n  versions.torch: "),
        ("torn", None),
    ],
)
def test_what_was_kept_for_something_else_is_not_used_and_that_is_said(tmp_path, monkeypatch, caplog, change, says):
    half_made(tmp_path / "pool-1")
    begun = tmp_path / ".pool-1.partial" / runs.WORK / "begun.json"
    if change == "versions":
        monkeypatch.setattr(artifacts, "versions", lambda: {"torch": "0.1"})
    if change == "torn":
        begun.write_text(begun.read_text()[:-9])
    made, found = go_on(tmp_path / "pool-1", seed=1 if change == "seed" else 0)
    assert found == [".work", ".work/begun.json"]
    assert made.manifest.attempts == 1
    assert [says in record.getMessage() for record in caplog.records] == ([True] if says else [])


def test_a_key_that_came_to_the_package_does_not_undo_what_was_kept(tmp_path, caplog):
    """As with a complete artifact, if it stands at its default."""
    half_made(tmp_path / "pool-1")

    def make(out: Path) -> dict:
        assert (out / runs.WORK / "step-0000000003").exists()
        return {}

    new = dict(stage="pool-1", settings={"new": 1}, inputs={}, seed=0)
    runs.artifact(tmp_path / "pool-1", **new, make=make, defaults=lambda path: {("new",): 1}[path])
    assert not caplog.records


def test_the_time_of_all_attempts_adds_up(tmp_path, monkeypatch):
    """A killed attempt counts up to the last that it wrote."""
    half_made(tmp_path / "pool-1")
    partial = tmp_path / ".pool-1.partial"
    begun = json.loads((partial / runs.WORK / "begun.json").read_text())
    for path in (*partial.rglob("*"), partial):
        os.utime(path, (begun["attempt"], begun["attempt"]))
    os.utime(partial / "half", (begun["attempt"] + 100, begun["attempt"] + 100))
    clock = iter([5.0, 12.0])
    monkeypatch.setattr(artifacts.time, "perf_counter", lambda: next(clock))
    made, _ = go_on(tmp_path / "pool-1")
    assert made.manifest.seconds == 107.0
    assert made.manifest.started == begun["started"]


def test_a_kill_after_the_artifact_got_its_name_leaves_nothing_behind(tmp_path):
    made, _ = go_on(tmp_path / "pool-1")
    (made.path / runs.WORK).mkdir()
    (made.path / runs.WORK / "step-0000000003").mkdir()
    assert go_on(tmp_path / "pool-1")[0].manifest == made.manifest
    assert not (made.path / runs.WORK).exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_noticed(tmp_path, damage):
    ask(tmp_path / "grpo-1", [])
    file = tmp_path / "grpo-1" / "policy" / "weights"
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(b"abd" if damage == "flip" else b"ab")
    with pytest.raises(RunError, match=r"policy/weights: (damaged|missing)"):
        ask(tmp_path / "grpo-1", [])


def test_a_directory_of_another_config_is_refused_and_untouched(tmp_path):
    with opened(tmp_path / "run", {"grpo": {"steps": 8}, "seed": 0}) as root:
        ask(root / "grpo-1", [])
    before = (tmp_path / "run" / "config.json").read_text()
    with (
        pytest.raises(RunError, match=r"\n  grpo\.steps: was 8, now 16"),
        opened(tmp_path / "run", {"grpo": {"steps": 16}, "seed": 0}),
    ):
        pass
    assert (tmp_path / "run" / "config.json").read_text() == before
    assert json.loads(before) == {"grpo": {"steps": 8}, "seed": 0}


def test_a_config_can_be_mended_until_something_was_made(tmp_path):
    with opened(tmp_path / "run", {"seed": 0}) as root:
        runs.artifact(root / "index", stage="index", settings={}, inputs={}, seed=0, make=lambda out: {})
    with opened(tmp_path / "run", {"seed": 1}) as root:
        assert json.loads((root / "config.json").read_text()) == {"seed": 1}


def test_a_second_process_is_refused(tmp_path):
    context = multiprocessing.get_context("spawn")
    with opened(tmp_path / "run", {}):
        queue = context.Queue()
        process = context.Process(target=_try_to_open, args=(tmp_path / "run", queue))
        process.start()
        assert f"process {os.getpid()} on {socket.gethostname()} (since " in queue.get(timeout=60)
        process.join()
    with opened(tmp_path / "run", {}):
        assert (tmp_path / "run" / "config.json").exists()


def _try_to_open(directory: Path, queue) -> None:
    try:
        with opened(directory, {}):
            queue.put("opened")
    except RunError as error:
        queue.put(str(error))


def test_a_run_directory_that_is_a_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunError, match="directory that can be written to"), opened(tmp_path / "run", {}):
        pass


def test_damage_at_random_places_is_always_noticed(tmp_path):
    """The short form of ``benchmarks/damage.py``; any byte of any file, the manifest and its checksum among them."""
    made = ask(tmp_path / "grpo-1", [])
    files, dice = sorted(file for file in made.path.rglob("*") if file.is_file()), random.Random(0)
    assert {file.name for file in files} == {"weights", "manifest.json", "manifest.json.sha256"}
    for _ in range(60):
        file = dice.choice(files)
        whole = file.read_bytes()
        at, damaged = dice.randrange(len(whole)), bytearray(whole)
        if dice.random() < 0.5:
            del damaged[at:]
        else:
            damaged[at] ^= 1 << dice.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(RunError, match="damaged"):
            ask(tmp_path / "grpo-1", [])
        file.write_bytes(whole)
    assert ask(tmp_path / "grpo-1", []).manifest == made.manifest


def test_a_policy_in_an_artifact_is_verified_when_its_checksum_is_asked_for(tmp_path):
    """And it has the checksum that it would have anywhere."""
    made = ask(tmp_path / "grpo-1", [])
    shutil.copytree(made.path / "policy", tmp_path / "elsewhere")
    assert runs.checksum(made.path / "policy") == runs.checksum(tmp_path / "elsewhere")
    (made.path / "policy" / "weights").write_bytes(b"abd")
    with pytest.raises(RunError, match="policy/weights: damaged"):
        runs.checksum(made.path / "policy")


def test_seeds_are_derived_per_stage_and_stable():
    assert runs.derived_seed(0, "grpo-1") == runs.derived_seed(0, "grpo-1")
    assert len({runs.derived_seed(s, n) for s in range(3) for n in ("grpo-1", "pool-1", "ofsd-1")}) == 9


def test_the_checksum_of_a_directory_is_that_of_what_it_does(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    first = runs.checksum(tmp_path)
    (tmp_path / "README.md").write_text("a model card")
    assert runs.checksum(tmp_path) == first
    (tmp_path / "config.json").write_text("{ }")
    assert runs.checksum(tmp_path) != first


TRAINED = st.builds(StageId, st.sampled_from(["grpo", "pool", "pairs", "lead", "ofsd"]), st.integers(1, 10**6))
ALONE = st.builds(StageId, st.sampled_from(["index", "recall", "coldstart"]))
EVALUATED = st.text(min_size=1, max_size=20).filter(is_name) | TRAINED.map(str)


@given(TRAINED | ALONE | st.builds(StageId, st.just("evaluation"), of=EVALUATED))
def test_the_name_of_a_stage_and_back(id):
    assert StageId.parse(str(id)) == id


@pytest.mark.parametrize(
    ("name", "id", "subject"),
    [
        ("grpo-2", StageId("grpo", 2), ""),
        ("index", StageId("index"), ""),
        ("evaluation-base", StageId("evaluation", of="base"), "base"),
        ("evaluation-ofsd-1", StageId("evaluation", of="ofsd-1"), "ofsd-1"),
        ("evaluation-my-model-7", StageId("evaluation", of="my-model-7"), "my-model-7"),
    ],
)
def test_names_of_stages(name, id, subject):
    assert (StageId.parse(name), str(id), str(id.subject)) == (id, name, subject)
