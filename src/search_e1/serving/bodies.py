"""Request bodies, read within limits of time and size."""

import asyncio

from starlette.exceptions import HTTPException
from starlette.requests import Request

from search_e1.serving.limits import Limits


class Memory:
    """Budget, in bytes, for requests and large responses in flight."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    def take(self, size: int) -> None:
        """Reserve ``size`` bytes, or raise 503; a single request may exceed the budget."""
        if self.held and self.held + size > self.most:
            raise HTTPException(503, "too much data in flight; retry later", {"Retry-After": "1", "Connection": "close"})
        self.held += size

    def release(self, size: int) -> None:
        self.held -= size


async def read_body(request: Request, limits: Limits, memory: Memory, taken: list[int], remedy: str = "send less") -> bytes:
    """Read the body; reservations of ``memory`` are appended to ``taken``, even if this raises.

    Up to four times the limit is read and discarded, so that the client sees the response. ``remedy``: for a body too large.

    Raises:
        HTTPException: 408, 413, or 503 if there is no memory.
        ClientDisconnect: the client has disconnected.
    """
    most, parts, size = limits.max_body_bytes, [], 0
    try:
        async with asyncio.timeout(limits.body_timeout):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    memory.take(len(part))
                    taken.append(len(part))
                    parts.append(part)
                elif size > 4 * most:
                    break
    except TimeoutError as error:
        detail = f"the request did not arrive within {limits.body_timeout:g} s"
        raise HTTPException(408, detail, {"Connection": "close"}) from error
    if size > most:
        raise HTTPException(413, f"the body exceeds {most} bytes; {remedy}", {"Connection": "close"})
    return b"".join(parts)
