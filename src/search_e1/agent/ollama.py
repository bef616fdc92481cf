"""A Modelfile, with which Ollama imports a bundle's weights, and what is lost that way."""

from pathlib import Path
from typing import Any

from search_e1.config import Prompts, RolloutConfig
from search_e1.text.prompts import plain_prompt
from search_e1.text.protocols import protocol_of

FILE = "Modelfile"
LOST = "no retrieval: the model writes a search, and nothing answers it"
_QUESTION = "SEARCHE1QUESTION"


def write(directory: Path, tokenizer: Any, prompts: Prompts, limits: RolloutConfig) -> None:
    """Write the Modelfile of the policy in ``directory``: greedy, with the agent's stop sequences and limits."""
    stops = protocol_of(tokenizer, prompts).stop
    lines = [
        f"# Made by search-e1. The model alone, without the agent's loop, has {LOST}.",
        "# `search-e1 serve` serves the agent. Ollama has to know the architecture that config.json names.",
        "#   ollama create NAME -f Modelfile",
        "FROM .",
        "PARAMETER temperature 0",
        f"PARAMETER num_ctx {limits.max_tokens}",
        f"PARAMETER num_predict {limits.max_action_tokens}",
        *(f'PARAMETER stop "{stop}"' for stop in stops),
    ]
    if template := _template(tokenizer, prompts):
        lines += ["# The prompt that the policy was trained under, for one question.", f'TEMPLATE """{template}"""']
    else:
        lines += ["# No TEMPLATE: the prompt that the policy was trained under cannot be written as one."]
    (directory / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _template(tokenizer: Any, prompts: Prompts) -> str | None:
    """The prompt of one question with Ollama's placeholder; ``None`` if its text would be tokenized differently."""
    ids = plain_prompt(tokenizer, prompts, _QUESTION)
    text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if tuple(tokenizer(text, add_special_tokens=False).input_ids) != ids:
        return None
    if tokenizer.bos_token:
        text = text.removeprefix(tokenizer.bos_token)  # Ollama adds it
    if text.count(_QUESTION) != 1 or "{{" in text or '"""' in text or text.endswith('"'):
        return None
    return text.replace(_QUESTION, "{{ .Prompt }}")
