"""`search-e1 plan` compared with measurements: peak memory and seconds of an update, by stage.

    python benchmarks/plan.py                                              # small shapes on the CPU, a few minutes
    python benchmarks/plan.py --shapes qwen2.5-1.5b qwen2.5-3b --device cuda --dtype bfloat16 --tokens 4096 --rows 4 \\
        --checkpointing --constants measured.toml
    python benchmarks/plan.py --scaling configs/search-e1-3b.toml          # plans only: from 1 to 64 GPUs

Every measurement is a separate process with random weights: the training loop's passes over generated trajectories and its
optimizer; then the same trajectories are scored (forward only). Memory is, on a CPU, the rise of the peak resident size since
before the policy was made, on a GPU the allocator's peak. `share` is operations/s as a share of those of large matrix products
here (with --gpu, of the GPU's data sheet) in training, and `scoring` in scoring; --constants writes the smallest, for
`search-e1 plan --constants`.
"""

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; the command line does the same

warnings.filterwarnings("ignore", category=FutureWarning)

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from contest import measured as in_a_process  # beside this file
from contest import versions
from search_e1.config import Config, load
from search_e1.lab.plan.constants import GIB, Gpu, load_constants
from search_e1.lab.plan.memory import Memory, MemoryModel, training_jobs
from search_e1.lab.plan.plan import make_plan
from search_e1.lab.plan.shapes import SHAPES, read_config, shape_of
from search_e1.lab.plan.work import forward_flops, training_flops
from search_e1.types import Sample

OWN_SHAPES = {
    "45m": dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8),
    "110m": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    "280m": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=20, num_attention_heads=16),
}
STAGES = ("grpo", "grpo-lora", "distill", "distill-all")
CONSTANTS = load_constants()
MICRO_BATCHES = 2
SHARES = {"training": "share", "forward": "scoring"}
"""Planner constant -> column whose minimum it is."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["45m", "110m"], choices=["small", *OWN_SHAPES, *SHAPES])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--mixed", action="store_true", help="keep trained weights in float32 beside --dtype bfloat16")
    parser.add_argument("--rows", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a trajectory; the teacher's rows are twice as long")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--gpu", help="shares are of this GPU's data sheet; with --scaling, the GPU to plan for")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--constants", type=Path, help="write the measured share here")
    parser.add_argument("--scaling", type=Path, help="a config to plan for 1 to 64 GPUs; nothing is measured")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(row_of(arguments.measure, arguments.shapes[0], arguments)))
        return
    rows = scale(arguments) if arguments.scaling else compare(arguments)
    out = Console(width=110)
    if not arguments.scaling:
        device = torch.cuda.get_device_name() if arguments.device != "cpu" else f"{os.cpu_count()} cores"
        out.print(
            f"{platform.machine()}, {device}, {versions('torch', 'transformers')} "
            f"({torch.get_num_threads()} threads); {arguments.dtype}, {MICRO_BATCHES} passes of {arguments.rows} x "
            f"{arguments.tokens} tokens, one repeat"
        )
        if errors := [abs(row["ratio"] - 1) for row in rows if "failed" not in row]:
            out.print(f"memory: median error {statistics.median(errors):.1%}, largest {max(errors):.1%}")
    table = Table(*max(rows, key=len), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    out.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    if arguments.constants:
        least = {key: min(row[name] for row in rows if "failed" not in row) for key, name in SHARES.items()}
        lines = (f"{key} = {share:.3f}\n" for key, share in least.items())
        arguments.constants.write_text("".join(("[hours]\n", *lines)))


def scale(arguments: argparse.Namespace) -> list[dict]:
    """One row per number of GPUs: peak GiB per GPU of each stage, and hours."""
    rows = []
    for gpus in (1, 2, 4, 8, 16, 32, 64):
        plan = make_plan(load(arguments.scaling), CONSTANTS.gpu(arguments.gpu or "h100"), gpus, CONSTANTS)
        memory = {f"{m.stage} GiB": m.total / GIB for m in plan.memory}
        hours = {f"{work.stage} h": work.hours for work in plan.work}
        rows.append({"GPUs": gpus, **memory, **hours, "all h": plan.hours, "GPU-h": plan.hours * gpus})
    return rows


def compare(arguments: argparse.Namespace) -> list[dict]:
    """One row per stage and shape; ``ratio``: computed / measured."""
    # Returns freed memory at once, so that the resident size counts only live memory.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": str(2**18)}
    rows = []
    for stage in arguments.stages:
        for shape in arguments.shapes:
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", stage, "--shapes", shape]
            row = {"stage": stage, "shape": shape, **in_a_process(command, environment=environment)}
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)  # in case a long run is interrupted
    return rows


def row_of(stage: str, shape: str, arguments: argparse.Namespace) -> dict:
    found, peak = measure(stage, shape, arguments), product_flops(arguments)
    memory, trained, taught, scored = compute(stage, shape, arguments)
    hours = CONSTANTS.hours
    seconds = (trained / hours["training"] + taught / hours["forward"]) / peak
    return {
        "M weights": round(shape_of(model_config(shape)).parameters / 1e6, 1),
        "MiB measured": found["bytes"] / 2**20,
        "computed": memory.total / 2**20,
        "ratio": memory.total / found["bytes"],
        "s": found["seconds"],
        "s computed": seconds,
        "s ratio": seconds / found["seconds"],
        "share": (trained + taught) / found["seconds"] / peak,
        "scoring": scored / found["scoring"] / peak,
    }


def product_flops(arguments: argparse.Namespace) -> float:
    """Operations/s: from the data sheet of ``--gpu``, else of the best of ten large matrix products."""
    if arguments.gpu:
        return CONSTANTS.gpu(arguments.gpu).tflops * 1e12
    dtype = getattr(torch, arguments.dtype)
    size = 8192 if arguments.device != "cpu" else 1024
    left, right = (torch.randn(size, size, device=arguments.device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        started = now(arguments.device)
        left @ right
        seconds.append(now(arguments.device) - started)
    return 2 * size**3 / min(seconds)


def model_config(shape: str):
    if shape in OWN_SHAPES:
        common = dict(vocab_size=8192, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32_768)
        return AutoConfig.for_model("qwen2", **common, **OWN_SHAPES[shape])
    return read_config(shape)


def stage_config(stage: str, arguments: argparse.Namespace) -> Config:
    """A config with passes of ``--rows`` trajectories of ``--tokens``; the teacher's rows are twice as long."""
    rows = arguments.rows * (1 if stage.startswith("grpo") else 2)
    training = {
        "micro_batch_tokens": rows * arguments.tokens,
        "gradient_checkpointing": arguments.checkpointing,
        "master_weights": arguments.mixed or arguments.dtype == "float32",
    }
    return Config.model_validate({
        "run": "unused",
        "policy": {"model": "small", "dtype": arguments.dtype, "device": arguments.device},
        "data": {"corpus": "unused", "train": ["unused"], "eval": {"unused": "unused"}},
        "rollout": {"max_tokens": arguments.tokens, "max_action_tokens": arguments.tokens // 10},
        "grpo": {"lora": {} if stage == "grpo-lora" else None, "training": training},
        "distill": {"weights": "all" if stage == "distill-all" else "lora", "training": training},
    })  # fmt: skip


def compute(stage: str, shape: str, arguments: argparse.Namespace) -> tuple[Memory, float, float, float]:
    """Memory of an update; operations of its training passes, of its teacher's passes, and of scoring."""
    config, settings = stage_config(stage, arguments), model_config(shape)
    counted, kind = shape_of(settings), stage.partition("-")[0]
    job = training_jobs(config)[kind]
    memory = MemoryModel(settings, counted, config, Gpu(name="any", memory_gib=80), 1, CONSTANTS).update(kind, job)
    tokens = MICRO_BATCHES * arguments.rows * arguments.tokens
    trained = training_flops(counted, tokens, arguments.tokens, tokens / 2, job.lora, memory.recompute)
    taught = forward_flops(counted, 2 * tokens, 2 * arguments.tokens) + counted.head * tokens if job.has_teacher else 0.0
    return memory, trained, taught, forward_flops(counted, tokens, arguments.tokens) + counted.head * tokens


def measure(stage: str, shape: str, arguments: argparse.Namespace) -> dict:
    """Seconds of an update with the training loop's parts, and of scoring (best of two each), and peak memory."""
    from search_e1.training.batch import make_batch, micro_batches, normalized_weights
    from search_e1.training.objectives.grpo import Grpo
    from search_e1.training.objectives.self_distillation import SelfDistillation
    from search_e1.training.optimizer import make_optimizers
    from search_e1.training.policy import with_adapter
    from search_e1.training.trained import TrainedPolicy

    torch.manual_seed(0)
    before = peak(arguments.device)
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(model_config(shape), dtype=getattr(torch, arguments.dtype))
    config = stage_config(stage, arguments)
    job = training_jobs(config)[stage.partition("-")[0]]
    if job.training.master_weights and not job.lora:
        model = model.float()
    grpo = stage.startswith("grpo")
    objective = Grpo(config.grpo, arguments.tokens) if grpo else SelfDistillation(config.distill)
    adapted = with_adapter(model, job.lora) if job.lora else model
    dtype = getattr(torch, arguments.dtype)
    policy = TrainedPolicy(adapted, job.training, frozen_start=job.has_copy, dtype=dtype)
    policy.model.train()
    optimizers = make_optimizers(policy.model, job.training, 1e-5)
    samples = make_samples(MICRO_BATCHES * arguments.rows, arguments.tokens, has_teacher=job.has_teacher)
    weights = normalized_weights(samples, objective.average, float, arguments.tokens)
    seconds = []
    for _ in range(3):
        started = now(arguments.device)
        for group in micro_batches(samples, job.training.micro_batch_tokens, packed=policy.packed):
            batch = make_batch([samples[i] for i in group], [weights[i] for i in group], packed=policy.packed)
            policy.run(batch, objective.loss, objective.teacher)[0].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(now(arguments.device) - started)
    risen = peak(arguments.device) - before
    scoring, rows = [], [s.model_copy(update={"teacher_prompt_ids": None}) for s in samples]
    for _ in range(3):
        started = now(arguments.device)
        policy.logprobs(rows)
        scoring.append(now(arguments.device) - started)
    return {"seconds": min(seconds[1:]), "scoring": min(scoring[1:]), "bytes": risen}


def make_samples(count: int, tokens: int, *, has_teacher: bool) -> list[Sample]:
    """Samples of ``tokens`` tokens: one eighth is the prompt, and half of the response was sampled."""
    prompt, response = tokens // 8, tokens - tokens // 8
    mask = tuple(int(i % 50 < 25) for i in range(response))
    return [
        Sample(
            question_id=str(number), prompt_ids=tuple(range(1, 1 + prompt)), action_mask=mask,
            response_ids=tuple((7 * number + i) % 100 + 1 for i in range(response)),
            advantages=tuple((-1.0) ** number for _ in mask),
            teacher_prompt_ids=tuple(i % 100 + 1 for i in range(2 * tokens - response)) if has_teacher else None,
        )
        for number in range(count)
    ]  # fmt: skip


def peak(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    gc.collect()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def now(device: str) -> float:
    """Seconds of wall-clock time on a GPU, of CPU time on a CPU, which may be busy with other work."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
