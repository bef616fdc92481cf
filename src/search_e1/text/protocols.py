"""Which protocol a policy works under."""

from functools import lru_cache
from typing import Any

from search_e1.config import Prompts
from search_e1.text.protocol import Protocol, Tags
from search_e1.text.tool_calls import ToolCalls

_BY_NAME = {"tags": Tags, "tools": ToolCalls}


def protocol_of(tokenizer: Any, prompts: Prompts) -> Protocol:
    """The protocol that ``prompts`` names, for the chat template and the tokens of ``tokenizer``.

    Raises:
        ModelError: the tokenizer cannot be used under it.
    """
    return _protocol(tokenizer, str(getattr(tokenizer, "chat_template", None)), prompts)


@lru_cache(maxsize=16)
def _protocol(tokenizer: Any, template: str, prompts: Prompts) -> Protocol:
    # The template is part of the key: it can be exchanged on a tokenizer that is in use.
    return _BY_NAME[prompts.protocol](tokenizer, prompts)
