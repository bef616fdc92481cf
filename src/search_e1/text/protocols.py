"""The protocol of a policy."""

from functools import lru_cache
from typing import Any

from search_e1.config import Prompts
from search_e1.text.protocol import Protocol, Tags
from search_e1.text.tool_calls import ToolCalls

_BY_NAME = {"tags": Tags, "tools": ToolCalls}


def protocol_of(tokenizer: Any, prompts: Prompts) -> Protocol:
    """The protocol that ``prompts`` names, for the chat template and vocabulary of ``tokenizer``.

    Raises:
        ModelError: the tokenizer does not support the protocol.
    """
    return _protocol(tokenizer, str(getattr(tokenizer, "chat_template", None)), prompts)


@lru_cache(maxsize=16)
def _protocol(tokenizer: Any, template: str, prompts: Prompts) -> Protocol:
    # The template is part of the cache key: it can be replaced on a tokenizer in use.
    return _BY_NAME[prompts.protocol](tokenizer, prompts)
