"""A run of one round in the small world, small enough to repeat tens of times, in separate processes."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # no threads may exist before processes are forked

from search_e1 import runs
from search_e1.cli import main as cli
from search_e1.data.world import make_world, write

CONFIG = """
run = "{root}/run"
rounds = 1
[policy]
model = "small"
device = "cpu"
[data]
corpus = "{root}/world/corpus.jsonl"
train = ["{root}/world/train.jsonl"]
eval = {{ world = "{root}/world/test.jsonl" }}
[retrieval]
{retrieval}
[rollout]
topk = 2
max_searches = 2
max_action_tokens = 32
max_observation_tokens = 128
max_tokens = 768
[grpo]
steps = {steps}
questions_per_step = 2
group_size = 6
learning_rate = 1e-4
[pool]
questions = 6
group_size = 6
[lead]
pairs = 4
samples = 1
enforce = false
[distill]
batch_size = 4
learning_rate = 1e-4
epochs = 2
[evaluation]
samples = 0
latency = 0
"""

_WITH_TIMES = ("steps.jsonl", "evaluation.json", "timings.json", "manifest.json", "manifest.json.sha256")


def prepare(root: Path, retrieval: str = "", steps: int = 1) -> Path:
    """Write the world and the config of a run in ``root / "run"``; returns the config's path."""
    write(make_world(), root / "world", train=12, dev=1, test=2, seed=0)
    (root / "config.toml").write_text(CONFIG.format(root=root, retrieval=retrieval, steps=steps))
    return root / "config.toml"


def search_e1(*words: object, log: Path, before: Callable[[], None] = lambda: None) -> int:
    """Run the command in a forked process, with libraries already loaded; returns its exit status. ``log`` gets its output."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            before()
            sys.argv = ["search-e1", *map(str, words)]
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(run: Path) -> dict[str, str]:
    """Every file of the finished artifacts that contains no times -> its checksum; all are verified."""
    found = {}
    for path in sorted(run.glob(f"*/{runs.MANIFEST}")):
        for name, checksum in runs.read(path.parent).manifest.files.items():
            if Path(name).name not in _WITH_TIMES:
                found[f"{path.parent.name}/{name}"] = checksum
    return found
