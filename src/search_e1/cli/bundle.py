"""The verb ``search-e1 bundle``: makes an agent's directory from a run, and pushes it to the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from search_e1.errors import ConfigError

if TYPE_CHECKING:
    from search_e1.agent.bundle import Bundle

console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)


def bundle(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run, or of a bundle to push.")],
    out: Annotated[Path | None, typer.Option("--out", help="Directory for the new bundle.")] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", metavar="STAGE", help="Stage of the policy, e.g. grpo-1. Default: the last.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="Type of the weights. Default: the run's compute type."),
    ] = None,
    index: Annotated[
        list[Path] | None,
        typer.Option("--index", help="Current directory of the run's index. Given twice, their rankings are fused."),
    ] = None,
    no_index: Annotated[bool, typer.Option("--no-index", help="Leave the index out; it is searched elsewhere.")] = False,
    url: Annotated[str | None, typer.Option("--url", help="With --no-index: retrieval server of the same passages.")] = None,
    ollama: Annotated[
        bool, typer.Option("--ollama", help="Add a Modelfile. Ollama runs the model without the search loop.")
    ] = False,
    push: Annotated[str | None, typer.Option("--push", metavar="OWNER/NAME", help="Upload it to the Hugging Face Hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: make the repository private.")] = False,
) -> None:
    """Make one directory with a trained policy, its index, its limits and a model card; or push one."""
    from search_e1.agent import publish
    from search_e1.agent.bundle import FILE, Bundle

    if private and not push:
        raise ConfigError("--private needs --push OWNER/NAME; give both")
    if push:
        publish.check_push(push)  # before the work
    if (source / FILE).exists():
        if out or policy or dtype or index or no_index or url or ollama or not push:
            raise ConfigError(f"{source} is a bundle; it can only be pushed: --push OWNER/NAME [--private]")
        made = Bundle.read(source)
    else:
        made = _made(source, out, policy, dtype, index or [], no_index, url, ollama)
    if push:
        _push(made, push, private)


def _made(
    run: Path,
    out: Path | None,
    policy: str | None,
    dtype: Literal["float32", "bfloat16", "float16"] | None,
    index: list[Path],
    no_index: bool,
    url: str | None,
    ollama: bool,
) -> "Bundle":
    from search_e1.agent.make import Searched, make_bundle
    from search_e1.agent.ollama import FILE, LOST
    from search_e1.runs.stopping import on_signals

    if out is None:
        raise ConfigError("no directory for the bundle; give --out DIR")
    if url and not no_index:
        raise ConfigError("--url replaces the index; give --no-index with it")
    if index and no_index:
        raise ConfigError("--index and --no-index exclude each other; give one of them")
    with on_signals():  # a signal leaves nothing half-written
        made = make_bundle(run, out, stage=policy, dtype=dtype, searched=Searched(index, not no_index, url), modelfile=ollama)
    total = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    console.print(f"{out}: {made.trained['stage']} in {made.dtype}, {_passages(made)}, {total / 1e6:.1f} MB")
    options = "" if made.index or made.url else " --url URL"
    console.print(f'ask it: search-e1 ask --agent {out}{options} "QUESTION"')
    if ollama:
        console.print(f"{out / FILE}: run `ollama create NAME -f {FILE}` there; {LOST}", style="yellow")
    return made


def _passages(made: "Bundle") -> str:
    if made.index:
        return f"{made.passages:,} passages"
    return f"passages at {made.url}" if made.url else "without passages (ask it with --index DIR or --url URL)"


def _push(made: "Bundle", repository: str, private: bool) -> None:
    from search_e1.agent import publish
    from search_e1.errors import SearchE1Error

    if made.index:
        console.print(f"pushes the texts of {made.passages:,} passages too; --no-index leaves them out", style="yellow")
    try:
        address = publish.push(made, repository, private=private)
    except SearchE1Error as error:
        raise type(error)(f"{error} (the bundle is in {made.directory})") from error
    console.print(f'{address}; ask it: search-e1 ask --agent {repository} "QUESTION"')
