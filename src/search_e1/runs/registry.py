"""Extension points by name: the package's own entries, and a user's as ``module:attribute``."""

import difflib
from collections.abc import Callable
from importlib import import_module
from typing import Generic, TypeVar

from search_e1.errors import ConfigError

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Named objects of one kind."""

    def __init__(self, kind: str) -> None:
        """``kind``: what messages call an entry, e.g. ``"objective"``."""
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """A decorator that registers its target under ``name``."""

        def enter(entry: Entry) -> Entry:
            self._entries[name] = entry
            return entry

        return enter

    @property
    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted(self._entries)

    def get(self, name: str, key: str) -> Entry:
        """The entry called ``name``, or the attribute that ``module:attribute`` names. ``key``: the config key with this value.

        Raises:
            ConfigError: there is no such entry; the message suggests the nearest.
        """
        if name in self._entries:
            return self._entries[name]
        module, colon, attribute = name.partition(":")
        if not colon:
            close = difflib.get_close_matches(name, self._entries, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(self.names)}, or module:attribute"
            raise ConfigError(f"{key} = {name!r}: no such {self.kind}; {hint}")
        try:
            entry: Entry = getattr(import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{key} = {name!r}: {error}; give an importable module:attribute") from error
        return entry
