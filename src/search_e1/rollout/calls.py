"""Calls of tools that are answered in the background, while the engine samples other rows."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from queue import SimpleQueue
from threading import Thread
from typing import Any

from search_e1.rollout.engines.base import Interrupted, never
from search_e1.rollout.environment import Environment, ToolCall
from search_e1.types import Passage

_POLL = 0.5
"""Seconds between two looks for a signal while calls are awaited."""
Draft = dict[str, Any]
"""The fields of a turn, as far as they are known."""
Answered = list[tuple[int, Draft, Sequence[Passage]]]
"""Rows, their turns with observations, and the passages in these."""
_Batch = Sequence[tuple[int, Draft, ToolCall]]


class Calls:
    """Calls under way, one batch after another."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._queue: SimpleQueue[tuple[Future[Answered], _Batch] | None] = SimpleQueue()
        self.interrupted: Callable[[], bool] = never
        self.under_way: list[Future[Answered]] = []
        self._marked: list[Future[Answered]] = []

    def __enter__(self) -> "Calls":
        # A daemon, unlike an executor's threads: a process that is to end does not wait for a server's time-out.
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
            except BaseException as error:  # raised where it is collected
                future.set_exception(error)

    def launch(self, calls: _Batch) -> None:
        """Begin to answer rows' calls, unless there are none."""
        if calls:
            self.under_way.append(Future())
            self._queue.put((self.under_way[-1], calls))

    def mark(self) -> None:
        """Tell the calls under way from those that will be launched."""
        self._marked = list(self.under_way)

    def collect(self, *, marked: bool = False) -> Answered:
        """Wait for all that was launched, or for what was under way at the last ``mark``.

        Raises:
            Interrupted: before all were answered.
        """
        batches = [batch for batch in self.under_way if not marked or batch in self._marked]
        while wait(batches, timeout=_POLL).not_done:
            if self.interrupted():
                raise Interrupted
        return self._take(batches)

    def ready(self, *, wait: bool) -> Answered:
        """What is answered by now; with ``wait``, after a while in which something may be."""
        return self._take(_first(self.under_way, _POLL if wait else 0))

    def _take(self, batches: Sequence["Future[Answered]"]) -> Answered:
        self.under_way = [batch for batch in self.under_way if batch not in batches]
        return [answered for batch in batches for answered in batch.result()]


def _first(batches: Sequence["Future[Answered]"], seconds: float) -> list["Future[Answered]"]:
    done = wait(batches, timeout=seconds, return_when=FIRST_COMPLETED).done
    return [batch for batch in batches if batch in done]
