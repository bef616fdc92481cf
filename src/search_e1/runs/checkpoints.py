"""The progress of a stage on disk: it survives preemption, and is verified before it is used again.

A training stage saves checkpoints; a stage that writes lines writes them chunk by chunk. Both belong to an unfinished artifact
(``runs.artifact`` decides whether they can be used) and are removed when it is complete.
"""

import hashlib
import json
import logging
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from search_e1.runs import ranks
from search_e1.runs.artifacts import JOURNAL
from search_e1.runs.files import append, sha256, summed_entries, summed_line, sync, write_atomically
from search_e1.runs.stopping import Stop, Stopped
from search_e1.types import Record

logger = logging.getLogger(__name__)

_SUMS = "sha256.json"
_KEPT = 2
RANK = "rank-"
"""Prefix of files that each rank writes for itself."""
_WAIT = 15.0
"""Seconds to wait for the other ranks to stop too: a pass over prompts takes several on a CPU; torchrun kills after 30."""


class Checkpointer:
    """Saves the progress of a stage (training checkpoints, unfinished lines), and stops it on a signal."""

    def __init__(
        self,
        directory: Path | None = None,
        *,
        every_seconds: float = 60.0,
        share: float = 0.02,
        stop: Stop | None = None,
    ) -> None:
        """Everything is saved in ``directory``; without one, nothing is.

        A checkpoint is due ``every_seconds``, and less often if saving would take more than ``share`` of the time.
        """
        self.directory = directory
        self.stop = stop or Stop()
        self._every, self._share = every_seconds, share
        self._begun, self._cost = time.monotonic(), 0.0
        self._saved: int | None = None

    def finishing(self) -> AbstractContextManager[None]:
        """See ``Stop.finishing``."""
        return self.stop.finishing()

    def newest(self) -> Path | None:
        """The newest intact checkpoint, the same on all ranks; damaged ones are removed. All ranks call this."""
        newest = ranks.broadcast_object(self._newest() if ranks.is_first() else None)
        if newest:
            self._saved = int(newest.name.removeprefix("step-"))
        return newest

    def _newest(self) -> Path | None:
        for path in sorted(self._checkpoints(), reverse=True):
            if _whole(path):
                return path
            logger.warning("%s: damaged checkpoint removed; training resumes from the one before, if there is one", path)
            shutil.rmtree(path)
        return None

    def on_step_end(self, step: int, write: Callable[[Path], None]) -> None:
        """After step ``step``, save a checkpoint if one is due, and stop if a signal asked for it.

        ``write`` writes its files into the directory it is given; ``newest`` returns that directory later. All ranks call this
        at the same steps, and all call ``write``; a signal to one of them stops all after the same step.

        Raises:
            Stopped: a signal asked to stop; the checkpoint is saved.
        """
        waited = time.monotonic() - self._begun
        due = waited >= max(self._every, self._cost / self._share)
        asked, due_on_first = self._agree(due)
        if asked or due_on_first:
            self._save(step, write)
        self._leave(asked)

    def between_passes(self, step: int, write: Callable[[Path], None], *, same: bool) -> None:
        """In the middle of the step after ``step``, save and stop if a signal asked for it.

        ``same``: the files that rank 0 writes for all ranks are unchanged since the end of ``step``.

        Raises:
            Stopped: a signal asked to stop; the finished part of the step is saved.
        """
        asked, _ = self._agree(False)
        if asked:
            self._save(step, write, again=True, same=same)
        self._leave(asked)

    @contextmanager
    def saving_on_stop(self, step: int, write: Callable[[Path], None]) -> Iterator[None]:
        """Wraps work between steps: if a signal ends it on all ranks, the ``step`` steps before it are saved."""
        try:
            yield
        except Stopped:
            if ranks.all_come(_WAIT):
                self._save(step, write)
            raise

    def _agree(self, due: bool) -> tuple[signal.Signals | None, bool]:
        """The signal that any rank received, and whether a checkpoint is due on rank 0."""
        gathered = ranks.all_gather_object((self.stop.asked, due))
        return next((asked for asked, _ in gathered if asked), None), gathered[0][1]

    def _leave(self, asked: signal.Signals | None) -> None:
        self.stop.asked = self.stop.asked or asked
        if asked or ranks.count() == 1:  # a rank that leaves alone would keep the others waiting
            self.stop.leave()

    @contextmanager
    def scratch(self, beside: Path | None = None) -> Iterator[Path]:
        """A scratch directory. It persists until the stage is complete, so check its content after a resume.

        Without ``self.directory`` it is a temporary directory, in ``beside`` if given.
        """
        if self.directory is None:
            with tempfile.TemporaryDirectory(dir=beside, prefix=".scratch-") as name:
                yield Path(name)
            return
        path = self.directory / "scratch"
        path.mkdir(parents=True, exist_ok=True)
        yield path

    def lines(self, path: Path) -> "Lines":
        """The file of lines at ``path``, with the chunks written so far."""
        return Lines(path, self.directory and self.directory / f"{path.name}{JOURNAL}")

    def _save(self, step: int, write: Callable[[Path], None], *, again: bool = False, same: bool = False) -> None:
        if self.directory is None or (self._saved == step and not again):
            return
        begun = time.monotonic()
        partial, path = self.directory / ".step", self.directory / f"step-{step:010d}"
        known: dict[str, str] = {}
        if ranks.is_first():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            known = _link_shared(path, partial) if same and self._saved == step else {}
        ranks.barrier()
        write(partial)
        ranks.barrier()
        if ranks.is_first():
            self._finish(partial, path, known)
        self._saved, self._begun, self._cost = step, begun, time.monotonic() - begun

    def _finish(self, partial: Path, path: Path, known: Mapping[str, str]) -> None:
        directory = path.parent
        for file in partial.iterdir():
            _sync_file(file)
        write_atomically(partial / _SUMS, json.dumps(_sums(partial, known)) + "\n")
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
        sync(directory)
        for old in sorted(self._checkpoints())[:-_KEPT]:
            shutil.rmtree(old)

    def _checkpoints(self) -> Iterator[Path]:
        return self.directory.glob("step-*") if self.directory else iter(())


def _link_shared(path: Path, partial: Path) -> dict[str, str]:
    """Link the files that rank 0 wrote for all ranks from the checkpoint of the same step, since after a signal there is no
    time to write them again. Returns their checksums."""
    sums: dict[str, str] = json.loads((path / _SUMS).read_bytes())
    shared = {name: sum for name, sum in sums.items() if not name.startswith(RANK)}
    for name in shared:
        (partial / name).hardlink_to(path / name)
    return shared


def _sums(directory: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    names = sorted(file.name for file in directory.iterdir() if file.name != _SUMS)
    return {name: (known or {}).get(name) or sha256(directory / name) for name in names}


def _whole(directory: Path) -> bool:
    try:
        return json.loads((directory / _SUMS).read_bytes()) == _sums(directory)
    except (OSError, ValueError):
        return False


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


class _Chunk(Record):
    """A journal's entry for a chunk."""

    end: int
    """Offset in bytes of the chunk's end in the file."""
    sha256: str
    """Checksum of the chunk's bytes."""
    tally: dict[str, float]


class Lines:
    """A file of lines, written chunk by chunk; a journal beside it records the complete chunks.

    Opening the file truncates it before the first unfinished or damaged chunk, which has to be made again.
    """

    def __init__(self, path: Path, journal: Path | None = None) -> None:
        """Without ``journal`` the file starts empty."""
        self.path = path
        self._journal = journal
        self._chunks = _whole_chunks(path, journal) if journal else []
        self._at = 0
        self.tally: Counter[str] = Counter()
        """Sums over the chunks that were read, skipped or appended."""
        path.touch()
        os.truncate(path, self._chunks[-1].end if self._chunks else 0)
        if journal:
            write_atomically(journal, "".join(map(_entry, self._chunks)))

    @property
    def whole(self) -> int:
        """Number of complete chunks, read or not."""
        return len(self._chunks)

    def skip(self) -> bool:
        """Whether the next chunk is complete; if so, moves past it."""
        if self._at == len(self._chunks):
            return False
        self.tally.update(self._chunks[self._at].tally)
        self._at += 1
        return True

    def read(self) -> list[bytes] | None:
        """The lines of the next chunk if it is complete, moving past it; else ``None``."""
        begin = self._end
        if not self.skip():
            return None
        with self.path.open("rb") as stream:
            stream.seek(begin)
            return stream.read(self._end - begin).split(b"\n")[:-1]

    def append(self, lines: Iterable[str], tally: Mapping[str, float] | None = None) -> None:
        """Write the next chunk, and add its ``tally`` to ``self.tally``. On disk when this returns."""
        assert self._at == len(self._chunks), "the chunks that are there come first"
        data = "".join(f"{line}\n" for line in lines).encode()
        chunk = _Chunk(end=self._end + len(data), sha256=hashlib.sha256(data).hexdigest(), tally=dict(tally or {}))
        append(self.path, data)
        if self._journal:
            append(self._journal, _entry(chunk).encode())
        self._chunks.append(chunk)
        self.skip()

    @property
    def _end(self) -> int:
        return self._chunks[self._at - 1].end if self._at else 0


def _whole_chunks(path: Path, journal: Path) -> list[_Chunk]:
    """The chunks up to the first that is missing or damaged in the file."""
    found: list[_Chunk] = []
    if not path.is_file():
        return found
    with path.open("rb") as stream:
        for chunk in map(_Chunk.model_validate_json, summed_entries(journal)):
            data = stream.read(chunk.end - (found[-1].end if found else 0))
            if hashlib.sha256(data).hexdigest() != chunk.sha256:
                break
            found.append(chunk)
    return found


def _entry(chunk: _Chunk) -> str:
    return summed_line(chunk.model_dump_json())
