"""A server's questions: a limited number is answered at once, a limited number waits, and disconnected clients are dropped."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from search_e1.agent.agent import Agent
from search_e1.agent.answer import Answer
from search_e1.types import Passage, Turn

Result = TypeVar("Result")
Event = str | tuple[Turn, Sequence[Passage]]
"""A piece of sampled text, or a turn with the passages that were read."""


class QueueFullError(Exception):
    """The queue of waiting questions is full."""


class GoneError(Exception):
    """The client has disconnected."""


class Slots:
    """``at_once`` slots, and at most ``max_waiting`` waiting for one, first come, first served."""

    def __init__(self, at_once: int, max_waiting: int) -> None:
        self.waiting = self.taken = 0
        self._max_waiting, self._free = max_waiting, asyncio.Semaphore(at_once)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """
        Raises:
            QueueFullError: too many are waiting.
        """
        if self._free.locked() and self.waiting >= self._max_waiting:
            raise QueueFullError
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
            self._free.release()


class QuestionQueue:
    """The questions sent to an agent."""

    def __init__(self, agent: Agent, max_waiting: int, timeout: float) -> None:
        """``timeout``: seconds for a question, including its wait for a slot."""
        self._agent, self._timeout = agent, timeout
        self.slots = Slots(agent.limits.batch_size, max_waiting)

    async def ask(self, question: str, tell: Callable[[Event], None] | None = None, **options: Any) -> Answer:
        """The answer; ``options`` are those of ``Agent.submit``. Cancelling this cancels the question.

        ``tell`` is called in the event loop with each event.

        Raises:
            QueueFullError: too many questions are waiting.
            TimeoutError: it took too long.
            SearchE1Error: as ``Agent.ask``.
        """
        loop = asyncio.get_running_loop()
        listening: dict[str, Any] = {}
        if tell:
            listening["on_text"] = lambda piece: loop.call_soon_threadsafe(tell, piece)
            listening["on_turn"] = lambda turn, passages: loop.call_soon_threadsafe(tell, (turn, passages))
        async with asyncio.timeout(self._timeout), self.slots.slot():
            job = self._agent.submit(question, **options, **listening)
            try:
                return await asyncio.wrap_future(job.answer)
            finally:
                self._agent.cancel(job)  # does nothing if it is answered


async def while_there(receive: Callable[[], Any], work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled when the client of an ASGI ``receive`` disconnects.

    Raises:
        GoneError: the client disconnected.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Callable[[], Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
