"""An update of GRPO, distillation or a cold start, compared with TRL's on the same samples.

    python benchmarks/update.py                                # GRPO, SmolLM2-135M's shape, lengths of real trajectories
    python benchmarks/update.py --shape small                  # the package's policy
    python benchmarks/update.py --shape qwen2.5-3b --weights lora --longest 4096 --device cuda --dtype bfloat16

Weights and ids are random; the lengths of prompts, actions and observations are those of trajectories on real questions
(real_lengths.json). Each measurement is a separate process, and the contestants alternate. Time runs from samples in memory to
the optimizer's step; memory is the peak beyond the model and samples. On a GPU, a warm-up step comes first, which compiles
kernels and finds the micro-batch size.

TRL's GRPO is its trainer. TRL's distillation is its chunked loss in plain passes over padded rows, since its trainer samples by
itself and has no privileged prompt.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; the command line does the same
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from rich.console import Console
from rich.table import Table

from contest import measured, versions  # beside this file
from memory import PeakMemory
from search_e1.config import DistillConfig, GrpoConfig, LoraConfig, PolicyConfig, TrainingConfig
from search_e1.lab.plan.shapes import shape_of
from search_e1.lab.plan.work import forward_flops, training_flops
from search_e1.runs.allocation import keep_freed_memory
from search_e1.runs.context import StageContext
from search_e1.training import policy as policies
from search_e1.training.loop import Schedule, train
from search_e1.training.objectives.base import Objective
from search_e1.training.objectives.grpo import Grpo
from search_e1.training.objectives.self_distillation import SelfDistillation
from search_e1.training.objectives.sft import Sft
from search_e1.training.policy import with_adapter
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Sample
from shapes import ALL, GROUP, random_model, samples_of

MAX_TOKENS = 4096
RATE = 1e-6


def main() -> None:
    arguments = parser().parse_args()
    if arguments.contestant:
        print(json.dumps(measure(arguments)))
        return
    rows: list[dict[str, Any]] = []
    for _ in range(arguments.repeats):
        for name in arguments.contestants:
            row = measured([sys.executable, __file__, *sys.argv[1:], "--contestant", name])
            rows.append({"contestant": name, **row})
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    show(arguments, rows)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--objective", choices=["grpo", "distill", "sft"], default="grpo")
    made.add_argument("--shape", choices=["small", *ALL], default="smollm2-135m")
    made.add_argument("--weights", choices=["all", "lora"], default="all", help="what is trained")
    made.add_argument("--trajectories", type=int, default=64)
    made.add_argument("--longest", type=int, help="scale lengths so that the longest row has this many tokens")
    made.add_argument("--repeats", type=int, default=1)
    made.add_argument("--steps", type=int, default=1, help="steps measured together in each repeat")
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="compute dtype, by autocast")
    made.add_argument("--micro-batch-tokens", type=int, help="for search-e1; default: the config's")
    made.add_argument("--micro-batch", type=int, default=8, help="TRL's per_device_train_batch_size; 8 is its default")
    made.add_argument("--checkpointing", action="store_true", help="TRL's; ours decides by what fits")
    made.add_argument("--contestants", nargs="+", choices=["ours", "TRL"], default=["ours", "TRL"])
    made.add_argument("--json", type=Path, help="write the rows here as well")
    made.add_argument("--contestant", choices=["ours", "TRL"], help=argparse.SUPPRESS)
    return made


# One contestant, run in this process.


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    keep_freed_memory()
    model = model_of(arguments)
    scale = 0.25 if arguments.shape == "small" else 1.0  # its context is 2,048 tokens and its texts are short
    samples = samples_of(
        arguments.trajectories, model.config.vocab_size, scale=scale, longest=arguments.longest,
        taught=arguments.objective == "distill",
    )  # fmt: skip
    flops = flops_of(arguments, model, samples)
    theirs = trl_grpo if arguments.objective == "grpo" else trl_distill
    contest = ours if arguments.contestant == "ours" else theirs
    with tempfile.TemporaryDirectory() as out:
        figures = contest(arguments, model, samples, Path(out))
    tokens, sampled = sum(map(_read, samples)), sum(sum(s.action_mask) for s in samples)
    return {"tokens": tokens, "sampled": sampled, "flops": flops, **figures, "tokens_s": tokens / figures["seconds"]}


def _read(sample: Sample) -> int:
    """Number of tokens in the student's row."""
    return len(sample.prompt_ids) + len(sample.response_ids)


def model_of(arguments: argparse.Namespace) -> Any:
    """The model: frozen weights in the compute dtype, trained weights in float32."""
    if arguments.shape == "small":
        torch.manual_seed(0)
        return policies.load("small", PolicyConfig(model="small", device=arguments.device)).model
    dtype = getattr(torch, arguments.dtype if arguments.weights == "lora" else "float32")
    return random_model(arguments.shape, arguments.device, dtype)


def flops_of(arguments: argparse.Namespace, model: Any, samples: Sequence[Sample]) -> float:
    """Operations that an update needs in any implementation; recomputation is not counted."""
    shape = shape_of(model.config)
    lora = LoraConfig() if arguments.weights == "lora" else None
    total = 0.0
    for sample in samples:
        scored, width = len(sample.positions), _read(sample)
        total += training_flops(shape, width, width, scored, lora, recompute=False)
        if sample.teacher_prompt_ids:
            total += forward_flops(shape, len(sample), len(sample)) + 2 * shape.head * scored
    return total


def ours(arguments: argparse.Namespace, model: Any, samples: list[Sample], out: Path) -> dict[str, Any]:
    config = TrainingConfig(micro_batch_tokens=arguments.micro_batch_tokens)
    objective: Objective = Sft()
    if arguments.objective == "grpo":
        objective = Grpo(GrpoConfig(training=config), MAX_TOKENS)
    elif arguments.objective == "distill":
        objective = SelfDistillation(DistillConfig())
    if arguments.weights == "lora":
        model = with_adapter(model, LoraConfig())
    dtype = getattr(torch, arguments.dtype)
    trained = TrainedPolicy(model, config, frozen_start=objective.needs_start, dtype=dtype)
    clock = Clock(arguments)
    heads = HeadClock(arguments.device, objective)

    class Source:
        figures: dict[str, float] = {}

        def next(self, step: int) -> dict[str, list[Sample]]:
            clock.begins(step)
            heads.begins(step)
            return {"update": samples}

    schedule = Schedule(clock.warm + arguments.steps, RATE)
    steps = train(trained, Source(), {"update": heads}, config, schedule, StageContext(out))
    figures = clock.ends()
    found = {"loss": steps[0]["loss"], "norm": steps[0]["grad_norm"], "pass_tokens": trained.micro_batch_tokens}
    share = heads.seconds() / figures["seconds"] / arguments.steps
    return {**figures, **found, "checkpointing": trained.checkpointing, "packed": trained.packed, "head_share": share}


class Clock:
    """Seconds, CPU seconds and peak memory of the measured steps; on a GPU, the first step is a warm-up and excluded."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.steps = arguments.device, arguments.steps
        self.warm = int(self.device != "cpu")
        self._peak = PeakMemory(self.device)

    def begins(self, step: int) -> None:
        if step == self.warm:
            self._peak.__enter__()
            self._begun = time.perf_counter(), time.process_time()

    def ends(self) -> dict[str, float]:
        self._peak.__exit__(None, None, None)  # waits for a GPU
        seconds, cpu = time.perf_counter() - self._begun[0], time.process_time() - self._begun[1]
        return {"seconds": seconds / self.steps, "cpu": cpu / self.steps, "mib": self._peak.mib}


class HeadClock:
    """An objective with a timed loss, which contains all products of the output head, forward and backward."""

    def __init__(self, device: str, objective: Any) -> None:
        self._objective, self._device, self._spans, self._step = objective, device, [], 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def begins(self, step: int) -> None:
        if step == int(self._device != "cpu"):
            self._spans.clear()

    def _mark(self) -> Any:
        if self._device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def loss(self, states: Any, batch: Any) -> Any:
        begun = self._mark()
        made = self._objective.loss(states, batch)
        self._spans.append((begun, self._mark()))
        return made

    def seconds(self) -> float:
        if self._device == "cpu":
            return sum(end - begun for begun, end in self._spans)
        torch.cuda.synchronize()
        return sum(begun.elapsed_time(end) for begun, end in self._spans) / 1000


def trl_grpo(arguments: argparse.Namespace, model: Any, samples: list[Sample], out: Path) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig as AdapterConfig
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = policies.load_reader("small", PolicyConfig(model="small")).tokenizer  # required by TRL; nothing is encoded
    clock, asked, found = Clock(arguments), iter(range(10**6)), {}

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        clock.begins(next(asked))
        return {
            "prompt_ids": [list(s.prompt_ids) for s in samples],
            "completion_ids": [list(s.response_ids) for s in samples],
            "env_mask": [list(s.action_mask) for s in samples],
            "logprobs": None,
            "gain": [s.advantages[0] if s.advantages else 0.0 for s in samples],
        }

    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == args.max_steps:
                found.update(clock.ends())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            found.setdefault("loss", logs.get("loss"))
            found.setdefault("norm", logs.get("grad_norm"))

    count, half = len(samples), arguments.dtype == "bfloat16"
    settings = GRPOConfig(
        output_dir=str(out), loss_type="grpo", beta=0.0, num_generations=GROUP, max_steps=clock.warm + arguments.steps,
        learning_rate=RATE, per_device_train_batch_size=arguments.micro_batch,
        gradient_accumulation_steps=count // arguments.micro_batch, generation_batch_size=count,
        max_completion_length=MAX_TOKENS, use_cpu=arguments.device == "cpu", bf16=half,
        gradient_checkpointing=arguments.checkpointing, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_steps=1, lr_scheduler_type="constant", temperature=1.0,
    )  # fmt: skip
    ranks = LoraConfig()  # the same as in `with_adapter`
    adapter = AdapterConfig(r=ranks.rank, lora_alpha=ranks.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = GRPOTrainer(
            model=model, args=settings, reward_funcs=lambda gain, **_: gain, processing_class=tokenizer,
            peft_config=adapter if arguments.weights == "lora" else None,
            train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(count // GROUP)]}), rollout_func=rollout,
            callbacks=[Ends()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {name: found[name] for name in ("seconds", "cpu", "loss", "norm", "mib")}


def trl_distill(arguments: argparse.Namespace, model: Any, samples: list[Sample], out: Path) -> dict[str, Any]:
    from contextlib import nullcontext

    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    if arguments.weights == "lora":
        model = with_adapter(model, LoraConfig())
        teacher = model
    else:
        teacher = random_model(arguments.shape, arguments.device, getattr(torch, arguments.dtype))
    if arguments.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, fused=True)
    order = sorted(samples, key=len, reverse=True)
    clock, half = Clock(arguments), arguments.dtype == "bfloat16"

    def states(of: Any, part: Sequence[Sample], prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Hidden states of padded rows at the response tokens: [1, response tokens, hidden size]."""
        rows = [[*prompt, *s.response_ids] for prompt, s in zip(prompts, part, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=arguments.device)
        base = of.get_base_model() if hasattr(of, "get_base_model") else of
        hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        kept = [h[len(p) - 1 : len(p) - 1 + len(s.response_ids)] for h, p, s in zip(hidden, prompts, part, strict=True)]
        return torch.cat(kept)[None]

    for step in range(clock.warm + arguments.steps):
        clock.begins(step)
        parts = [order[at : at + arguments.micro_batch] for at in range(0, len(order), arguments.micro_batch)]
        loss = 0.0
        for part in parts:
            with torch.autocast(arguments.device, torch.bfloat16, enabled=half, cache_enabled=False):
                with torch.no_grad(), model.disable_adapter() if teacher is model else nullcontext():
                    taught = states(teacher, part, [s.teacher_prompt_ids or () for s in part])
                student = states(model, part, [s.prompt_ids for s in part])
                head = model.get_output_embeddings().weight.to(student.dtype)
                mask = torch.tensor([[bool(bit) for s in part for bit in s.action_mask]], device=arguments.device)
                made = _chunked_divergence_loss(student, taught, head, head.detach(), mask, beta=0.0)[0] / len(parts)
            made.backward()
            loss += made.item()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
    return {**clock.ends(), "loss": loss, "norm": norm}


def show(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    out = Console(width=100)
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else f"{os.cpu_count()} cores"
    good = [row for row in rows if "failed" not in row]
    tokens, sampled = (good[0][key] if good else 0 for key in ("tokens", "sampled"))
    out.print(
        f"{device}, {versions('torch', 'trl')}, {arguments.dtype}; {arguments.objective}, {arguments.shape}, "
        f"{arguments.weights}, {arguments.trajectories} trajectories, {tokens:,} tokens, {sampled:,} of them sampled; "
        f"{arguments.repeats} repeats of {arguments.steps} steps"
    )
    table = Table(box=None, pad_edge=False)
    for name in ("", "s, median", "CPU s, median", "tokens/s", "peak MiB", "loss", "gradient norm"):
        table.add_column(name, justify="left" if not name else "right")
    for contestant in arguments.contestants:
        own = [row for row in good if row["contestant"] == contestant]
        if not own:
            table.add_row(contestant, next(row["failed"] for row in rows if row["contestant"] == contestant))
            continue
        mid = {key: statistics.median(row[key] for row in own) for key in ("seconds", "cpu", "tokens_s", "mib", "loss", "norm")}
        table.add_row(
            contestant, f"{mid['seconds']:.2f}", f"{mid['cpu']:.2f}", f"{mid['tokens_s']:,.0f}", f"{mid['mib']:,.0f}",
            f"{mid['loss']:.5f}", f"{mid['norm']:.5f}",
        )  # fmt: skip
    out.print(table)
    by_name = [[row for row in rows if row["contestant"] == name] for name in ("ours", "TRL")]
    pairs = [(a, b) for a, b in zip(*by_name, strict=False) if "failed" not in a and "failed" not in b]
    if pairs:
        ratios = {key: statistics.median(a[key] / b[key] for a, b in pairs) for key in ("seconds", "cpu", "mib")}
        out.print(
            f"ours / TRL: time {ratios['seconds']:.2f}, CPU time {ratios['cpu']:.2f}, memory {ratios['mib']:.2f} "
            "(asked for: 0.7 of the time at most, 0.8 for the small policy, and 0.5 of the memory)"
        )


if __name__ == "__main__":
    main()
