"""What outlives a kill: the newest whole checkpoint, whole chunks of lines; and stopping on a signal."""

import os
import random
import signal
from pathlib import Path

import pytest

from search_e1.runs.checkpoints import Checkpointer, Lines
from search_e1.runs.stopping import Stop, Stopped, on_signals


def writing(text: str):
    def write(directory: Path) -> None:
        (directory / "state").write_text(text)
        (directory / "other").write_text(text * 2)

    return write


@pytest.fixture
def work(tmp_path) -> Checkpointer:
    """Saves at every step."""
    work = Checkpointer(tmp_path, every_seconds=0.0, share=1.0)
    work._cost = 0.0
    return work


def save(work: Checkpointer, *steps: int) -> None:
    for step in steps:
        work._save(step, writing(f"state of {step}"))


def test_the_newest_checkpoint_is_given_and_only_two_are_kept(work, tmp_path):
    assert work.newest() is None
    save(work, 1, 2, 10)
    newest = Checkpointer(tmp_path).newest()
    assert newest
    assert (newest / "state").read_text() == "state of 10"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000000002", "step-0000000010"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "add", "sums", "no sums"])
def test_a_damaged_checkpoint_is_dropped_for_the_one_before(work, tmp_path, damage, caplog):
    save(work, 1, 2)
    newest = tmp_path / "step-0000000002"
    {
        "flip": lambda: (newest / "state").write_text("state of 3"),
        "truncate": lambda: (newest / "other").write_text("state"),
        "remove": lambda: (newest / "other").unlink(),
        "add": lambda: (newest / "more").write_text(""),
        "sums": lambda: (newest / "sha256.json").write_text("{"),
        "no sums": lambda: (newest / "sha256.json").unlink(),
    }[damage]()
    assert Checkpointer(tmp_path).newest() == tmp_path / "step-0000000001"
    assert not newest.exists()
    assert caplog.messages == [f"{newest}: damaged checkpoint removed; training resumes from the one before, if there is one"]


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed(work, tmp_path):
    dice = random.Random(0)
    save(work, 1)
    files = sorted((tmp_path / "step-0000000001").iterdir())
    sound = {file: file.read_bytes() for file in files}
    for file in files:
        for _ in range(20):
            data = bytearray(sound[file])
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
            if file.name == "sha256.json" and bytes(data).split() == sound[file].split():
                continue  # white space for white space: the same sums
            file.write_bytes(data)
            assert Checkpointer(tmp_path).newest() is None, (file, data)
            file.parent.mkdir()
            for path, content in sound.items():
                path.write_bytes(content)


def test_a_checkpoint_that_was_being_written_when_the_process_was_killed_does_not_count(work, tmp_path):
    save(work, 1)

    def killed(directory: Path) -> None:
        writing("state of 2")(directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work._save(2, killed)
    again = Checkpointer(tmp_path, every_seconds=0.0)
    assert again.newest() == tmp_path / "step-0000000001"
    again.on_step_end(2, writing("state of 2"))
    assert again.newest() == tmp_path / "step-0000000002"


def test_checkpoints_are_due_by_time_and_no_more_often_than_their_cost_allows(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("search_e1.runs.checkpoints.time.monotonic", lambda: now[0])

    def slowly(directory: Path) -> None:
        now[0] += 5.0  # what saving takes

    work, saved = Checkpointer(tmp_path, every_seconds=60.0, share=0.02), []
    for step in range(1, 101):
        now[0] += 10.0  # what a step takes
        before = now[0]
        work.on_step_end(step, slowly)
        saved += [before] if now[0] > before else []
    # The first after 60 s; then 5 s / 0.02 = 250 s from the beginning of one to that of the next, at the next step's end.
    assert saved == [60.0, 315.0, 570.0, 825.0]


def test_without_a_directory_nothing_is_kept():
    work = Checkpointer()
    work.on_step_end(1, writing("anything"))
    assert work.newest() is None


# Lines.


def write_lines(directory: Path, chunks: int = 3) -> Lines:
    lines = Lines(directory / "groups.jsonl", directory / "groups.jsonl.journal")
    for number in range(chunks):
        lines.append([f"{number}a", f"{number}b"], {"em": 0.5, "n": number})
    return lines


def test_lines_go_on_after_the_last_whole_chunk(tmp_path):
    assert write_lines(tmp_path).tally == {"em": 1.5, "n": 3.0}
    with (tmp_path / "groups.jsonl").open("a") as file:
        file.write("3a\n")  # killed before the chunk was whole
    again = Lines(tmp_path / "groups.jsonl", tmp_path / "groups.jsonl.journal")
    assert again.read() == [b"0a", b"0b"]
    assert again.skip()
    assert again.read() == [b"2a", b"2b"]
    assert again.read() is None
    assert not again.skip()
    assert again.tally == {"em": 1.5, "n": 3.0}
    again.append(["3a", "3b"], {"em": 1.0})
    assert again.tally == {"em": 2.5, "n": 3.0}
    assert (tmp_path / "groups.jsonl").read_text() == "0a\n0b\n1a\n1b\n2a\n2b\n3a\n3b\n"


def test_without_a_journal_lines_begin_anew(tmp_path):
    write_lines(tmp_path)
    lines = Lines(tmp_path / "groups.jsonl")
    assert lines.read() is None
    lines.append(["x"])
    assert (tmp_path / "groups.jsonl").read_text() == "x\n"


def test_damage_to_lines_or_to_their_journal_at_any_place_is_noticed(tmp_path):
    write_lines(tmp_path)
    files = [tmp_path / "groups.jsonl", tmp_path / "groups.jsonl.journal"]
    sound = [file.read_bytes() for file in files]
    dice = random.Random(0)
    for number in range(200):
        file = files[number % 2]
        data = bytearray(sound[number % 2])
        if number % 4 < 2:
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        else:
            del data[dice.randrange(len(data)) :]
        file.write_bytes(data)
        lines = Lines(*files)
        chunks = 0
        while (chunk := lines.read()) is not None:
            assert chunk == [f"{chunks}a".encode(), f"{chunks}b".encode()]
            chunks += 1
        assert chunks < 3 or file.read_bytes() == sound[number % 2], data  # a flipped line end of the journal's: mended
        assert lines.tally["n"] == sum(range(chunks))
        for path, content in zip(files, sound, strict=True):
            path.write_bytes(content)


# Signals.


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_what_can_be_cut_at_once(signum, status):
    before = signal.getsignal(signum)
    with pytest.raises(Stopped, match=f"stopped by {signum.name}; run the same command again") as stopped, on_signals():
        os.kill(os.getpid(), signum)
    assert stopped.value.status == status
    assert signal.getsignal(signum) is before


def stopped_while(finishing) -> Stopped:
    """How ``finishing(stop)`` ends, which nothing may cut."""

    def work() -> None:
        with on_signals() as stop, stop.finishing():
            finishing(stop)
        pytest.fail("went on with other work")

    with pytest.raises(Stopped) as stopped:
        work()
    return stopped.value


def test_a_step_is_finished_and_saved_before_a_signal_ends_the_work(tmp_path, capfd):
    done = []

    def steps(stop: Stop) -> None:
        work = Checkpointer(tmp_path, every_seconds=1e9, stop=stop)
        for step in range(1, 9):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            done.append(step)
            work.on_step_end(step, writing(f"state of {step}"))

    assert stopped_while(steps).status == 75
    assert done == [1, 2, 3]
    assert "finishing the step" in capfd.readouterr().err
    newest = Checkpointer(tmp_path).newest()
    assert newest
    assert newest.name == "step-0000000003"


def test_a_second_signal_does_not_wait():
    def work(stop: Stop) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    assert stopped_while(work).status == 130


def test_work_that_ends_by_itself_stops_too_when_it_was_asked():
    assert stopped_while(lambda stop: os.kill(os.getpid(), signal.SIGTERM)).status == 75


def test_nobody_asks_a_stop_of_its_own():
    stop = Stop()
    with stop.finishing():
        stop.leave()
    assert stop.asked is None
