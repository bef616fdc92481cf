"""``bm25s``, imported without JAX; import it from this module only.

If JAX is installed, bm25s imports it and runs an operation, which allocates three quarters of a GPU's memory. Its JAX backend
is never used here.
"""

import sys

_jax = sys.modules.get("jax")
sys.modules["jax"] = None  # type: ignore[assignment]  # makes ``import jax`` fail
try:
    import bm25s
    from bm25s import stopwords
finally:
    del sys.modules["jax"]
    if _jax:
        sys.modules["jax"] = _jax

STOPWORDS = {
    "da": stopwords.STOPWORDS_DANISH,
    "de": stopwords.STOPWORDS_GERMAN,
    "en": stopwords.STOPWORDS_EN,
    "es": stopwords.STOPWORDS_SPANISH,
    "fr": stopwords.STOPWORDS_FRENCH,
    "it": stopwords.STOPWORDS_ITALIAN,
    "nl": stopwords.STOPWORDS_DUTCH,
    "no": stopwords.STOPWORDS_NORWEGIAN,
    "pt": stopwords.STOPWORDS_PORTUGUESE,
    "ru": stopwords.STOPWORDS_RUSSIAN,
    "sv": stopwords.STOPWORDS_SWEDISH,
    "tr": stopwords.STOPWORDS_TURKISH,
}
"""Language -> its stop words."""
__all__ = ["STOPWORDS", "bm25s"]
