"""Data sets on the Hugging Face Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from search_e1.errors import ConfigError, DataError


def info(name: str, subject: str, instead: str, revision: str | None = None) -> Any:
    """The Hub's description of a data set, from one request without retries, so that a dead network fails fast.

    Raises:
        ConfigError: the data set lacks this revision.
        DataError: the data set is not found, or the Hub cannot be reached; the message begins with ``subject`` and ends with
            ``instead``.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=10)
    except RevisionNotFoundError:
        raise ConfigError(f"{name} has no revision {revision!r}; leave --revision out for the latest") from None
    except RepositoryNotFoundError:
        raise DataError(f"{subject}not found on the Hub, or not accessible to you; {instead}") from None
    except Exception as error:  # huggingface_hub's transport errors are not part of its API
        raise DataError(f"{subject}the Hub cannot be reached ({one_line(error)}); {instead}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of `datasets`; its log level, which the whole process shares, is restored afterwards."""
    import datasets

    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
