"""A random BERT of a few thousand weights, published the way sentence-transformers publishes encoders."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from search_e1.runs.devices import no_bars

PROMPTS = {"query": "query: ", "document": "passage: "}
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def make_tiny_encoder(
    directory: Path,
    *,
    seed: int = 0,
    pooling: str | None = "mean",
    normalize: bool = True,
    prompts: dict[str, str] | None = PROMPTS,
    max_length: int | None = 24,
    dimension: int = 16,
) -> Path:
    """The directory of an encoder, the same for a seed to the bit. What is None is not said in any file."""
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()))
    vocabulary = {symbol: i for i, symbol in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64,
    )  # fmt: skip
    fast.save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=dimension, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(), no_bars():
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(directory)
    modules = ["Transformer", *(["Pooling"] if pooling else []), *(["Normalize"] if normalize else [])]
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    types = [{"type": f"sentence_transformers.models.{name}", "path": paths[name]} for name in modules]
    write(directory / "modules.json", types)
    if pooling:
        modes = {f"pooling_mode_{mode}": mode.startswith(pooling) for mode in ("cls_token", "mean_tokens", "lasttoken")}
        write(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": dimension, **modes})
    if prompts is not None:
        write(directory / "config_sentence_transformers.json", {"prompts": prompts})
    if max_length is not None:
        write(directory / "sentence_bert_config.json", {"max_seq_length": max_length})
    return directory


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
