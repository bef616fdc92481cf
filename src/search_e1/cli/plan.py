"""The verb ``search-e1 plan``."""

import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from search_e1.lab.plan.hardware import Gpu

console = Console(highlight=False)
notices = Console(stderr=True, highlight=False)


class Sharding(StrEnum):
    NONE = "none"
    OPTIMIZER = "optimizer"
    FULL = "full"


class Engine(StrEnum):
    TRANSFORMERS = "transformers"
    VLLM = "vllm"


def plan(
    context: typer.Context,
    config: Annotated[Path, typer.Option("--config", help="TOML file; every key can be set as --section.key VALUE.")],
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="h100-80gb, a100-80gb, 4090-24gb, ... Default: the one here.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=1, help="How many, over all nodes. Default: launch.processes x launch.nodes."),
    ] = None,
    memory: Annotated[float | None, typer.Option("--memory", help="GiB of a GPU.")] = None,
    tflops: Annotated[float | None, typer.Option("--tflops", help="Of a GPU, dense, bfloat16.")] = None,
    bandwidth: Annotated[float | None, typer.Option("--bandwidth", help="Of a GPU's memory, GB a second.")] = None,
    sharding: Annotated[
        Sharding | None,
        typer.Option(
            "--sharding",
            help="What is divided among GPUs: ZeRO-2 (optimizer), ZeRO-3 and FSDP2 (full). Default: as launch.sharding.",
        ),
    ] = None,
    engine: Annotated[Engine, typer.Option("--engine", help="What samples.")] = Engine.TRANSFORMERS,
    gpu_memory_utilization: Annotated[
        float, typer.Option("--gpu-memory-utilization", min=0.05, max=1, help="vLLM's share of a GPU's memory.")
    ] = 0.9,
    like: Annotated[Path | None, typer.Option("--like", help="Run directory: take its trajectories' lengths.")] = None,
    passages: Annotated[int | None, typer.Option("--passages", min=1, help="In the corpus.")] = None,
    mfu: Annotated[
        float, typer.Option("--mfu", min=0.001, max=1, help="Share of the operations a second kept in training.")
    ] = 0.35,
    json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """Compute memory, tokens, hours and disk of a run, before a GPU is rented. Leaves with 1 if it does not fit.

    policy.model is a model's directory, its config.json, or a known name (qwen2.5-3b, qwen3-4b, llama-3.2-3b, ...): no
    weights are read, and nothing is asked from the network.
    """
    from search_e1.cli.display.planning import show_plan
    from search_e1.config import load
    from search_e1.lab.plan import lengths
    from search_e1.lab.plan.hardware import Cluster
    from search_e1.lab.plan.plan import make_plan
    from search_e1.lab.plan.work import Rates

    loaded = load(config, context.args)
    divided = "none" if loaded.launch.sharding == "none" else "full"
    cluster = Cluster(
        gpu=_gpu(gpu, memory, tflops, bandwidth), gpus=gpus or loaded.launch.processes * (loaded.launch.nodes or 1),
        sharding=sharding.value if sharding else divided, engine=engine.value,
        gpu_memory_utilization=gpu_memory_utilization,
    )  # fmt: skip
    measured = lengths.measured(like, loaded) if like else None
    with warnings.catch_warnings(), notices.status("tracing", spinner="line") as status:
        warnings.simplefilter("ignore")
        made = make_plan(
            loaded, cluster, lengths=measured, rates=Rates(training=mfu), passages=passages,
            progress=lambda stage: status.update(f"tracing {stage}"),
        )  # fmt: skip
    if json:
        print(made.model_dump_json(indent=2))
    else:
        show_plan(console, made)
    if not made.fits:
        raise typer.Exit(1)


def _gpu(name: str | None, memory: float | None, tflops: float | None, bandwidth: float | None) -> "Gpu":
    from search_e1.lab.plan.hardware import gpu, here

    if name is None and (memory, tflops, bandwidth) == (None, None, None) and (found := here()):
        return found
    return gpu(name, memory_gib=memory, tflops=tflops, gb_per_second=bandwidth)
