"""A tiny policy as a GGUF file, written as llama.cpp's converter writes Qwen2's."""

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import Qwen2ForCausalLM

from chat import chat_tokenizer

MERGES = (("t", "h"), ("th", "e"))
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
Kind = gguf.GGMLQuantizationType


def gguf_names(model: Qwen2ForCausalLM) -> dict[str, str]:
    """Name of each weight in transformers -> in GGUF."""
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    names = {}
    for name, _ in model.named_parameters():
        module, _, suffix = name.rpartition(".")
        if module in outside:
            names[name] = f"{outside[module]}.{suffix}"
        else:
            _, _, layer, rest = module.split(".", 3)
            names[name] = f"blk.{layer}.{_NAMES[rest]}.{suffix}"
    return names


def write_gguf(
    path: Path,
    model: Qwen2ForCausalLM,
    *,
    kind: Kind = Kind.F32,
    architecture: str = "qwen2",
    extra: Mapping[str, np.ndarray] = {},
    without: str | None = None,
    raw: tuple[str, np.ndarray, Kind] | None = None,
    meta: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> dict[str, torch.Tensor]:
    """Write ``model`` with the matrices as ``kind``; returns the weights as they are dequantized, by transformers' names."""
    config, tokenizer = model.config, chat_tokenizer(MERGES)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    added = tokenizer.added_tokens_decoder
    types = [(3 if added[i].special else 4) if i in added else 1 for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    meta(writer)
    weights, names = {}, gguf_names(model)
    for name, weight in model.named_parameters():
        values = weight.detach().float().numpy()
        stored = kind if values.ndim == 2 else Kind.F32
        data = gguf.quantize(values, stored)
        weights[name] = torch.from_numpy(np.array(gguf.dequantize(data, stored))).view_as(weight)
        if names[name] == without:
            continue
        if raw and names[name] == raw[0]:
            writer.add_tensor(names[name], raw[1], raw_dtype=raw[2])
        else:
            writer.add_tensor(names[name], data, raw_dtype=stored)
    for name, values in extra.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
