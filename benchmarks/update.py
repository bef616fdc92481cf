"""A GRPO update beside TRL's, on the same trajectories.

    python benchmarks/update.py                                # SmolLM2-135M's shape, lengths of real trajectories
    python benchmarks/update.py --shape small                  # the policy of the package
    python benchmarks/update.py --shape smollm2-135m --device cuda --dtype bfloat16

Weights are random, ids too; the lengths of prompts, actions and observations are those of trajectories of real questions
(real_lengths.json). Each measurement is a process of its own, and the contestants take turns. Time is from samples in memory
to the optimiser's step; memory is the peak beyond what the process held with model and samples in memory.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; the command line does the same

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from memory import PeakMemory  # beside this file
from search_e1.config import GrpoConfig, PolicyConfig, TrainingConfig
from search_e1.runs.allocation import keep_freed_memory
from search_e1.runs.context import StageContext
from search_e1.training import policy as policies
from search_e1.training.loop import Schedule, train
from search_e1.training.objectives.grpo import Grpo, advantages
from search_e1.training.trained import TrainedPolicy
from search_e1.types import Sample

GROUP = 8
MAX_TOKENS = 4096
LENGTHS = Path(__file__).parent / "real_lengths.json"
SMOLLM2 = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=100000,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["smollm2-135m", "small"], default="smollm2-135m")
    parser.add_argument("--trajectories", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--micro-batch-tokens", type=int, help="ours; default: the config's")
    parser.add_argument("--micro-batch", type=int, default=8, help="TRL's per_device_train_batch_size; 8 is its default")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--contestant", choices=["ours", "TRL"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        print(json.dumps(measure(arguments)))
        return
    rows: list[dict[str, Any]] = []
    for _ in range(arguments.repeats):
        rows += [run(name) for name in ("ours", "TRL")]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    show(arguments, rows)


def run(contestant: str) -> dict[str, Any]:
    """The measurement of one contestant in a process of its own. One that fails is a row, not a crash."""
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--contestant", contestant], capture_output=True, text=True)
    if done.returncode < 0:
        why = signal.Signals(-done.returncode).name
        return {"contestant": contestant, "failed": f"ended by {why}: out of memory?"}
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
        return {"contestant": contestant, "failed": reason}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def samples_of(arguments: argparse.Namespace, vocabulary: int) -> list[Sample]:
    """Trajectories of real lengths with random ids and rewards; every group has right and wrong ones."""
    chooser = random.Random(0)
    lengths = json.loads(LENGTHS.read_text())["trajectories"]
    shrink = 1 if arguments.shape != "small" else 4  # its context is 2,048 tokens, its texts are short
    made: list[Sample] = []
    for at in range(0, arguments.trajectories, GROUP):
        gains = advantages([1.0, 0.0, *(float(chooser.random() < 0.5) for _ in range(GROUP - 2))])
        for i, gain in enumerate(gains):
            prompt, turns = lengths[(at + i) % len(lengths)]
            mask = [bit for action, seen in turns for bit in [1] * (action // shrink or 1) + [0] * (seen // shrink)]
            ids = [chooser.randrange(10, vocabulary) for _ in range(prompt // shrink + len(mask))]
            cut = prompt // shrink
            made.append(
                Sample(
                    question_id=str(at),
                    prompt_ids=tuple(ids[:cut]),
                    response_ids=tuple(ids[cut:]),
                    action_mask=tuple(mask),
                    advantages=(gain,) * len(mask),
                )
            )
    return made


def model_of(arguments: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    if arguments.shape == "small":
        return policies.load("small", PolicyConfig(model="small", device=arguments.device)).model
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2))
    return model.to(arguments.device, getattr(torch, arguments.dtype))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    keep_freed_memory()
    model = model_of(arguments)
    samples = samples_of(arguments, model.config.vocab_size)
    contest = ours if arguments.contestant == "ours" else trl
    with tempfile.TemporaryDirectory() as out:
        figures = contest(arguments, model, samples, Path(out))
    tokens = sum(len(s) for s in samples)
    return {"contestant": arguments.contestant, "tokens": tokens, "sampled": sum(map(_sampled, samples)), **figures}


def _sampled(sample: Sample) -> int:
    return sum(sample.action_mask)


def ours(arguments: argparse.Namespace, model: Any, samples: list[Sample], out: Path) -> dict[str, float]:
    config = GrpoConfig(training=TrainingConfig(micro_batch_tokens=arguments.micro_batch_tokens))
    trained = TrainedPolicy(model, config.training, frozen_start=False)

    class Source:
        figures: dict[str, float] = {}

        def next(self, step: int) -> dict[str, list[Sample]]:
            return {"grpo": samples}

    with PeakMemory(arguments.device) as peak:
        clock, used = time.perf_counter(), time.process_time()
        objective = Grpo(config, MAX_TOKENS)
        steps = train(trained, Source(), {"grpo": objective}, config.training, Schedule(1, 1e-6), StageContext(out))
        seconds, cpu = time.perf_counter() - clock, time.process_time() - used
    return {"seconds": seconds, "cpu": cpu, "mib": peak.mib, "loss": steps[0]["loss"], "norm": steps[0]["grad_norm"]}


def trl(arguments: argparse.Namespace, model: Any, samples: list[Sample], out: Path) -> dict[str, float]:
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = policies.load_reader("small", PolicyConfig(model="small")).tokenizer  # asked for; nothing is encoded
    found: dict[str, float] = {}

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        found["begun"], found["cpu_begun"] = time.perf_counter(), time.process_time()
        return {
            "prompt_ids": [list(s.prompt_ids) for s in samples],
            "completion_ids": [list(s.response_ids) for s in samples],
            "env_mask": [list(s.action_mask) for s in samples],
            "logprobs": None,
            "gain": [s.advantages[0] if s.advantages else 0.0 for s in samples],
        }

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found["seconds"] = time.perf_counter() - found["begun"]
            found["cpu"] = time.process_time() - found["cpu_begun"]

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            found.update(loss=logs.get("loss", found.get("loss")), norm=logs.get("grad_norm", found.get("norm")))

    count = len(samples)
    settings = GRPOConfig(
        output_dir=str(out), loss_type="grpo", beta=0.0, num_generations=GROUP, max_steps=1, learning_rate=1e-6,
        per_device_train_batch_size=arguments.micro_batch, gradient_accumulation_steps=count // arguments.micro_batch,
        generation_batch_size=count, max_completion_length=MAX_TOKENS, use_cpu=arguments.device == "cpu", bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        lr_scheduler_type="constant", temperature=1.0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = GRPOTrainer(
            model=model, args=settings, reward_funcs=lambda gain, **_: gain, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(count // GROUP)]}), rollout_func=rollout,
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        with PeakMemory(arguments.device) as peak:
            trainer.train()
    return {name: found[name] for name in ("seconds", "cpu", "loss", "norm")} | {"mib": peak.mib}


def show(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    out = Console(width=100)
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else f"{os.cpu_count()} cores"
    good = [row for row in rows if "failed" not in row]
    tokens, sampled = (good[0][key] if good else 0 for key in ("tokens", "sampled"))
    out.print(
        f"{device}, torch {torch.__version__}, trl {version('trl')}, {arguments.dtype}; {arguments.shape}, "
        f"{arguments.trajectories} trajectories, {tokens:,} tokens, {sampled:,} of them sampled; {arguments.repeats} repeats"
    )
    table = Table(box=None, pad_edge=False)
    for name in ("", "s, median", "CPU s, median", "peak MiB", "loss", "gradient norm"):
        table.add_column(name, justify="left" if not name else "right")
    for contestant in ("ours", "TRL"):
        own = [row for row in good if row["contestant"] == contestant]
        if not own:
            failed = next(row["failed"] for row in rows if row["contestant"] == contestant)
            table.add_row(contestant, failed)
            continue
        mid = {key: median(row[key] for row in own) for key in ("seconds", "cpu", "mib", "loss", "norm")}
        table.add_row(
            contestant, f"{mid['seconds']:.2f}", f"{mid['cpu']:.2f}", f"{mid['mib']:,.0f}", f"{mid['loss']:.5f}",
            f"{mid['norm']:.5f}",
        )  # fmt: skip
    out.print(table)
    pairs = list(zip(good[::2], good[1::2], strict=False))
    if pairs:
        ratios = {key: median(a[key] / b[key] for a, b in pairs) for key in ("seconds", "cpu", "mib")}
        out.print(
            f"ours / TRL: time {ratios['seconds']:.2f}, CPU time {ratios['cpu']:.2f}, memory {ratios['mib']:.2f} "
            "(asked for: 0.7 of the time at most, 0.8 for the small policy, and 0.5 of the memory)"
        )


if __name__ == "__main__":
    main()
