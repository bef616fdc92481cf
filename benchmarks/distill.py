"""What a distillation step costs beside the bare passes it consists of, and what it costs at a real model's shape.

    python benchmarks/distill.py                                      # the small policy, on pairs of the small world
    python benchmarks/distill.py --shape qwen2.5-3b --device cuda     # random weights in the shape of a real model

The first table trains the small policy with the stage itself and, in turn, makes only the passes of the same batches: the
teacher's forward pass, the student's forward and backward pass, both heads at the sampled positions. The second one times
the step at a shape with each divergence that fits into memory, and relates it to the measured ceiling of matrix products.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; the command line does the same

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import search_e1.training.policy as policies
from divergence import CANDIDATES  # beside this file
from search_e1.config import DistillConfig, LoraConfig, PairsConfig, PolicyConfig, PoolConfig, RolloutConfig
from search_e1.data.world import make_world, write
from search_e1.distill import trainer
from search_e1.distill.collate import Row, collate, encode, pack, pad_id
from search_e1.distill.passes import SelfDistillation, packs
from search_e1.lab.plan.shapes import SHAPES
from search_e1.retrieval.bm25 import Bm25Index
from search_e1.rollout import pool
from search_e1.rollout.engines.torch import TorchEngine
from search_e1.selfdistill import pairs as mining
from search_e1.training.head import hidden_at
from search_e1.training.policy import Policy, with_adapter
from search_e1.types import Pair

TINY = dict(
    model_type="qwen2", vocab_size=8192, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32_768,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step")
    parser.add_argument("--steps", type=int, default=8, help="steps of the small policy in one repeat")
    parser.add_argument(
        "--shape", choices=["tiny", *SHAPES], help="random weights in this shape instead of the small policy"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of --shape")
    parser.add_argument("--length", type=int, default=4096, help="of the teacher's sequences, with --shape")
    parser.add_argument(
        "--sampled", type=float, default=0.3, help="share of the response that was sampled, with --shape"
    )
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, with --shape")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=["ours"], help="losses, with --shape")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments = parser.parse_args()
    rows = shape_rows(arguments) if arguments.shape else small_rows(arguments)
    out = Console(width=100)
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else f"{os.cpu_count()} cores"
    out.print(
        f"{platform.machine()}, {device}, torch {torch.__version__} ({torch.get_num_threads()} threads), transformers "
        f"{version('transformers')}; {arguments.repeats} repeats, {arguments.batch_size} pairs a step"
    )
    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    out.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


# The small policy: the stage's own step beside its passes.


def small_rows(arguments: argparse.Namespace) -> list[dict]:
    """The step of the stage and the bare passes of the same batches, in turn; the ratio is taken repeat by repeat."""
    config = DistillConfig(batch_size=arguments.batch_size, learning_rate=3e-4, teacher="live")
    with tempfile.TemporaryDirectory() as scratch:
        pairs = world_pairs(Path(scratch), arguments.batch_size * arguments.steps)
        steps, bare = [], []
        for repeat in range(arguments.repeats + 1):  # the first one warms up
            out = Path(scratch) / f"out-{repeat}"
            trainer.train(small_policy(), pairs, config, seed=repeat, out=out)
            seconds = [json.loads(line)["seconds"] for line in (out / "steps.jsonl").read_text().splitlines()]
            # The first step of a trainer holds its start.
            steps.append(statistics.median(seconds[1:]))
            bare.append(bare_passes(small_policy(), pairs, config))
    ratios = [a / b for a, b in zip(steps, bare, strict=True)][1:]
    return [
        {"what": "a step of the stage", "ms": 1000 * statistics.median(steps[1:]), "ratio": statistics.median(ratios)},
        {"what": "its bare passes", "ms": 1000 * statistics.median(bare[1:]), "ratio": 1.0},
    ]


def small_policy() -> Policy:
    return policies.load("small", PolicyConfig(model="small"))


def world_pairs(directory: Path, count: int) -> list[Pair]:
    """Pairs of the small world, mined from a pool as a run does."""
    from search_e1.data.corpus import read_corpus
    from search_e1.data.questions import load_questions

    write(make_world(), directory / "world", train=300, dev=1, test=1, seed=0)
    index = Bm25Index.build(read_corpus(directory / "world" / "corpus.jsonl"), directory / "index")
    policy = small_policy()
    limits = RolloutConfig(
        topk=2, max_searches=5, max_action_tokens=48, max_observation_tokens=128, max_tokens=1024, batch_size=128
    )
    questions = load_questions(directory / "world" / "train.jsonl")[: 2 * count]
    (directory / "pool").mkdir()
    pool.sample(
        TorchEngine(policy.model, policy.tokenizer, batch_size=128),
        index, questions, policy.prompts, PoolConfig(group_size=8), limits, seed=0,
        out=directory / "pool",
    )  # fmt: skip
    found, _ = mining.select(pool.read(directory / "pool" / pool.FILE), PairsConfig(students=2))
    if len(found) < count:
        raise SystemExit(f"{len(found)} pairs found, {count} needed; ask for fewer --steps")
    return found[:count]


def bare_passes(policy: Policy, pairs: Sequence[Pair], config: DistillConfig) -> float:
    """Median seconds of the passes of a batch: what the step would cost if everything else were free."""
    rows = [encode(policy.tokenizer, policy.prompts, pair, number=n) for n, pair in enumerate(pairs)]
    rows.sort(key=lambda row: len(row["input_ids"]))  # as the trainer's length groups
    model = with_adapter(policy.model, config.lora).train()
    distillation = SelfDistillation(model, config)
    seconds = []
    for at in range(0, len(rows), config.batch_size):
        batch = collate(rows[at : at + config.batch_size], pad_id(policy.tokenizer))
        started = time.perf_counter()
        with torch.no_grad(), model.disable_adapter():
            _head(hidden_at(distillation.decoder, batch, "teacher"), distillation)
        student = hidden_at(distillation.decoder, batch, "student")
        logits = _head(student, distillation)
        torch.autograd.backward(logits, torch.full_like(logits, 1e-6))
        seconds.append(time.perf_counter() - started)
        model.zero_grad()
    return statistics.median(seconds)


def _head(hidden: Tensor, distillation: SelfDistillation) -> Tensor:
    return torch.nn.functional.linear(hidden, distillation.head.weight, distillation.head.bias)


# A real model's shape: random weights, random ids, and each divergence.


def shape_rows(arguments: argparse.Namespace) -> list[dict]:
    """For each divergence: tokens a second, peak memory, the loss's share of the step, and utilisation."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    shape = dict(TINY if arguments.shape == "tiny" else SHAPES[arguments.shape])
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape), dtype=dtype)
    rows = random_rows(arguments, model.config.vocab_size)
    packed = packs(model)
    batch = {k: v.to(device) for k, v in (pack(rows) if packed else collate(rows, 0)).items()}
    adapted = with_adapter(model, LoraConfig()).train()
    if arguments.checkpointing:
        adapted.gradient_checkpointing_enable()
        adapted.enable_input_require_grads()
    distillation = SelfDistillation(adapted, DistillConfig())
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-5)
    ceiling = matmul_flops(device, dtype)
    work, tokens = step_flops(model, rows), sum(len(row["input_ids"]) + len(row["student_ids"]) for row in rows)
    made = []
    for name in arguments.candidates:
        try:
            figures = timed_step(distillation, optimizer, batch, CANDIDATES[name], arguments.repeats)
        except torch.OutOfMemoryError:
            made.append({"what": name, "tokens/s": "-", "s/step": "-", "peak GiB": "out of memory"})
            continue
        seconds, loss_seconds, peak = figures
        made.append({
            "what": name,
            "tokens/s": tokens / seconds,
            "s/step": seconds,
            "peak GiB": peak / 2**30 if peak else "-",
            "loss share": loss_seconds / seconds,
            "utilisation": work / seconds / ceiling,
        })  # fmt: skip
    print(
        f"{arguments.shape}, {arguments.dtype}, {'packed' if packed else 'padded'}, LoRA 16, sequences of "
        f"{arguments.length}: {tokens} tokens and {len(batch['student_index'])} positions a step; products of "
        f"{ceiling / 1e12:.2f} TFLOP/s"
    )
    return made


def random_rows(arguments: argparse.Namespace, vocabulary: int) -> list[Row]:
    """Teacher's rows of ``--length``, half of it prompt; the student's prompt is a tenth of that."""
    generator = torch.Generator().manual_seed(0)
    rows: list[Row] = []
    for number in range(arguments.batch_size):
        prompt, response = arguments.length // 2, arguments.length - arguments.length // 2
        ids = torch.randint(vocabulary, (arguments.length,), generator=generator).tolist()
        # Turns of 100 ids, of which the first ones were sampled.
        offsets = [o for o in range(response) if o % 100 < 100 * arguments.sampled]
        plain = prompt // 10
        rows.append({
            "name": str(number),
            "number": number,
            "input_ids": ids,
            "student_ids": ids[prompt - plain :],
            "teacher_positions": [prompt + o - 1 for o in offsets],
            "student_positions": [plain + o - 1 for o in offsets],
            "classes": [],
        })  # fmt: skip
    return rows


def timed_step(
    distillation: SelfDistillation,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    divergence: Callable[..., Tensor],
    repeats: int,
) -> tuple[float, float, int]:
    """Median seconds of a step, and of its loss alone; peak bytes on a GPU, else 0."""
    gc.collect()
    cuda = batch["student_index"].is_cuda
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    mask = torch.ones_like(batch["student_index"], dtype=torch.bool)
    steps, losses = [], []
    for _ in range(repeats + 1):
        started = _now(cuda)
        with torch.no_grad(), distillation.model.disable_adapter():
            teacher = hidden_at(distillation.decoder, batch, "teacher")
        student = hidden_at(distillation.decoder, batch, "student")
        cut = student.detach().requires_grad_()
        begun = _now(cuda)
        divergence(cut, teacher, distillation.head.weight, mask).backward()
        losses.append(_now(cuda) - begun)
        student.backward(cut.grad)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(_now(cuda) - started)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return statistics.median(steps[1:]), statistics.median(losses[1:]), peak


def step_flops(model: torch.nn.Module, rows: Sequence[Row]) -> float:
    """Floating-point operations that a step needs: two for each weight and token and pass; the gradient of frozen weights is
    not needed, and what is computed again by checkpointing does not count. Attention is causal: half of its square."""
    config = model.config
    head = config.vocab_size * config.hidden_size
    body = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lora" not in name)
    width = config.num_hidden_layers * config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    total = 0.0
    for row in rows:
        teacher, student, positions = len(row["input_ids"]), len(row["student_ids"]), len(row["student_positions"])
        total += 2 * body * (teacher + 2 * student) + 3 * 2 * head * positions
        total += (
            2 * width * (teacher**2 + 3 * student**2)
        )  # scores and values, 4 x width x n^2 / 2; backward twice that
    return total


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best of some square matrix products, in operations a second: the ceiling that utilisation is measured by."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        started = _now(left.is_cuda)
        left @ right
        seconds.append(_now(left.is_cuda) - started)
    return 2 * size**3 / min(seconds)


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
