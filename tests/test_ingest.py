"""A folder becomes a corpus, and the corpus follows the folder."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import made_documents as made
from search_e1.cli.main import app
from search_e1.data.corpus import Corpus
from search_e1.data.documents import ingest as ingesting
from search_e1.data.documents import workers
from search_e1.data.documents.folder import walk
from search_e1.data.documents.ingest import Report, ingest
from search_e1.data.documents.passages import Cutting
from search_e1.data.documents.store import FILE
from search_e1.data.documents.workers import Limits, read_all
from search_e1.errors import ConfigError, DataError, RunError

ENGLISH = Cutting(language="en")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files are read in this process, which starts at once; the names of those that were, in order."""
    read: list[str] = []

    def in_this_process(files: Any, cutting: Cutting, limits: Limits, processes: int) -> Iterator[Any]:
        for file in files:
            read.append(file.name)
            yield file, workers.read_file(file, cutting, limits)

    monkeypatch.setattr(ingesting, "read_all", in_this_process)
    return read


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.md").write_text("# Alpha\n\nFirst text.\n\n## Beta\n\nSecond text.\n")
    (folder / "sub" / "b.txt").write_text("Third text.")
    (folder / "sub" / "empty.txt").write_text("")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8")
    return folder


def run(docs: Path, out: Path, **options: Any) -> Report:
    return ingest([docs], out, options.pop("cutting", ENGLISH), options.pop("limits", None), **options)


def texts(out: Path) -> list[tuple[str, str]]:
    return [(passage.title, passage.text) for passage in Corpus(out)]


def reasons(out: Path) -> dict[str, tuple[str, str]]:
    with (out / "skipped.txt").open() as file:
        return {row["file"]: (row["status"], row["reason"]) for row in csv.DictReader(file, delimiter="\t")}


def test_a_folder_becomes_a_corpus(docs: Path, tmp_path: Path, here: list[str]) -> None:
    out = tmp_path / "corpus"
    report = run(docs, out)
    assert texts(out) == [("Alpha", "First text."), ("Alpha > Beta", "Second text."), ("b.txt", "Third text.")]
    second = list(Corpus(out))[1]
    assert second.metadata == {"start": 31, "end": 43, "language": "en", "file": "a.md", "heading": "Beta"}
    assert report.passages == {"markdown": 2, "text": 1}
    assert {name: dict(counter) for name, counter in report.counts.items() if counter.total()} == {
        "read": {"markdown": 1, "text": 1}, "empty": {"text": 1}, "skipped": {"other": 1},
    }  # fmt: skip
    assert reasons(out) == {
        "photo.jpg": ("skipped", ".jpg files are not supported"),
        "sub/empty.txt": ("empty", "no text in it"),
    }


def test_a_second_run_reads_what_changed_and_drops_what_is_gone(docs: Path, tmp_path: Path, here: list[str]) -> None:
    out = tmp_path / "corpus"
    run(docs, out)
    before, written = {p.text: p.id for p in Corpus(out)}, (out / "passages.jsonl").stat().st_mtime_ns
    here.clear()
    report = run(docs, out)
    assert (here, report.changed, report.counts["unchanged"].total()) == ([], False, 2)
    assert (out / "passages.jsonl").stat().st_mtime_ns == written
    os.utime(docs / "a.md", ns=(1, 1))  # another time, the same content
    assert not run(docs, out).changed
    (docs / "a.md").write_text("# Alpha\n\nFirst text.\n\n## Beta\n\nNew text.\n")
    (docs / "sub" / "b.txt").unlink()
    report = run(docs, out)
    assert (here, report.removed, report.changed) == (["a.md"], 1, True)
    assert texts(out) == [("Alpha", "First text."), ("Alpha > Beta", "New text.")]
    assert next(iter(Corpus(out))).id == before["First text."]


def test_other_settings_read_all_again_and_other_limits_what_failed(docs: Path, tmp_path: Path, here: list[str]) -> None:
    out = tmp_path / "corpus"
    (docs / "bad.docx").write_bytes(b"nothing")
    run(docs, out)
    here.clear()
    run(docs, out)
    assert here == []
    run(docs, out, limits=Limits(seconds=5))
    assert here == ["bad.docx"]
    here.clear()
    assert run(docs, out, cutting=Cutting(words=50, language="en")).all_again
    assert here == ["a.md", "bad.docx", "sub/b.txt", "sub/empty.txt"]


def test_an_interrupted_run_goes_on_where_it_was_and_leaves_the_corpus_as_it_was(
    docs: Path, tmp_path: Path, here: list[str]
) -> None:
    out = tmp_path / "corpus"
    run(docs, out)
    before = texts(out)
    (docs / "c.md").write_text("Fourth text.")
    (docs / "d.md").write_text("Fifth text.")
    here.clear()

    def interrupt(done: int, total: int, figure: str = "") -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(docs, out, progress=interrupt)
    assert (here, texts(out)) == (["c.md"], before)
    run(docs, out)
    assert here == ["c.md", "d.md"]
    assert ("d.md", "Fifth text.") in texts(out)
    assert ("c.md", "Fourth text.") in texts(out)


def test_the_same_content_is_read_once_wherever_it_moves(docs: Path, tmp_path: Path, here: list[str]) -> None:
    out = tmp_path / "corpus"
    (docs / "z.txt").write_text("Third text.")
    report = run(docs, out)
    assert "z.txt" not in here
    assert report.counts["duplicate"] == {"text": 1}
    assert reasons(out)["z.txt"] == ("duplicate", "the same content as sub/b.txt")
    here.clear()
    assert not run(docs, out).changed
    (docs / "0.txt").write_text("Third text.")  # sorts before the one that was read, whose ids stay
    run(docs, out)
    assert (here, reasons(out)["0.txt"][1]) == ([], "the same content as sub/b.txt")
    (docs / "sub" / "b.txt").unlink()
    run(docs, out)
    assert here == ["0.txt"]
    assert ("0.txt", "Third text.") in texts(out)


def test_links_loops_hidden_names_and_the_corpus_itself(docs: Path, here: list[str]) -> None:
    out = docs / "corpus"
    (docs / "sub" / "loop").symlink_to(docs)
    (docs / "gone").symlink_to(docs / "nowhere")
    (docs / "link.md").symlink_to(docs / "a.md")
    (docs / ".git").mkdir()
    os.mkfifo(docs / "pipe.txt")
    (docs / "übersicht 東京.txt").write_text("Viertens.")
    (docs / os.fsdecode(b"caf\xe9.txt")).write_text("Fünftens.")
    run(docs, out)
    run(docs, out)
    assert here == ["a.md", "caf\\xe9.txt", "sub/b.txt", "sub/empty.txt", "übersicht 東京.txt"]
    told = reasons(out)
    assert told["sub/loop"][1] == "a symbolic link to a folder that is read already"
    assert told["gone"][1] == "a symbolic link that leads nowhere"
    assert told["link.md"] == ("duplicate", "the same content as a.md")
    assert told[".git"][1] == "hidden"
    assert told["pipe.txt"][1] == "not a regular file"
    assert "corpus" not in told


def test_limits_exclusions_and_a_file_that_changes_meanwhile(docs: Path, tmp_path: Path, here: list[str]) -> None:
    out = tmp_path / "corpus"
    (docs / "large.txt").write_text("word " * 500_000)
    (docs / "moving.txt").write_text("before")

    def change(done: int, total: int, figure: str = "") -> None:
        (docs / "moving.txt").write_text("after it was looked at")

    run(docs, out, limits=Limits(file_mib=1), exclude=["sub/*"], progress=change)
    told = reasons(out)
    assert told["large.txt"][1] == "2 MiB, more than --max-file-mib 1"
    assert told["sub/b.txt"][1] == "excluded"
    assert told["moving.txt"][1] == "changed while it was read; run the same command again"
    run(docs, out, exclude=["sub/*"], limits=Limits(file_mib=1))
    assert ("moving.txt", "after it was looked at") in texts(out)


def test_several_folders_go_by_their_names(docs: Path, tmp_path: Path, here: list[str]) -> None:
    other = tmp_path / "more"
    other.mkdir()
    (other / "a.md").write_text("Other.")
    ingest([docs, other], tmp_path / "corpus", ENGLISH)
    assert {passage.metadata["file"] for passage in Corpus(tmp_path / "corpus")} == {"docs/a.md", "docs/sub/b.txt", "more/a.md"}
    walked = walk([docs, other], tmp_path / "corpus", ["sub/*"])
    assert {file.name for file in walked.files} == {"docs/a.md", "more/a.md"}
    with pytest.raises(ConfigError, match="folders of the same name"):
        walk([docs, tmp_path / "x" / "docs"], tmp_path / "corpus")


def test_what_cannot_work_is_refused_before_anything_is_written(docs: Path, tmp_path: Path, here: list[str]) -> None:
    out, empty = tmp_path / "corpus", tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="empty: an empty folder"):
        run(empty, out)
    with pytest.raises(DataError, match="no such folder"):
        run(tmp_path / "nowhere", out)
    with pytest.raises(ConfigError, match="this is the folder being read"):
        run(docs, docs)
    with pytest.raises(ConfigError, match="overlap 100: give less than --words 100"):
        run(docs, out, cutting=Cutting(overlap=100))
    with pytest.raises(ConfigError, match="holds something other than a corpus"):
        run(empty, docs)
    assert not out.exists()


def test_a_folder_that_lost_all_its_text_leaves_the_corpus(docs: Path, tmp_path: Path, here: list[str]) -> None:
    out = tmp_path / "corpus"
    run(docs, out)
    (docs / "a.md").unlink()
    (docs / "sub" / "b.txt").unlink()
    with pytest.raises(DataError, match=r"none of 2 files has any text"):
        run(docs, out)
    assert len(texts(out)) == 3


def test_a_damaged_store_says_so(docs: Path, tmp_path: Path, here: list[str]) -> None:
    out = tmp_path / "corpus"
    run(docs, out)
    (out / FILE).write_bytes(b"x" * 8192)
    with pytest.raises(DataError, match=r"\.ingest\.sqlite: damaged .*; remove it to read all files again"):
        run(docs, out)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ingesting, "find_spec", lambda name: None if name == "markitdown" else object())
    with pytest.raises(ConfigError, match=r"needs markitdown; install it with .*`pip install -e '.\[documents\]'`"):
        run(tmp_path, tmp_path / "corpus")


def test_a_parser_that_hangs_or_crashes_costs_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_serve", made.serve_badly)
    for name in ("1.txt", "crash.txt", "hang.txt", "last.txt"):
        (tmp_path / name).write_text(f"Text of {name}.")
    files = walk([tmp_path], tmp_path / "corpus").files
    outcomes = {file.name: outcome for file, outcome in read_all(files, ENGLISH, Limits(seconds=6), 2)}
    assert {name: outcome.reason for name, outcome in outcomes.items()} == {
        "1.txt": "", "crash.txt": "the process that read it was killed by SIGSEGV",
        "hang.txt": "took longer than --time-limit 6 s", "last.txt": "",
    }  # fmt: skip
    assert outcomes["last.txt"].passages == 1


def test_the_command_shows_a_row_for_each_kind(docs: Path, tmp_path: Path, here: list[str]) -> None:
    out = tmp_path / "corpus"
    result = CliRunner().invoke(app, ["data", "ingest", str(docs), "--out", str(out), "--language", "en"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert ["kind", "files", "read", "unchanged", "duplicate", "empty", "skipped", "passages", "s"] in lines
    assert [line[:-1] for line in lines if line and line[0] in ("markdown", "text", "all")] == [
        ["markdown", "1", "1", "0", "0", "0", "0", "2"],
        ["text", "2", "1", "0", "0", "1", "0", "1"],
        ["all", "4", "2", "0", "0", "1", "1", "3"],
    ]
    assert "skipped: photo.jpg: .jpg files are not supported" in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines() if str(tmp_path) not in line)
    record = json.loads((out / "passages.jsonl").read_text().splitlines()[0])
    assert (record["title"], record["file"]) == ("Alpha", "a.md")


def test_a_reader_that_dies_at_startup_is_reported_in_one_line(docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_serve", made.die_at_startup)
    with pytest.raises(RunError, match=r"^a reader process ended with status 3 at startup; raise --memory-mib or lower"):
        list(read_all(walk([docs], docs / "out").files, ENGLISH, Limits(), 1))
