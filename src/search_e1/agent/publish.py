"""Push bundles to the Hugging Face Hub, and download them from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from search_e1.agent.bundle import FILE, Bundle
from search_e1.data.hub import one_line
from search_e1.errors import ConfigError, DataError
from search_e1.runs.devices import no_bars

_OURS = ["*.safetensors", "*.safetensors.index.json", "index/*", "Modelfile"]
"""Files deleted from the repository if this bundle lacks them, above all an index that was left out."""


def check_push(repository: str) -> None:
    """
    Raises:
        ConfigError: the repository's name is invalid, or there is no token on this machine.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise ConfigError(f"{repository!r} cannot be the name of a repository; give OWNER/NAME") from None
    if repository.count("/") != 1:
        raise ConfigError(f"{repository!r} is not a valid name on the Hub; give OWNER/NAME")
    if not get_token():
        raise ConfigError("no Hub token found; run `hf auth login`, or set HF_TOKEN to one that may write")


def push(bundle: Bundle, repository: str, *, private: bool = False) -> str:
    """Upload the bundle to ``repository``, created if missing; returns its URL.

    ``private``: make the repository private; an existing public one is refused.

    Raises:
        ConfigError: there is no token, or it may not write to the repository.
        DataError: the Hub cannot be reached, or refuses the upload.
    """
    check_push(repository)
    api = HfApi()
    with _translated(repository, "push it again: files already uploaded are not sent twice"):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise ConfigError(f"{repository}: already exists and is public; make it private on the Hub, or leave --private out")
        done = api.upload_folder(
            repo_id=repository, folder_path=bundle.directory, commit_message=f"The agent {bundle.name}",
            ignore_patterns=[".*", "**/.*"], delete_patterns=_OURS,
        )  # fmt: skip
    return str(done.repo_url or repository)


def is_hub_id(name: str) -> bool:
    """Whether ``name`` can be ``owner/name`` on the Hub, and is not a path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not Path(name).exists()


def download(repository: str, revision: str | None = None) -> Path:
    """Download a bundle from the Hub unless it is cached and unchanged; returns its directory.

    Raises:
        ConfigError: the revision does not exist, or may not be read.
        DataError: the repository does not exist or is not a bundle, or the Hub cannot be reached and nothing is cached.
    """
    with _translated(repository, "give the directory of a bundle, or its OWNER/NAME on the Hub"), no_bars():
        place = Path(snapshot_download(repository, revision=revision))
    if not (place / FILE).is_file():
        raise DataError(f"{repository}: not a bundle (no {FILE}); push one with `search-e1 bundle DIR --push {repository}`")
    return place


@contextmanager
def _translated(repository: str, remedy: str) -> Iterator[None]:
    """Translate the Hub's errors into one line."""
    try:
        yield
    except RevisionNotFoundError:
        raise ConfigError(f"{repository} has no such revision; leave it out for the latest") from None
    except RepositoryNotFoundError as error:
        status = error.response.status_code
        if status == 401:
            raise ConfigError(f"{repository}: not found, or your token is not valid (401); run `hf auth login`") from None
        raise DataError(f"{repository}: neither a directory nor found on the Hub, or not accessible to you; {remedy}") from None
    except LocalEntryNotFoundError:
        raise DataError(f"{repository}: not here, and the Hub cannot be reached; {remedy}") from None
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            status = error.response.status_code
            problem = "your token is not valid" if status == 401 else "your token does not permit this"
            raise ConfigError(
                f"{repository}: {problem} ({status}); give one that may with `hf auth login`, or as HF_TOKEN"
            ) from None
        raise DataError(f"{repository}: the Hub refuses ({one_line(error)}); {remedy}") from None
    except (ConfigError, DataError):
        raise
    except ValueError as error:  # for example its check of the card
        raise DataError(f"{repository}: the Hub refuses ({one_line(error)}); fix that in the bundle") from None
    except Exception as error:  # errors of its transport are not part of the interface
        raise DataError(f"{repository}: the Hub cannot be reached ({one_line(error)}); {remedy}") from error
