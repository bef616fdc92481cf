"""Settings of the retrieval server; importable without the packages that serving needs."""

from typing import Any

from pydantic import Field

from search_e1.errors import ConfigError
from search_e1.serving.limits import Limits


class Settings(Limits):
    """Limits of a server and its clients. Each field is an option of `search-e1 serve-retriever`."""

    topk: int = Field(3, ge=1, description="Passages per query, if the request does not set topk.")
    max_topk: int = Field(100, ge=1, description="Maximum passages per query.")
    max_queries: int = Field(1024, ge=1, description="Maximum queries per request.")
    max_query_chars: int = Field(100_000, ge=1, description="Maximum characters of a query.")
    max_body_bytes: int = Field(16 * 2**20, ge=1, description="Maximum size of a request.")
    batch: int = Field(64, ge=1, description="Maximum queries per call of the index.")
    batch_wait: float = Field(0.002, ge=0, description="How long a partial batch waits for more queries.")
    queue: int = Field(8192, ge=1, description="Queries that may wait for the index; more are refused with 503.")
    cache: int = Field(50_000, ge=0, description="Queries whose results stay in memory; 0 keeps none.")
    cache_bytes: int = Field(2**30, ge=1, description="Maximum memory for these results; the least recently used go first.")
    threads: int = Field(1, ge=1, description="Concurrent calls of the index.")

    def __init__(self, **values: Any) -> None:
        """
        Raises:
            ConfigError: a combination of limits that cannot work.
        """
        super().__init__(**values)
        if self.topk > self.max_topk:
            raise ConfigError(f"topk = {self.topk} exceeds max_topk = {self.max_topk}; raise --max-topk")
        if self.queue < self.max_queries:
            problem = f"a queue of {self.queue} queries never has room for a request of {self.max_queries}"
            raise ConfigError(f"{problem}; raise --queue or lower --max-queries")
