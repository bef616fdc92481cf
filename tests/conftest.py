"""What most tests need: a policy of a few thousand weights, and a retriever over a handful of passages.

It imports neither torch nor transformers: under ``pytest -n`` the process that only hands out tests reads it first.
"""

import gc
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from search_e1.cli import main as cli
from search_e1.config import Prompts
from search_e1.types import Passage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from search_e1.training.policy import Policy

# Two OpenMP threads that spin on busy cores are many times slower than one; must be set before torch is imported.
os.environ["OMP_WAIT_POLICY"], os.environ["OMP_NUM_THREADS"] = "PASSIVE", "1"

TAGS = ("think", "search", "information", "answer")
TINY_PROMPTS = Prompts(
    instruction="Question: {question}\n",
    privileged="{instruction}An expert:\n{reference}\nYou:\n",
    correction="\nInvalid, again.\n",
)
PASSAGES = (
    Passage(id="p1", title="Arda", text="Arda is a land with capital Bel."),
    Passage(id="p2", title="Bel", text="Bel is a city with mayor Cor Dun."),
    Passage(id="p3", title="Eth", text="Eth is a land with capital Fen."),
    Passage(id="p4", title="Fen", text="Fen is a city with mayor Gil Hor."),
    Passage(id="p5", title="Ion", text="Ion is a river with length 12."),
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Without garbage collection: imports make a million objects that stay, and searching them takes a quarter of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What is left at the end of a file is searched once: passes over all that was ever imported take seconds each."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Unless told otherwise a process runs neighbours one after another: what the tests of a file share is made once."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.option.dist == "load" else None


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """One id for each byte and for each protocol tag; any text encodes and decodes to itself."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(f"<{slash}{tag}>", normalized=False) for tag in TAGS for slash in ("", "/")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def make_tiny_policy(seed: int = 0) -> "Policy":
    """A random Qwen2 of 2 layers and width 32 with short prompts; the same for a seed, to the bit."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from search_e1.training.policy import Policy

    tokenizer = byte_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    return Policy(model, tokenizer, TINY_PROMPTS)


class TinyRetriever:
    """Ranks passages by the words that they share with the query; what shares none is not found."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.passages = list(passages)
        self.queries: list[str] = []
        """All queries so far, in order."""

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        self.queries += queries
        return [self._rank(query)[:topk] for query in queries]

    def _rank(self, query: str) -> list[Passage]:
        words = set(query.lower().split())
        shared = {p.id: len(words & set(p.contents.lower().replace(".", "").split())) for p in self.passages}
        return sorted((p for p in self.passages if shared[p.id]), key=lambda p: -shared[p.id])


@pytest.fixture
def tiny_policy() -> "Policy":
    return make_tiny_policy()


@pytest.fixture
def tiny_retriever() -> TinyRetriever:
    return TinyRetriever(PASSAGES)


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium, started once."""
    import chromium

    with chromium.opened(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def prepare_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs ``search-e1 data prepare WORDS`` in 80 columns: exit status, output, errors."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["search-e1", "data", "prepare", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "80")
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def ended(pid: int) -> bool:
    """Whether a process is gone, or waits for nothing but its parent's notice."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
