"""Tokenizers that fail on a text."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from search_e1.errors import ModelError


@contextmanager
def tokenizing(tokenizer: Any) -> Iterator[None]:
    """Context of a call of ``tokenizer``. Rust has then already reported its panic on standard error.

    Raises:
        ModelError: the tokenizer's regular expression fails on the text.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # from Rust; not a subclass of Exception
            raise
        file = Path(str(tokenizer.name_or_path)) / "tokenizer.json"
        reason = " ".join(str(error).split())
        raise ModelError(f"{file}: its regular expression fails on a text ({reason}); use another tokenizer") from error
