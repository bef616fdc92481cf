"""Limits on a server's clients; imports none of the packages that serving needs."""

from typing import Any

from pydantic import Field

from search_e1.errors import ConfigError
from search_e1.types import Record


class Limits(Record):
    """Limits on clients. Each field is an option of the verbs that serve."""

    max_body_bytes: int = Field(4 * 2**20, ge=1, description="Maximum size of a request.")
    memory_bytes: int = Field(2**29, ge=1, description="Maximum memory for requests and large responses in flight.")
    head_timeout: float = Field(10.0, ge=0.1, description="Seconds for a request's head to arrive, and to start arriving.")
    body_timeout: float = Field(30.0, ge=0.1, description="Seconds for the body of a request to arrive.")
    send_timeout: float = Field(60.0, ge=0.1, description="Seconds for a client to read its response.")
    connections: int = Field(
        800, ge=1, description="Maximum open connections; a new one replaces the oldest without a complete request."
    )
    shutdown_timeout: int = Field(30, ge=0, description="Seconds for requests in flight at Ctrl-C or SIGTERM.")
    access_log: bool = Field(False, description="Log a line for each request.")

    def __init__(self, **values: Any) -> None:
        """
        Raises:
            ConfigError: the combination cannot work.
        """
        super().__init__(**values)
        if self.memory_bytes < self.max_body_bytes:
            most, body = self.memory_bytes >> 20, self.max_body_bytes >> 20
            problem = f"memory of {most} MiB has no room for a request of {body} MiB"
            raise ConfigError(f"{problem}; raise --memory-mib or lower --max-body-mib")
