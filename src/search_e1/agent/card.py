"""The model card of a bundle, ``README.md`` in the Hub's format: what the agent is, how to use it, how it was made."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load

from search_e1.agent.bundle import Bundle
from search_e1.agent.ollama import LOST
from search_e1.config import NEW
from search_e1.errors import ModelError
from search_e1.retrieval.directory import IndexManifest
from search_e1.training.gguf_file import metadata
from search_e1.training.sources import SMALL, base_of, is_gguf, resolve

logger = logging.getLogger(__name__)
FILE = "README.md"
_NOTICES = re.compile(r"(licen[cs]e|notice|copying|use_policy)([._-].*)?", re.IGNORECASE)
_LICENSE_KEYS = ("license", "license_name", "license_link")
_IN_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$")
_HUB = re.compile(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)/?$")
_TEXT = """\
# {name}

A search agent: it reasons, writes search queries, reads what comes back, and answers with the passages that hold the answer.
The weights are a plain causal language model; the loop that searches for it is the Python package `search-e1` (version
{made_by}).

## How to ask it

`AGENT` stands for this directory, or for its name on the Hub.

```python
from search_e1 import Agent

with Agent.open("AGENT"{opening}) as agent:
    answer = agent.ask("QUESTION")
    print(answer, [source.passage.title for source in answer.sources if source.holds])
```

    search-e1 ask "QUESTION" --agent AGENT{options}
    search-e1 serve AGENT{options}    # OpenAI's chat completions over HTTP, and a page
    search-e1 mcp AGENT{options}      # a tool for other agents

## What it searches

{searched}

## How it was trained

{base}. Trained in the stages below by GRPO interleaved with offline self-distillation
([Search-E1](https://arxiv.org/abs/2605.22511)); this is `{stage}`, in {dtype}. Seed {seed}.

{table}

EM: share of answers that equal a gold answer after normalization, greedy, with its 95% interval. Searches and sampled tokens
are means over questions.

- Training questions: {train}. Evaluation questions: {eval}.
- Limits, in training and in use: at most {limits.max_searches} searches of {limits.topk} passages,
  {limits.max_action_tokens} tokens a generation, {limits.max_observation_tokens} an observation, {limits.max_tokens} in all.
- Versions: {versions}.

`agent.json` has every key of the run's config.

## What is lost without the loop

Without that loop, in plain transformers, vLLM or Ollama, there is {lost}. The figures above do not hold then.

## License

{license} The license of the passages and of the questions is that of their sources.
"""


@dataclass(frozen=True, slots=True)
class Base:
    """Facts about the policy that a run started from."""

    described: str
    id: str | None = None
    """Its id on the Hub."""
    license: Mapping[str, Any] | None = None
    """The keys ``license``, ``license_name`` and ``license_link`` of its card."""
    notices: tuple[Path, ...] = ()
    """Files with its license."""


def base_of_run(model: str) -> Base:
    """Facts about ``policy.model``: its Hub id, and its license from its card or GGUF file."""
    if model == NEW:
        return Base("The policy was trained from scratch (a cold start on demonstrations)")
    try:
        model = base_of(model) or model
        found = resolve(model)
    except ModelError:  # the base is not on this machine, but its name is known
        found = model
    if is_gguf(found):
        return _of_gguf(Path(found))
    place = found if isinstance(found, Path) else _cached(found)
    known = _front_matter(place / FILE) if place else {}
    cached = _IN_CACHE.search(str(place.resolve())) if place else None
    id = found if isinstance(found, str) and "/" in found else f"{cached[1]}/{cached[2]}" if cached else known.get("base_model")
    described = "the small policy that comes with search-e1" if model == SMALL else f"`{id or plain_name(model)}`"
    return Base(
        f"The base is {described}",
        id=id if isinstance(id, str) else None,
        license={key: str(known[key]) for key in _LICENSE_KEYS if key in known} if "license" in known else None,
        notices=tuple(file for file in sorted(place.iterdir()) if _is_notice(file)) if place else (),
    )


def _of_gguf(file: Path) -> Base:
    license = metadata(file, "general.license")
    home = _HUB.match(metadata(file, "general.source.repo_url") or metadata(file, "general.base_model.0.repo_url") or "")
    return Base(
        f"The base is `{file.name}`, dequantized",
        id=home[1] if home else None,
        license={"license": license} if license else None,
        notices=tuple(other for other in sorted(file.parent.iterdir()) if _is_notice(other)),
    )


def _is_notice(file: Path) -> bool:
    return file.is_file() and bool(_NOTICES.fullmatch(file.name))


def _cached(id: str) -> Path | None:
    """The directory of a Hub id's downloaded files on this machine; ``None`` if they are not cached."""
    found = try_to_load_from_cache(id, "config.json") if id.count("/") == 1 else None
    return Path(found).parent if isinstance(found, str) else None


def _front_matter(file: Path) -> dict[str, Any]:
    """The metadata of a model card; empty if there is none, or, with a warning, if it cannot be read."""
    if not file.is_file():
        return {}
    try:
        return metadata_load(file) or {}
    except Exception as error:  # malformed YAML can raise anything
        logger.warning("%s: cannot be read (%s); the bundle's card names no license", file, str(error).partition("\n")[0])
        return {}


def plain_name(model: str) -> str:
    """``policy.model`` without the path on this machine."""
    return Path(model).name if Path(model).expanduser().exists() or model.startswith((".", "~", "/")) else model


def text(bundle: Bundle, base: Base, indexes: Sequence[IndexManifest], encoder: str | None) -> str:
    """The complete card. ``encoder``: a dense index's."""
    trained = bundle.trained
    data = trained["config"]["data"]
    by_address = not bundle.index
    front = ModelCardData(
        base_model=base.id, library_name="transformers", pipeline_tag="text-generation",
        tags=["search-agent", "search-e1", "retrieval-augmented-generation", "question-answering", "grpo"],
        **(base.license or {}),
    )  # fmt: skip
    body = _TEXT.format(
        name=bundle.name, made_by=bundle.made_by, base=base.described, stage=trained["stage"], dtype=bundle.dtype,
        seed=trained["seed"], limits=bundle.limits, lost=LOST, table=_table(trained["policies"]),
        opening=', url="URL"' if by_address and not bundle.url else "",
        options=" --url URL" if by_address and not bundle.url else "",
        searched=_searched(bundle, indexes, encoder),
        train=", ".join(f"`{name}`" for name in data["train"]),
        eval=", ".join(f"{name} (`{file}`)" for name, file in data["eval"].items()),
        versions=", ".join(f"{name} {version}" for name, version in trained["versions"].items()) or "not recorded",
        license=_license(base),
    )  # fmt: skip
    return f"---\n{front.to_yaml()}\n---\n\n{body}"


def _table(policies: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| policy | questions | EM | 95% | searches | sampled tokens |", "|---|---|---|---|---|---|"]
    for row in policies:
        low, high = row.get("em_interval") or (None, None)
        span = "" if low is None else f"{low:.3f} to {high:.3f}"
        lines.append(
            f"| {row['stage']} | {row['n']} | {row['em']:.3f} | {span} | {row['searches']:.2f} | {row['tokens']:.1f} |"
        )
    return "\n".join(lines)


def _searched(bundle: Bundle, indexes: Sequence[IndexManifest], encoder: str | None) -> str:
    kinds = " and ".join(manifest.kind for manifest in indexes)
    what = f"{bundle.passages:,} passages by {kinds}" if indexes else "The passages behind a server"
    checksum = f", checksum `{bundle.checksum}`" if bundle.checksum else ", whose checksum is not known"
    lines = [f"{what}{checksum}."]
    if bundle.index:
        lines.append("The index, with the texts of all passages, is in `index/`.")
    elif bundle.url:
        lines.append(f"They are not in this bundle but at {bundle.url}; `url` or `--url` gives another address.")
    else:
        lines.append("They are not in this bundle: give their server (`url`) or their index (`index`) when you open it.")
    if encoder:
        lines.append(
            f"Queries are encoded by `{plain_name(encoder)}`, which is not in this bundle: `encoder` tells `Agent.open` where "
            "it is, if it has moved."
        )
    return " ".join(lines)


def _license(base: Base) -> str:
    files = ", ".join(f"`{file.name}`" for file in base.notices)
    beside = f" Its files are beside this one: {files}." if files else ""
    if not base.license:
        return f"The license of the base is unknown: ask its authors before you share the weights.{beside}"
    license = base.license.get("license_name") or base.license["license"]
    return f"The base is under `{license}`, by its own statement; so are the weights here, unless you say otherwise.{beside}"
