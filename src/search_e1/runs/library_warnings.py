"""Warnings of transformers about a model's files, as lines of our own: the command line silences its log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)
_ABOUT_THE_MACHINE = ("is falling back to its reference PyTorch implementation",)
"""Said at an import, whatever the model."""
_told: set[tuple[str, str]] = set()


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.messages[record.getMessage()] = None


@contextmanager
def passing_on(what: str) -> Iterator[None]:
    """Context of loading ``what``: each warning of transformers becomes one line that names it, once a process."""
    library, heard = logging.getLogger("transformers"), _Heard()
    handlers, level = library.handlers, library.level
    library.handlers = [heard]
    library.setLevel(logging.WARNING)
    try:
        yield
    finally:
        library.handlers = handlers
        library.setLevel(level)
    for message in heard.messages:
        if (what, message) not in _told and not any(part in message for part in _ABOUT_THE_MACHINE):
            _told.add((what, message))
            logger.warning("%s: %s", what, " ".join(message.split()))
