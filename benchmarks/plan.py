"""What `search-e1 plan` computes, beside what is measured: peak memory and seconds of each stage's step.

    python benchmarks/plan.py                                              # small shapes on the CPU, a few minutes
    python benchmarks/plan.py --shapes qwen2.5-1.5b qwen2.5-3b --device cuda --dtype bfloat16 --tokens 4096 --checkpointing
    python benchmarks/plan.py --scaling configs/search-e1-3b.toml          # computed alone: from 1 to 64 GPUs

Every measurement is a process of its own, with random weights. On a CPU its memory is the rise of the peak resident size from
before the policy is made, on a GPU the allocator's peak. `grpo` is the stage's own trainer on made trajectories, `distill` its
two passes, its loss and AdamW, `sample` is the generator. Seconds are computed from the ceiling of matrix products measured
here and the utilisation of the first shape, whose own error is 0 by that; the utilisation is what `plan --mfu` takes.
"""

import argparse
import gc
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; the command line does the same

warnings.filterwarnings("ignore", category=FutureWarning)

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import search_e1.training.policy as policies
from distill import random_rows  # beside this file
from search_e1.config import Config, DistillConfig, GrpoConfig, LoraConfig, PolicyConfig, RolloutConfig, load
from search_e1.lab.plan.hardware import GIB, Cluster, gpu
from search_e1.lab.plan.memory import Estimator, Job, Memory
from search_e1.lab.plan.plan import make_plan
from search_e1.lab.plan.shapes import SHAPES, read_config, shape_of
from search_e1.lab.plan.work import passed, trained
from search_e1.training.policy import Policy, with_adapter
from search_e1.types import ActionKind, Question, StopReason, Trajectory, Turn

OWN_SHAPES = {
    "45m": dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8),
    "110m": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    "280m": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=20, num_attention_heads=16),
}
STAGES = ("grpo", "grpo-lora", "distill", "distill-all", "sample")
SAMPLED = 16  # tokens of a row in `sample`
MICRO_BATCHES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=["small", "45m", "110m"], choices=["small", *OWN_SHAPES, *SHAPES]
    )
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--rows", type=int, default=2, help="of a micro-batch, and sampled together")
    parser.add_argument(
        "--tokens", type=int, default=256, help="of the longest trajectory; the teacher's rows are twice as long"
    )
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--scaling", type=Path, help="a config to plan for 1 to 64 GPUs; nothing is measured")
    parser.add_argument("--gpu", default="h100-80gb", help="with --scaling")
    parser.add_argument("--sharding", default="full", choices=["none", "optimizer", "full"], help="with --scaling")
    parser.add_argument("--engine", default="transformers", choices=["transformers", "vllm"], help="with --scaling")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.shapes[0], arguments)))
        return
    out = Console(width=100)
    rows = scaled(arguments) if arguments.scaling else compared(arguments)
    if arguments.scaling:
        print_table(out, rows, arguments)
        return
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else f"{os.cpu_count()} cores"
    out.print(
        f"{platform.machine()}, {device}, torch {torch.__version__} ({torch.get_num_threads()} threads), transformers "
        f"{version('transformers')}, trl {version('trl')}; {arguments.dtype}, {MICRO_BATCHES} micro-batches "
        f"of {arguments.rows} x {arguments.tokens} tokens a step"
    )
    print_table(out, rows, arguments)
    for what in ("memory", "time"):
        errors = [
            abs(row[f"{what} ratio"] - 1) for row in rows if row["shape"] != arguments.shapes[0] or what == "memory"
        ]
        if not errors:
            continue
        out.print(f"{what}: median error {statistics.median(errors):.1%}, largest {max(errors):.1%}")


def print_table(out: Console, rows: list[dict], arguments: argparse.Namespace) -> None:
    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("stage", "shape") else "right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    out.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def scaled(arguments: argparse.Namespace) -> list[dict]:
    """A row for each number of GPUs: memory of a rank in GiB at the peak of each stage, and hours by stage."""
    rows = []
    for gpus in (1, 2, 4, 8, 16, 32, 64):
        cluster = Cluster(
            gpu=gpu(arguments.gpu),
            gpus=gpus,
            sharding=arguments.sharding if gpus > 1 else "none",
            engine=arguments.engine,
        )
        plan = make_plan(load(arguments.scaling), cluster, largest_rows=False)
        memory = {m.stage: m.total / GIB for m in plan.memory}
        hours = {w.stage: w.hours for w in plan.work}
        rows.append({
            "GPUs": gpus,
            "update GiB": memory.get("grpo update", 0.0),
            "sample GiB": max(memory["pool, evaluation"], memory.get("grpo sampling", 0.0)),
            "distill GiB": memory["distillation"],
            "fits": "yes" if plan.fits else "no",
            "grpo h": hours.get("grpo", 0.0),
            "pool h": hours["pool"],
            "distill h": hours["lead"] + hours["distillation"],
            "evaluation h": hours["evaluation"],
            "all h": plan.hours,
            "GPU-h": plan.hours * gpus,
        })  # fmt: skip
    return rows


def compared(arguments: argparse.Namespace) -> list[dict]:
    """A row for each stage and shape; the ratios are computed / measured."""
    ceiling = products(arguments)
    rows = []
    for stage in arguments.stages:
        share = None
        for shape in arguments.shapes:
            measured = in_a_process(stage, shape, arguments)
            memory, flops = computed(stage, shape, arguments)
            utilisation = flops / measured["seconds"] / ceiling
            share = share or utilisation
            row = {
                "stage": stage,
                "shape": shape,
                "M weights": round(shape_of(model_config(shape)).parameters / 1e6, 1),
                "MiB measured": measured["bytes"] / 2**20,
                "computed": memory.total / 2**20,
                "memory ratio": memory.total / measured["bytes"],
                "s measured": measured["seconds"],
                "utilisation": utilisation,
                "time ratio": flops / ceiling / share / measured["seconds"],
            }
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)  # a long run that is cut short has told what it knew
    return rows


def in_a_process(stage: str, shape: str, arguments: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--measure", stage, "--shapes", shape, "--device", arguments.device]
    command += ["--dtype", arguments.dtype, "--rows", str(arguments.rows), "--tokens", str(arguments.tokens)]
    command += ["--checkpointing"] * arguments.checkpointing
    # Freed memory goes back at once, so that the resident size is what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": str(2**18)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{stage}, {shape}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def products(arguments: argparse.Namespace) -> float:
    """Operations a second of large matrix products, the best of ten."""
    size = 8192 if arguments.device.startswith("cuda") else 1024
    left, right = (
        torch.randn(size, size, device=arguments.device, dtype=getattr(torch, arguments.dtype)) for _ in range(2)
    )
    seconds = []
    for _ in range(10):
        started = now(arguments.device)
        left @ right
        seconds.append(now(arguments.device) - started)
    return 2 * size**3 / min(seconds)


# The computed side.


def model_config(shape: str):
    if shape in OWN_SHAPES:
        from transformers import AutoConfig

        common = dict(vocab_size=8192, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32_768)
        return AutoConfig.for_model("qwen2", **common, **OWN_SHAPES[shape])
    return read_config(shape)


def stage_config(stage: str, arguments: argparse.Namespace) -> Config:
    """Two micro-batches a step, trajectories of at most ``--tokens``, teacher's rows of twice that."""
    trainer = {"per_device_train_batch_size": arguments.rows, "gradient_checkpointing": arguments.checkpointing}
    return Config(
        run=Path("unused"),
        policy=PolicyConfig(model="small", dtype=arguments.dtype, device=arguments.device),
        data={"corpus": "unused", "train": ["unused"], "eval": {"unused": "unused"}},
        rollout=RolloutConfig(
            max_tokens=arguments.tokens, max_action_tokens=arguments.tokens // 4, batch_size=arguments.rows
        ),
        grpo=GrpoConfig(
            steps=3,
            questions_per_step=arguments.rows,
            group_size=MICRO_BATCHES,
            lora=LoraConfig() if stage == "grpo-lora" else None,
            trainer=trainer,
        ),
        distill=DistillConfig(
            batch_size=MICRO_BATCHES * arguments.rows,
            teacher="live",
            weights="all" if stage == "distill-all" else "lora",
            trainer=trainer,
        ),
    )


def computed(stage: str, shape: str, arguments: argparse.Namespace) -> tuple[Memory, float]:
    """Memory, and operations of an optimiser step, or of one step of sampling's reading."""
    config, counted = stage_config(stage, arguments), shape_of(model_config(shape))
    own = gpu(memory_gib=80, tflops=1, gb_per_second=1)
    estimator = Estimator(model_config(shape), counted, config, Cluster(gpu=own))
    rows, tokens = arguments.rows, arguments.tokens
    every = MICRO_BATCHES * rows
    if stage == "sample":
        memory = estimator.sample("sample", rows=rows, tokens=tokens)
        return memory, passed(counted, rows * (tokens - SAMPLED), tokens)
    if stage.startswith("grpo"):
        job = Job.of(config.grpo.lora, config.grpo.trainer)
        # Without Triton TRL scores every position.
        scored = every * (tokens if arguments.device == "cpu" else tokens // 2)
        flops = trained(counted, every * tokens, tokens, scored, job)
        recomputed = 2 * counted.head * scored
        return estimator.update(rows, MICRO_BATCHES), flops + recomputed
    distill = config.distill
    job = Job.of(distill.lora if distill.weights == "lora" else None, distill.trainer)
    positions = sum(len(row["student_positions"]) for row in pair_rows(arguments, 8)) * MICRO_BATCHES
    flops = trained(counted, every * (tokens * 1.1), tokens, positions, job)
    flops += passed(counted, every * 2 * tokens, 2 * tokens) + 2 * counted.head * positions
    return estimator.distill(rows, MICRO_BATCHES), flops


# The measured side.


def measure(stage: str, shape: str, arguments: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    before = resident(arguments.device)
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(model_config(shape), dtype=getattr(torch, arguments.dtype))
    config = stage_config(stage, arguments)
    run = {"sample": sampled, "grpo": stepped, "grpo-lora": stepped, "distill": distilled, "distill-all": distilled}
    seconds, peak = run[stage](model, config, arguments)
    return {"seconds": seconds, "bytes": peak - before}


def resident(device: str) -> int:
    if device.startswith("cuda"):
        return 0
    gc.collect()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else resident(device)


def now(device: str) -> float:
    """Seconds: of the clock on a GPU; of CPU time on a CPU, which may be busy with other work."""
    if not device.startswith("cuda"):
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def stepped(model, config: Config, arguments: argparse.Namespace) -> tuple[float, int]:
    """Seconds of a step of the stage's own trainer, whose trajectories are made, not sampled; and the peak after it."""
    from search_e1.grpo import trainer

    reader = policies.load_reader("small", PolicyConfig(model="small"))
    trainer.rollout = lambda generator, retriever, starts, *_, **__: [  # type: ignore[assignment]
        made_trajectory(start.question.id, n, arguments.tokens) for n, start in enumerate(starts)
    ]
    ticks: list[float] = []
    peaks: list[int] = []

    def progress(done: int, total: int, figure: str = "") -> None:
        ticks.append(now(arguments.device))
        peaks.append(peak(arguments.device))  # before the policy is saved, which copies it

    questions = [Question(id=str(n), text="who", answers=("x",)) for n in range(4 * arguments.rows)]
    with tempfile.TemporaryDirectory() as out:
        trainer.train(
            Policy(model, reader.tokenizer, reader.prompts), questions, None, config.grpo, config.rollout,  # type: ignore[arg-type]
            seed=0, out=Path(out), progress=progress,
        )  # fmt: skip
    return min(b - a for a, b in itertools.pairwise(ticks)), max(peaks)


def made_trajectory(question: str, number: int, tokens: int) -> Trajectory:
    """``tokens`` long or a little shorter, so that rows are padded; half of the response was sampled."""
    length = tokens - 4 * (number % 3)
    prompt, turn = tokens // 8, (length - tokens // 8) // 4
    turns = [
        Turn(
            action_ids=tuple(range(1, 1 + turn // 2)),
            action_text="x",
            kind=ActionKind.SEARCH if n < 3 else ActionKind.MALFORMED,
            argument="x" if n < 3 else None,
            observation_ids=tuple(range(1, 1 + turn - turn // 2)) if n < 3 else (),
        )
        for n in range(4)
    ]
    missing = length - prompt - sum(len(t.action_ids) + len(t.observation_ids) for t in turns)
    turns[-1] = turns[-1].model_copy(update={"action_ids": tuple(range(1, 1 + len(turns[-1].action_ids) + missing))})
    return Trajectory(
        question_id=question,
        prompt_ids=tuple(range(1, 1 + prompt)),
        turns=tuple(turns),
        stop_reason=StopReason.MALFORMED,
        reward=float(number % 2) and 0.0,
    )


def pair_rows(arguments: argparse.Namespace, vocabulary: int):
    settings = argparse.Namespace(length=2 * arguments.tokens, batch_size=arguments.rows, sampled=0.5)
    return random_rows(settings, vocabulary)


def distilled(model, config: Config, arguments: argparse.Namespace) -> tuple[float, int]:
    from search_e1.distill.collate import collate, pack
    from search_e1.distill.passes import SelfDistillation, packs

    lora = config.distill.lora if config.distill.weights == "lora" else None
    rows = pair_rows(arguments, model.config.vocab_size)
    packed = arguments.device != "cpu" and packs(model)
    batch = {k: v.to(arguments.device) for k, v in (pack(rows) if packed else collate(rows, 0)).items()}
    trained_model = (with_adapter(model, lora) if lora else model).train()
    if arguments.checkpointing:
        trained_model.gradient_checkpointing_enable()
        if lora:
            trained_model.enable_input_require_grads()
    distillation = SelfDistillation(trained_model, config.distill)
    optimizer = torch.optim.AdamW((p for p in trained_model.parameters() if p.requires_grad), lr=1e-5, fused=True)
    seconds = []
    for _ in range(3):
        started = now(arguments.device)
        for _ in range(MICRO_BATCHES):
            distillation(**batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(now(arguments.device) - started)
    return min(seconds[1:]), peak(arguments.device)


def sampled(model, config: Config, arguments: argparse.Namespace) -> tuple[float, int]:
    """Seconds of reading the contexts, and the peak once some tokens were sampled after them."""
    from search_e1.rollout.engines.base import Request
    from search_e1.rollout.engines.torch import HFGenerator

    tokenizer = policies.load_reader("small", PolicyConfig(model="small")).tokenizer
    model.generation_config.eos_token_id = None
    generator = HFGenerator(model, tokenizer, batch_size=arguments.rows)
    source = torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(2):
        with generator.session(temperature=1.0, stop=(), max_tokens=arguments.tokens) as session:
            for row in range(arguments.rows):
                length = arguments.tokens - SAMPLED - 4 * (row % 3)
                prompt = torch.randint(tokenizer.vocab_size, (length,), generator=source).tolist()
                session.submit(Request(key=row, prompt=prompt, max_new_tokens=SAMPLED, seed=row))
            started = now(arguments.device)
            done = session.step()
            seconds.append(now(arguments.device) - started)
            while not done:
                done = session.step()
    return min(seconds), peak(arguments.device)


if __name__ == "__main__":
    main()
