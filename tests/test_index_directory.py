import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from forking import end, fork
from search_e1 import runs
from search_e1.errors import DataError, RunError
from search_e1.retrieval import directory as directories
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.retrieval.directory import building, read, verify
from search_e1.retrieval.indexes import open_index
from search_e1.types import Passage

PASSAGES = [Passage(id=str(i), title="Bel", text=f"stone {i}") for i in range(3)]
SETTINGS = {"kind": "bm25", "source": "abc"}


def finished(directory: Path) -> directories.IndexManifest:
    with building(directory, SETTINGS) as work:
        passages = work.passages(PASSAGES)
        (work.scratch / "passing").write_text("x")
        (work.path / "sub").mkdir()
        (work.path / "sub" / "scores").write_bytes(b"12345")
        return work.finish("bm25", passages, {"k1": 0.9}, ["numpy"])


def broken_off(directory: Path, error: BaseException) -> None:
    """A build that wrote the passages and a file ``part`` when ``error`` came."""
    with building(directory, SETTINGS) as work:
        work.passages(PASSAGES)
        (work.path / "part").write_text("x")
        raise error


def refusal(directory: Path, kind: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read(directory, kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_finished_index_holds_its_parts_and_nothing_else(tmp_path: Path) -> None:
    made = finished(tmp_path / "index")
    assert read(tmp_path / "index") == read(tmp_path / "index", "bm25") == made
    parts = {"passages.jsonl", "passages.json", "offsets.npy", "sub/scores"}
    assert set(made.files) == parts
    assert made.files["sub/scores"] == 5
    assert made.passages == 3
    assert {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()} == {
        f"index/{name}" for name in (*parts, "manifest.json", "manifest.json.sha256")
    }


def test_the_checksum_is_of_what_answers_depend_on(tmp_path: Path) -> None:
    def checksum(name: str, corpus: list[Passage] = PASSAGES, **settings: object) -> str:
        with building(tmp_path / name, None) as work:
            return work.finish("bm25", work.passages(corpus), settings).checksum

    assert checksum("a", k1=0.9) == checksum("b", k1=0.9)
    assert len({checksum("c", k1=0.9), checksum("d", k1=1.0), checksum("e", PASSAGES[:2], k1=0.9)}) == 3


def test_an_interrupted_build_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        broken_off(tmp_path / "index", KeyboardInterrupt())
    assert "not finished; run its" in refusal(tmp_path / "index")

    def untouched() -> Iterator[Passage]:
        raise AssertionError("the corpus is read again")
        yield

    with building(tmp_path / "index", SETTINGS) as work:
        assert list(work.passages(untouched())) == PASSAGES


def test_a_killed_build_goes_on(tmp_path: Path) -> None:
    """SIGKILL while the scores are written: nothing under the index's name; the next run ends where it would have."""

    def build() -> None:
        with building(tmp_path / "index", SETTINGS) as work:
            work.passages(PASSAGES)
            (work.path / "part").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)

    assert end([fork(build)]) == [-signal.SIGKILL]
    assert not (tmp_path / "index").exists()
    with building(tmp_path / "index", SETTINGS) as work:
        assert (work.path / "part").read_text() == "x"
        assert list(work.passages([])) == PASSAGES


@pytest.mark.parametrize("settings", [{**SETTINGS, "source": "other"}, None])
def test_another_build_starts_over(tmp_path: Path, settings: dict | None) -> None:
    with pytest.raises(KeyboardInterrupt):
        broken_off(tmp_path / "index", KeyboardInterrupt())
    with building(tmp_path / "index", settings) as work:
        assert not (work.path / "part").exists()


@pytest.mark.parametrize(("settings", "error"), [(SETTINGS, DataError("c.jsonl:3: not JSON")), (None, KeyboardInterrupt())])
def test_what_cannot_be_gone_on_with_is_removed(tmp_path: Path, settings: dict | None, error: BaseException) -> None:
    with pytest.raises(type(error)), building(tmp_path / "index", settings):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_keeps_what_was_written(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        broken_off(tmp_path / "index", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert str(caught.value) == (
        f"{tmp_path / 'index'}: the disk is full; finished work is kept: run the same command again once this is fixed"
    )
    assert not (tmp_path / "index").exists()
    with building(tmp_path / "index", SETTINGS) as work:
        assert list(work.passages([])) == PASSAGES


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunError, match=r"index: Not a directory; give a directory"),
        building(tmp_path / "file" / "index", SETTINGS),
    ):
        raise AssertionError


def test_one_process_builds(tmp_path: Path) -> None:
    with building(tmp_path / "index", SETTINGS):
        holder = json.loads((tmp_path / ".index.unfinished" / ".holder.json").read_text())
        assert holder["pid"] == os.getpid()
        with (
            pytest.raises(RunError, match=rf"/index: process {os.getpid()} on .* is using it"),
            building(tmp_path / "index", None),
        ):
            raise AssertionError


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "mine").write_text("x")
    with pytest.raises(RunError, match="already exists"), building(tmp_path / "index", SETTINGS):
        raise AssertionError
    assert (tmp_path / "index" / "mine").read_text() == "x"


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    assert "not an index" in refusal(tmp_path / "none")
    assert "not an index" in refusal(tmp_path)
    (tmp_path / "manifest.json").write_text('{"stage": "grpo-1"}')
    assert "not an index" in refusal(tmp_path)


def test_another_version_or_kind_and_damage_are_refused(tmp_path: Path) -> None:
    made = tmp_path / "index"
    finished(made)
    assert "a bm25 index where a dense index is needed" in refusal(made, "dense")
    (made / "sub" / "scores").write_bytes(b"123")
    assert "a damaged index (sub/scores is 3 bytes long, not 5)" in refusal(made)
    (made / "sub" / "scores").unlink()
    assert "a damaged index (sub/scores is missing)" in refusal(made)
    manifest = json.loads((made / "manifest.json").read_text())
    (made / "manifest.json").write_text(json.dumps({**manifest, "passages": "many"}))
    assert "manifest.json: damaged" in refusal(made)
    (made / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    assert "an index of format 99, but this version reads 2" in refusal(made)


@pytest.mark.parametrize("name", ["sub/scores", "passages.jsonl", "offsets.npy", "manifest.json", "manifest.json.sha256"])
def test_a_flipped_bit_is_noticed_before_an_index_is_used(tmp_path: Path, name: str) -> None:
    finished(tmp_path / "index")
    verify(tmp_path / "index")
    file = tmp_path / "index" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged|not an index"):
        verify(tmp_path / "index")


def test_an_index_is_opened_by_its_kind(tmp_path: Path) -> None:
    Bm25Index.build(PASSAGES, tmp_path / "index")
    assert isinstance(open_index(tmp_path / "index"), Bm25Index)
    manifest = tmp_path / "index" / "manifest.json"
    runs.write_summed(manifest, manifest.read_text().replace('"kind": "bm25"', '"kind": "sparse"'))
    with pytest.raises(DataError, match="unknown kind 'sparse'"):
        open_index(tmp_path / "index")
