"""What the retrieval server is told, without the packages that serving takes."""

from dataclasses import dataclass

from search_e1.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server allows itself and its clients."""

    topk: int = 3
    """Passages for a query where the request does not say."""
    max_topk: int = 100
    max_queries: int = 1024
    """Queries of one request."""
    max_query_chars: int = 100_000
    """Characters of one query. A generation of 500 tokens stays far below."""
    max_body_bytes: int = 16 * 2**20
    batch: int = 64
    """Most queries of one call of the index."""
    batch_wait: float = 0.002
    """Seconds that a call which is not full waits for more queries."""
    queue: int = 8192
    """Queries that may wait; more are answered with 503."""
    cache: int = 50_000
    """Queries whose answers are kept in memory."""
    cache_bytes: int = 2**30
    """Of these answers together; the least recently used go first."""
    memory_bytes: int = 2**29
    """Of requests and large answers that are under way together; what is more is answered with 503."""
    threads: int = 1
    """Calls of the index at the same time."""
    head_timeout: float = 10.0
    """Seconds in which the head of a request has to arrive, and in which a new connection has to begin one."""
    body_timeout: float = 30.0
    """Seconds in which the body of a request has to arrive."""
    send_timeout: float = 60.0
    """Seconds in which a client has to take an answer that it lets pile up."""
    connections: int = 800
    """Open at the same time; beyond them the oldest without a complete request is closed, or the new one gets 503."""
    shutdown_timeout: int = 30
    """Seconds that requests under way have left when the server is told to stop."""
    access_log: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: names the setting.
        """
        if self.topk > self.max_topk:
            raise ConfigError(f"topk = {self.topk} is more than max_topk = {self.max_topk}; raise --max-topk")
        if self.queue < self.max_queries:
            raise ConfigError(
                f"a queue of {self.queue} queries never has room for a request of {self.max_queries}; "
                "raise --queue or lower --max-queries"
            )
        if self.memory_bytes < self.max_body_bytes:
            raise ConfigError(
                f"memory of {self.memory_bytes >> 20} MiB has no room for a request of {self.max_body_bytes >> 20} MiB; raise "
                "--memory-mib or lower --max-body-mib"
            )
