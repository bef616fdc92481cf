"""A server's errors, in the form of OpenAI's API."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse


class Refused(Exception):  # noqa: N818  most are the client's errors
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """``param``: the wrong field. ``code``: machine-readable reason."""
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body: dict[str, Any] = {"error": {"message": message, "type": type, "param": param, "code": code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)
