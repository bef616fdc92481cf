"""``bm25s``, imported without JAX; import it from this module only.

bm25s imports JAX where it is installed and runs an operation with it, which allocates three quarters of a GPU's memory. Its
JAX backend is never used here.
"""

import sys

_jax = sys.modules.get("jax")
sys.modules["jax"] = None  # type: ignore[assignment]  # makes ``import jax`` fail
try:
    import bm25s
    from bm25s.stopwords import STOPWORDS_EN
finally:
    del sys.modules["jax"]
    if _jax:
        sys.modules["jax"] = _jax

__all__ = ["STOPWORDS_EN", "bm25s"]
