"""``bm25s``, imported without JAX.

bm25s imports JAX where it is installed and runs an operation with it, which allocates three quarters of a GPU's memory. Its
JAX backend is never used here. Import bm25s from this module only.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Make ``import name`` fail; afterwards it works as before."""
    before = {key: sys.modules[key] for key in (name,) if key in sys.modules}
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(before)


with _hidden("jax"):
    import bm25s
    from bm25s.stopwords import STOPWORDS_EN

__all__ = ["STOPWORDS_EN", "bm25s"]
