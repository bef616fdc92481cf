"""Resolves ``policy.model`` to its parts: a directory, a Hub id, a GGUF file, a PEFT adapter, or ``small``."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from search_e1.config import NEW
from search_e1.errors import ModelError, SearchE1Error
from search_e1.runs.devices import no_bars
from search_e1.runs.library_warnings import relayed_warnings

SMALL = "small"
_FETCHED = "SmolLM2-135M-Instruct.Q4_1.gguf"
"""The file that ``scripts/fetch_smollm2.py`` writes."""
_SMALL_DIRECTORY = Path(__file__).parent.parent / "data" / "small_policy"
_ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_AS_DIRECTORY = (
    "from pathlib import Path; from search_e1.config import PolicyConfig; from search_e1.training.policy import load; "
    "load({0!r}, PolicyConfig(model={0!r})).save(Path('DIRECTORY'))"
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where ``from_pretrained`` finds the parts of a policy."""

    model: str
    """As the user wrote it; every error message begins with it."""
    weights: Path | str
    """Directory or Hub id of config and weights; for an adapter, its base."""
    tokenizer: Path | str
    prompts: tuple[Path, ...] = ()
    """Directories that may hold the policy's prompts; the first that does is used."""
    adapter: Path | None = None
    gguf: Path | None = None
    """The GGUF file behind ``weights``."""
    options: dict[str, str] = field(default_factory=dict)
    """Further arguments of ``from_pretrained`` for ``weights``."""
    tokenizer_options: dict[str, str] = field(default_factory=dict)


def resolve(model: str) -> Path | str:
    """The directory or GGUF file of ``model``, or a Hub id unchanged. ``small`` is the policy that ships with the package.

    Raises:
        ModelError: ``model`` looks like a path that does not exist, or the path is not a model.
    """
    if model == SMALL:
        return _SMALL_DIRECTORY
    if model == NEW:
        raise ModelError(f"policy.model = {NEW!r}: created by the cold start; run `search-e1 coldstart` and give its policy")
    path = Path(model).expanduser()
    if not path.exists():
        if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1 or is_gguf(path):
            remedy = f"give a directory, a GGUF file, a Hub id (owner/name), or {SMALL!r}"
            if path.name == _FETCHED:
                remedy = "`python scripts/fetch_smollm2.py` fetches it"
            raise ModelError(f"policy.model = {model!r}: no such directory or file; {remedy}")
        return model
    if path.is_file():
        if not is_gguf(path):
            raise ModelError(f"policy.model = {model!r}: not a .gguf file; give the directory of a Hugging Face model")
        return path
    _check_directory(model, path)
    return path


def is_gguf(path: Path | str) -> bool:
    return str(path).lower().endswith(".gguf")


def base_of(model: str) -> str | None:
    """The base of an adapter, as a value of ``policy.model``; ``None`` if ``model`` is not an adapter.

    A relative path is resolved against the adapter's directory first, then against the working directory.

    Raises:
        ModelError: the adapter does not name its base, or the base does not exist or is itself an adapter.
    """
    path = resolve(model)
    if not isinstance(path, Path) or not (path / _ADAPTER_CONFIG).is_file():
        return None
    where = f"policy.model = {model!r}: {_ADAPTER_CONFIG}"
    try:
        base = json.loads((path / _ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{where} cannot be read ({error}); save the adapter again") from None
    if not base or not isinstance(base, str):
        raise ModelError(f"{where} does not name the base; add it there as base_model_name_or_path")
    base = str(path / base) if (path / base).exists() else base
    try:
        resolved = resolve(base)
    except ModelError:
        raise ModelError(
            f"{where} names the base {base!r}, which is missing or not a model; write its directory, GGUF file or Hub id "
            "there as base_model_name_or_path"
        ) from None
    if isinstance(resolved, Path) and (resolved / _ADAPTER_CONFIG).is_file():
        raise ModelError(f"{where} names the base {base!r}, which is an adapter too; merge that one first")
    return base


def plain_directory(model: str, reader: str) -> Path | str:
    """``resolve(model)`` for a ``reader`` that supports only plain Hugging Face directories.

    Raises:
        ModelError: ``model`` is a GGUF file or an adapter; or as ``resolve``.
    """
    path = resolve(model)
    kind = "a GGUF file" if is_gguf(path) else "an adapter" if base_of(model) else None
    if kind:
        raise ModelError(
            f'policy.model = {model!r}: {kind}, which {reader} does not read here; set rollout.engine = "torch", or write a '
            f'plain directory with `python -c "{_AS_DIRECTORY.format(model)}"` and give that'
        )
    return path


@contextmanager
def opened(model: str | Path) -> Iterator[Source]:
    """The parts of ``model``, valid within the context; errors raised in it become a one-line ``ModelError``.

    Raises:
        ModelError: there is no such model, or it does not load.
    """
    model = str(model)
    path, base = resolve(model), base_of(model)
    weights = resolve(base) if base else path
    if is_gguf(weights):
        from search_e1.training.gguf_file import check_gguf  # imports the optional GGUF reader

        check_gguf(model, Path(weights))
    try:
        empty = TemporaryDirectory(prefix="search-e1-gguf-") if is_gguf(weights) else nullcontext("")
        with empty as directory, no_bars(), relayed_warnings(f"policy.model = {model!r}"):
            yield _source(model, path, weights, Path(directory))
    except SearchE1Error:
        raise
    except Exception as error:  # damaged files raise anything; tokenizers raise plain ``Exception``
        its = f"its base {base!r}" if base else "it"
        raise ModelError(f"policy.model = {model!r}: {its} does not load: {problem_of(error, weights)}") from None


def _source(model: str, path: Path | str, weights: Path | str, empty: Path) -> Source:
    options: dict[str, str] = {}
    adapter = path if weights is not path and isinstance(path, Path) else None
    gguf = Path(weights) if is_gguf(weights) else None
    prompts = tuple(place for place in (adapter, weights) if isinstance(place, Path) and place.is_dir())
    if gguf:
        # In a directory of its own: transformers would pick up the tokenizer or adapter of other models beside it.
        (empty / "model.gguf").symlink_to(gguf.resolve())
        weights, options = empty, {"gguf_file": "model.gguf"}
    if adapter and (adapter / "tokenizer_config.json").is_file():
        return Source(model, weights, adapter, prompts, adapter, gguf, options)
    return Source(model, weights, weights, prompts, adapter, gguf, options, options)


def _check_directory(model: str, path: Path) -> None:
    where = f"policy.model = {model!r}"
    weights = [file for file in path.glob("*.safetensors") if not file.name.startswith("adapter_")]
    adapter = (path / _ADAPTER_CONFIG).is_file()
    if adapter and weights and (path / "config.json").is_file():
        raise ModelError(f"{where}: holds a model and an adapter; move one of them to a directory of its own")
    for needed in () if adapter else ("config.json", "tokenizer_config.json"):
        if not (path / needed).is_file():
            files = sorted(path.glob("*.[gG][gG][uU][fF]"))
            remedy = f"give the GGUF file itself: {files[0]}" if files else "give the directory of a Hugging Face model"
            raise ModelError(f"{where}: no {needed} in it; {remedy}")
    needed = ADAPTER_WEIGHTS if adapter else "*.safetensors"
    if any(path.glob(needed)):
        return
    pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern)]
    if pickled:
        raise ModelError(
            f"{where}: weights only as pickles ({pickled[0]}), which can run code; if you trust them, save them as safetensors"
        )
    if adapter:
        raise ModelError(f"{where}: no {ADAPTER_WEIGHTS} in it; give the directory of a whole PEFT adapter")


def problem_of(error: BaseException, weights: Path | str) -> str:
    """A library's error about ``weights`` in one line; names the JSON file if one is broken."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    problem = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if broken := _broken_json(weights):
        return broken
    if "custom code" in problem:
        return "it brings code of its own; read that, and set policy.trust_remote_code = true to run it"
    if is_gguf(weights):
        return f"{problem}; give another GGUF file of this model, or its Hugging Face directory"
    if "couldn't connect" in problem:
        remedy = f"download it elsewhere (`hf download {weights} --local-dir DIR`) and give that directory"
        return f"it is not on this machine, and the Hub cannot be reached; {remedy}"
    if isinstance(weights, str) and "config.json" in problem:
        return f"{problem}; if it is an adapter or a GGUF file, download it and give its path"
    return problem


def _broken_json(directory: Path | str) -> str:
    """The first JSON file of a model's directory that is not a JSON object, and why; empty if there is none."""
    for file in sorted(directory.glob("*.json")) if isinstance(directory, Path) else ():
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
        except RecursionError:
            return f"{file.name} is nested too deeply"
        except (OSError, ValueError) as error:
            return f"{file.name} is not JSON ({error})"
        if not isinstance(held, dict):
            return f"{file.name} holds {type(held).__name__}, not an object"
    return ""
