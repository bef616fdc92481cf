"""Warnings of transformers about a model's files, as lines of our own: the command line silences its log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)
_ABOUT_THE_MACHINE = "is falling back to its reference PyTorch implementation"
"""Logged at an import, whatever the model."""
_relayed: set[tuple[str, str]] = set()


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        # Of weights that do not fit there is a table; whoever loads decides, and raises. Conversion errors are only in it.
        table = record.funcName == "log_state_dict_report" and "CONVERSION" not in message
        if not table and _ABOUT_THE_MACHINE not in message:
            self.messages[message] = None


@contextmanager
def relayed_warnings(what: str) -> Iterator[None]:
    """Context of loading ``what``: each warning of transformers becomes one line that names it, once a process."""
    library, collector = logging.getLogger("transformers"), _Collector()
    handlers, level, propagate = library.handlers, library.level, library.propagate
    library.handlers, library.propagate = [collector], False
    library.setLevel(logging.WARNING)
    try:
        yield
    finally:
        library.handlers, library.propagate = handlers, propagate
        library.setLevel(level)
    for message in collector.messages:
        if (what, message) not in _relayed:
            _relayed.add((what, message))
            logger.warning("%s: %s", what, " ".join(message.split()))
