"""Settings of the agent's servers; imports none of the packages that serving needs."""

from pydantic import Field

from search_e1.serving.limits import Limits


class ServeSettings(Limits):
    """Limits of a server and its clients. Each field is an option of `search-e1 serve`."""

    max_waiting: int = Field(512, ge=0, description="Questions that may wait for a slot; more are refused with 503.")
    timeout: float = Field(300.0, gt=0, description="Seconds for a question, from its request to its answer.")
    max_question_chars: int = Field(20_000, ge=1, description="Maximum characters of a question or search query.")
    memory_bytes: int = Field(2**28, ge=1, description="Maximum memory for requests in flight.")
