"""A policy on disk and in memory: a plain Hugging Face directory plus the prompts it works under."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from search_e1.config import LoraConfig, PolicyConfig, Prompts
from search_e1.errors import ModelError
from search_e1.runs.devices import device, no_bars

SMALL = "small"
_SMALL_DIRECTORY = Path(__file__).parent.parent / "data" / "small_policy"


@dataclass(slots=True)
class Policy:
    """Weights, tokenizer and prompts that belong together."""

    model: PreTrainedModel
    tokenizer: Any
    prompts: Prompts

    def save(self, directory: Path) -> None:
        """Write what ``load`` reads; anything that reads Hugging Face directories reads it too."""
        with no_bars():
            self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        self.prompts.save(directory)


@dataclass(frozen=True, slots=True)
class Reader:
    """What a policy reads with: all of it but the weights."""

    tokenizer: Any
    prompts: Prompts
    context_length: int


def resolve(model: str) -> Path | str:
    """The directory of ``model``, or a Hub id as it is. ``small`` is the policy of the package.

    Raises:
        ModelError: it looks like a directory and is none, or the directory holds no model.
    """
    if model == SMALL:
        return _SMALL_DIRECTORY
    path = Path(model).expanduser()
    if not path.exists():
        if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
            raise ModelError(f"policy.model = {model!r}: no such directory; give one, a Hub id (owner/name), or {SMALL!r}")
        return model
    for needed in ("config.json", "tokenizer_config.json"):
        if not (path / needed).is_file():
            raise ModelError(f"policy.model = {model!r}: no {needed} in it; give the directory of a Hugging Face model")
    pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern)]
    if pickled and not any(path.glob("*.safetensors")):
        raise ModelError(
            f"policy.model = {model!r}: weights only as pickles ({pickled[0]}), which can run code; save them as safetensors, "
            "where you trust them"
        )
    return path


def load(model: str | Path, config: PolicyConfig, prompts: Prompts | None = None) -> Policy:
    """Load weights (safetensors only), tokenizer and prompts; ``config.model`` is not looked at, ``model`` is.

    Raises:
        ModelError: the directory is none, or what is in it does not load.
    """
    reader = load_reader(model, config, prompts)
    with _loading(model) as source:
        weights = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, config.dtype),
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
        )
    weights.to(device(config.device))  # type: ignore[arg-type]
    return Policy(weights, reader.tokenizer, reader.prompts)


def load_reader(model: str | Path, config: PolicyConfig, prompts: Prompts | None = None) -> Reader:
    """Load all of a policy but its weights.

    Raises:
        ModelError: as ``load``.
    """
    with _loading(model) as source:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
        settings = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if prompts is None:
        prompts = Prompts.of_policy(source) if isinstance(source, Path) else Prompts()
    return Reader(tokenizer, prompts, settings.get_text_config().max_position_embeddings)


@contextmanager
def _loading(model: str | Path) -> Iterator[Path | str]:
    source = resolve(str(model))
    try:
        with no_bars():
            yield source
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        problem = str(error).strip().splitlines()[0]
        if "custom code" in problem:
            problem = "it brings code of its own; read that, and set policy.trust_remote_code = true to run it"
        raise ModelError(f"policy.model = {str(model)!r} does not load: {problem}") from error


def accelerators(config: PolicyConfig, processes: int = 1) -> int:
    """Devices beside the CPU that a stage holds: one a process, if the policy lives on one."""
    return 0 if device(config.device).type == "cpu" else processes


def with_adapter(model: PreTrainedModel, lora: LoraConfig) -> PeftModel:
    """``model`` with trainable adapters; its own weights are frozen."""
    adapter = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapter)


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """The plain model with the adapters merged into its weights, all of them trainable again."""
    merged = model.merge_and_unload()
    merged.requires_grad_(True)  # peft leaves it off, and the next GRPO round would train nothing
    return merged
