"""The verb ``search-e1 plan``."""

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from search_e1.cli.config_file import ConfigArgument

console = Console(highlight=False)


def plan(
    context: typer.Context,
    config: ConfigArgument,
    gpu: Annotated[str, typer.Option("--gpu", help="GPU: h100, h200, a100, 4090, ... (docs/scaling.md).")],
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Number of GPUs, over all nodes.")] = 1,
    constants: Annotated[
        Path | None, typer.Option("--constants", help="TOML file with measured constants, GPUs or models.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Compute memory, tokens, hours and disk of a run, before a GPU is rented. Exit status 1 if it does not fit.

    policy.model is a model's directory, its config.json, or a known name (qwen2.5-3b, qwen3-4b, llama-3.2-3b, ...): no
    weights are read, and the network is not used.
    """
    from search_e1.cli.display.planning import show_plan
    from search_e1.config import load
    from search_e1.lab.plan.constants import load_constants
    from search_e1.lab.plan.plan import make_plan

    loaded, known = load(config, context.args), load_constants(constants)
    with warnings.catch_warnings(), Console(stderr=True).status("tracing passes, which takes a second or more each"):
        warnings.simplefilter("ignore")  # torch warns about fake tensors
        planned = make_plan(loaded, known.gpu(gpu), gpus, known)
    if json:
        print(planned.model_dump_json(indent=2))
    else:
        show_plan(console, planned)
    if planned.problems:
        raise typer.Exit(1)
