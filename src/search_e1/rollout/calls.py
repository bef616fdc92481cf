"""Tool calls answered in the background while the engine samples other rows."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from queue import SimpleQueue
from threading import Thread
from typing import Any

from search_e1.rollout.engines.base import Interrupted, never
from search_e1.rollout.environment import Environment, ToolCall
from search_e1.types import Passage

_POLL = 0.5
"""Seconds between checks for a signal while waiting for calls."""
Draft = dict[str, Any]
"""The known fields of an unfinished turn."""
Answered = list[tuple[int, Draft, Sequence[Passage]]]
"""Rows, their turns with observations, and the passages in the observations."""
_Batch = Sequence[tuple[int, Draft, ToolCall]]


class Calls:
    """A queue of call batches, answered one after another in a background thread."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._queue: SimpleQueue[tuple[Future[Answered], _Batch] | None] = SimpleQueue()
        self.interrupted: Callable[[], bool] = never
        self.under_way: list[Future[Answered]] = []
        self._marked: list[Future[Answered]] = []

    def __enter__(self) -> "Calls":
        # A daemon thread, unlike an executor's: an exiting process does not wait for a server's timeout.
        Thread(target=self._work, name="retriever", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for batch in self.under_way:
            batch.cancel()
        self._queue.put(None)

    def _work(self) -> None:
        while job := self._queue.get():
            future, calls = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                replies = self._environment.answer([call for _, _, call in calls])
                answers = zip(calls, replies, strict=True)
                future.set_result([(i, draft | reply.fields, reply.passages) for (i, draft, _), reply in answers])
            except BaseException as error:  # raised by `collect`
                future.set_exception(error)

    def launch(self, calls: _Batch) -> None:
        """Start answering a batch of calls, if it is not empty."""
        if calls:
            self.under_way.append(Future())
            self._queue.put((self.under_way[-1], calls))

    def mark(self) -> None:
        """Mark the calls under way, for ``collect(marked=True)``."""
        self._marked = list(self.under_way)

    def collect(self, *, marked: bool = False) -> Answered:
        """Wait for all calls under way, or only for those at the last ``mark``.

        Raises:
            Interrupted: ``interrupted`` became true before all were answered.
        """
        batches = [batch for batch in self.under_way if not marked or batch in self._marked]
        while wait(batches, timeout=_POLL).not_done:
            if self.interrupted():
                raise Interrupted
        return self._take(batches)

    def ready(self, *, wait: bool) -> Answered:
        """The calls answered so far; with ``wait``, waits up to half a second for at least one."""
        return self._take(_first(self.under_way, _POLL if wait else 0))

    def _take(self, batches: Sequence["Future[Answered]"]) -> Answered:
        self.under_way = [batch for batch in self.under_way if batch not in batches]
        return [answered for batch in batches for answered in batch.result()]


def _first(batches: Sequence["Future[Answered]"], seconds: float) -> list["Future[Answered]"]:
    done = wait(batches, timeout=seconds, return_when=FIRST_COMPLETED).done
    return [batch for batch in batches if batch in done]
