"""Opening a run directory: one process, one config, one set of versions; what changed is told, and can be branched off."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from search_e1 import runs
from search_e1.config import Config, default_of, migrate_fingerprint
from search_e1.errors import RunError
from search_e1.runs import artifacts, disk, locks
from search_e1.runs.drift import Change, changes, lines
from search_e1.runs.opening import opened

CONFIG = {"seed": 0}


def make(out: Path) -> dict:
    (out / "policy").mkdir()
    (out / "policy" / "weights").write_bytes(b"abc")
    return {"em": 0.5}


def stage(root: Path, name: str, settings: dict, calls: list[str] | None = None, **inputs: str) -> runs.Artifact:
    def noted(out: Path) -> dict:
        (calls if calls is not None else []).append(name)
        return make(out)

    return runs.artifact(root / name, stage=name, settings=settings, inputs=inputs, seed=0, make=noted, defaults=default_of)


# What differs


def test_what_differs_is_told_a_line_a_key():
    there = {"seed": 0, "grpo": {"steps": 8, "gone": 1}, "inputs": {"policy": "a" * 64}}
    given = {"seed": 0, "grpo": {"steps": 16, "new": [2]}, "inputs": {"policy": "b" * 64}}
    found = changes(there, given)
    assert [change.key for change in found] == ["grpo.gone", "grpo.new", "grpo.steps", "inputs.policy"]
    assert found[2] == Change("grpo.steps", 8, 16)
    assert lines(found).splitlines() == [
        "",
        "  grpo.gone: was 1, now not set",
        "  grpo.new: was not set, now [2]",
        "  grpo.steps: was 8, now 16",
        "  inputs.policy: was aaaaaaaaaaaa, now bbbbbbbbbbbb",
    ]


@pytest.mark.parametrize(
    ("path", "default"),
    [
        (("seed",), 0),
        (("grpo", "lora"), None),
        (("grpo", "lora", "alpha"), 32),
        (("lead", "gate"), "mean"),
        (("data", "max_eval"), None),
        (("reference",), {"shows": "whole", "max_tokens": None, "shorten": "passages"}),
    ],
)
def test_defaults_of_keys(path, default):
    assert default_of(path) == default


@pytest.mark.parametrize("path", [("run",), ("policy", "model"), ("data", "eval", "nq"), ("data", "train"), ("x",)])
def test_what_has_no_default(path):
    with pytest.raises(LookupError):
        default_of(path)


def bound(**changes: Any) -> dict[str, Any]:
    raw = {
        "run": "r", "policy": {"model": "small"}, "data": {"corpus": "c", "train": ["t"], "eval": {"nq": "e"}},
        "grpo": {"lora": {"rank": 4}}, **changes,
    }  # fmt: skip
    return Config.model_validate(raw).fingerprint()


def test_a_run_of_an_earlier_version_goes_on_where_the_new_keys_stand_at_their_defaults(tmp_path):
    """Its config and its artifacts lack some keys, and hold one that no longer binds."""
    now, old = bound(), bound()
    del old["grpo"]["lora"]["alpha"], old["lead"]["gate"], old["reference"]
    old["retrieval"]["attempts"] = 4
    with opened(tmp_path, old) as root:
        stage(root, "grpo-1", {"grpo": old["grpo"]})
    calls: list[str] = []
    with opened(tmp_path, now, migrate=migrate_fingerprint) as root:
        stage(root, "grpo-1", {"grpo": now["grpo"], "reference": now["reference"], "data.max_eval": None}, calls)
    assert not calls
    other = bound(grpo={"lora": {"rank": 4, "alpha": 8}}, data={"corpus": "c", "train": ["t"], "eval": {"pop": "e"}})
    with pytest.raises(RunError) as caught, opened(tmp_path, other, migrate=migrate_fingerprint):
        pass
    assert str(caught.value).splitlines()[1:] == [
        '  data.eval.nq: was "e", now not set',
        '  data.eval.pop: was not set, now "e"',
        "  grpo.lora.alpha: was 32, now 8",
    ]
    with pytest.raises(RunError, match=r"\n  data\.max_eval: was not set, now 5$"):
        stage(tmp_path, "grpo-1", {"grpo": now["grpo"], "data.max_eval": 5})


# Versions


def test_other_versions_are_refused_until_they_are_allowed(tmp_path, monkeypatch):
    with opened(tmp_path, CONFIG) as root:
        stage(root, "grpo-1", {})
    new = {**runs.versions(), "torch": "99.0"}
    monkeypatch.setattr(artifacts, "versions", lambda: new)
    said = r"install those.*--other-versions.*\n  torch: was \"[^9].*\", now \"99.0\"$"
    with pytest.raises(RunError, match=said), opened(tmp_path, CONFIG):
        pass
    with opened(tmp_path, CONFIG, other_versions=True):
        pass
    with opened(tmp_path, CONFIG):  # they were accepted
        pass


def test_without_a_note_of_versions_the_last_artifact_tells(tmp_path, monkeypatch):
    with opened(tmp_path, CONFIG) as root:
        stage(root, "grpo-1", {})
    (tmp_path / "versions.json").unlink()
    with opened(tmp_path, CONFIG):
        pass
    monkeypatch.setattr(artifacts, "versions", lambda: {"torch": "99.0", "new-package": "1"})
    with pytest.raises(RunError, match=r"\n  torch: .*\"99.0\"$"), opened(tmp_path, CONFIG):
        pass


# Branches


def test_of_a_section_only_the_keys_that_count_are_compared():
    """Earlier versions recorded the whole section; what finished then is not made again."""
    whole = {"lead": {"pairs": 64, "samples": 2, "enforce": True}, "pairs": {"students": 2}}
    assert changes(whole, {"lead.pairs": 64, "pairs": {"students": 2}}) == []
    assert changes(whole, {"lead.pairs": 8, "lead.samples": 2, "pairs": {"students": 2}}) == [Change("lead.pairs", 64, 8)]


def test_a_branch_takes_over_what_the_change_does_not_concern(tmp_path):
    old, new, calls = tmp_path / "old", tmp_path / "new", []
    with opened(old, {"steps": 8}) as root:
        first = stage(root, "grpo-1", {"grpo": {"steps": 8}}, policy="x")
        stage(root, "pool-1", {"pool": {"group_size": 4}}, policy=first.checksum)
    for _ in range(2):  # begun, and gone on with
        with opened(new, {"steps": 9}, branch_of=old) as root:
            again = stage(root, "grpo-1", {"grpo": {"steps": 8}}, calls, policy="x")
            stage(root, "pool-1", {"pool": {"group_size": 5}}, calls, policy=again.checksum)
    assert calls == ["pool-1"]
    assert again.manifest == first.manifest
    weights = [run / "grpo-1" / "policy" / "weights" for run in (old, new)]
    assert weights[0].stat().st_ino == weights[1].stat().st_ino
    assert json.loads((old / "config.json").read_text()) == {"steps": 8}
    with opened(tmp_path / "third", {"steps": 9}, branch_of=new) as root:  # a branch of a branch
        (new / "grpo-1").rename(tmp_path / "gone")
        stage(root, "grpo-1", {"grpo": {"steps": 8}}, calls, policy="x")
    assert calls == ["pool-1"]


def test_a_branch_is_of_the_same_versions(tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    with opened(old, {}) as root:
        stage(root, "grpo-1", {})
    monkeypatch.setattr(artifacts, "versions", lambda: {"torch": "99.0"})
    with pytest.raises(RunError, match=r"/old was begun with other versions"), opened(new, {}, branch_of=old):
        pass
    for allowed in (True, False):  # then these are the branch's own
        with opened(new, {}, branch_of=old, other_versions=allowed):
            pass


def test_a_damaged_artifact_is_not_taken_over(tmp_path):
    with opened(tmp_path / "old", {}) as root:
        stage(root, "grpo-1", {})
    (tmp_path / "old" / "grpo-1" / "policy" / "weights").write_bytes(b"abd")
    with opened(tmp_path / "new", {}, branch_of=tmp_path / "old") as root:
        with pytest.raises(RunError, match="weights: damaged"):
            stage(root, "grpo-1", {})
        assert not (root / "grpo-1").exists()


def test_branches_that_cannot_be(tmp_path):
    with (
        pytest.raises(RunError, match="no run there to branch from"),
        opened(tmp_path / "b", {}, branch_of=tmp_path / "a"),
    ):
        pass
    for name in ("a", "c"):
        with opened(tmp_path / name, {}):
            pass
    with pytest.raises(RunError, match="into its own directory"), opened(tmp_path / "a", {}, branch_of=tmp_path / "a"):
        pass
    with pytest.raises(RunError, match=r"not a branch of .*/a;"), opened(tmp_path / "c", {}, branch_of=tmp_path / "a"):
        pass


# Locks


def test_a_lock_ends_with_its_process(tmp_path):
    """Killed with SIGKILL, so that nothing was tidied up: the note of the holder is still there."""
    code = "import sys, time, pathlib; from search_e1.runs.locks import held\n" \
           "with held(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    said = rf"process {process.pid} on {socket.gethostname()} \(since 20.*\) is using it; wait for it"
    with pytest.raises(RunError, match=said), locks.held(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / ".holder.json").exists()
    with locks.held(tmp_path):
        assert json.loads((tmp_path / ".holder.json").read_text())["pid"] == os.getpid()


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks, as NFS is without its lock daemon."""

    def refuse(self: FileLock) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(FileLock, "_acquire", refuse)


def test_where_there_are_no_locks_a_file_stands_in(tmp_path, no_locks):
    with locks.held(tmp_path):
        with pytest.raises(RunError, match=r"is certainly gone, remove .*\.lock-file\)"), locks.held(tmp_path):
            pass
        marker = (tmp_path / ".lock-file").read_text()
    assert not (tmp_path / ".lock-file").exists()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / ".lock-file").write_text(marker.replace(str(os.getpid()), str(dead.pid), 1))
    with locks.held(tmp_path):
        pass  # left by a process of this machine that is dead
    (tmp_path / ".lock-file").write_text(marker.replace(socket.gethostname(), "another-machine"))
    with pytest.raises(RunError, match="is using it"), locks.held(tmp_path):
        pass


# The disk


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "/runs/x/weights"), r"the disk is full \(/runs/x/weights\)"),
        (OSError(122, "Disk quota exceeded"), "the disk is full"),
        (OSError(30, "Read-only file system", "/runs/x"), r"Read-only file system \(/runs/x\)"),
        (OSError(5, "Input/output error"), "disk I/O error"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "the disk is full"),
        (ValueError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    ],
)
def test_what_the_disk_does_is_told_in_one_line(tmp_path, error, said):
    with (
        pytest.raises(RunError, match=f"^{tmp_path}: {said}; finished work is kept") as caught,
        disk.translate_disk_errors(tmp_path),
    ):
        raise error
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_the_disks(tmp_path):
    with pytest.raises(ZeroDivisionError), disk.translate_disk_errors(tmp_path):
        _ = 1 / 0
    with pytest.raises(FileNotFoundError), disk.translate_disk_errors(tmp_path):
        (tmp_path / "x").read_text()


def test_a_full_disk_harms_nothing_and_the_run_goes_on_once_there_is_room(tmp_path):
    """Files may not grow beyond a limit, so that writing fails as it does on a full disk."""
    code = """if True:
        import resource, signal, sys
        from pathlib import Path
        from search_e1 import runs
        from search_e1.runs.opening import opened

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if sys.argv[2] != "room":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))

        try:
            with opened(Path(sys.argv[1]), {"seed": 0}) as root:
                for name, size in (("first", 3_000), ("second", 50_000)):
                    runs.artifact(root / name, stage=name, settings={}, inputs={}, seed=0,
                                  make=lambda out: (out / "weights").write_bytes(b"w" * size) and {})
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
    """

    def run(limit: int | str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), str(limit)], capture_output=True, text=True, check=True
        ).stdout

    for limit in (2_000, 20_000):  # the first one does not fit; the second one does not
        said = run(limit)
        assert said.startswith(f"RunError: {tmp_path}: the disk is full")
        assert said.count("\n") == 1
        assert not (tmp_path / "second").exists()
    first = runs.read(tmp_path / "first")
    assert run("room") == ""
    assert runs.read(tmp_path / "first") == first
    assert runs.read(tmp_path / "second").manifest.attempts == 2
