"""Loads weights, and rejects what transformers and PEFT load with a warning: a policy never starts with random weights."""

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from search_e1.errors import ModelError
from search_e1.training.sources import ADAPTER_WEIGHTS, Source

_ADAPTER = "policy"


def load_weights(source: Source, trust_remote_code: bool) -> PreTrainedModel:
    """The weights of ``source``: GGUF dequantized, adapters merged in float32, so that small deltas are not rounded away.

    Raises:
        ModelError: weights are missing, unexpected, or have other shapes.
        OSError, ValueError, RuntimeError, ...: transformers cannot read them; ``sources.opened`` turns this into one line.
    """
    options: dict[str, Any] = dict(source.options)
    bar: AbstractContextManager[None] = nullcontext()
    if source.gguf:
        from search_e1.training.gguf_file import bar_on_a_terminal

        options["quantization_config"] = GgufConfig(dequantize=True)
        bar = bar_on_a_terminal()
    with bar:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.weights,
            dtype=torch.float32 if source.adapter else "auto",
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # mismatches are in the report and rejected below
            output_loading_info=True,
            **options,
        )
    model, report = loaded
    _check_report(source.model, report)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"policy.model = {source.model!r}: an adapter on the Hub; download it with "
            f"`hf download {source.model} --local-dir DIRECTORY` and give the directory"
        )
    if source.gguf:
        _check_all_used(source.model, source.gguf, model)
    return _merged(source, model) if source.adapter else model


def _check_report(model: str, report: dict[str, Any]) -> None:
    shapes = [f"{name} {tuple(found)} for {tuple(wanted)}" for name, found, wanted in report["mismatched_keys"]]
    faults = (
        ("of shapes that its config.json does not give", shapes),
        ("missing", report["missing_keys"]),
        ("left over: this architecture has no place for them", report["unexpected_keys"]),
    )
    if found := [f"{what}: {_listed(sorted(names))}" for what, names in faults if names]:
        raise ModelError(
            f"policy.model = {model!r}: weights are {'; '.join(found)}; give the whole directory of a causal language model"
        )


def _check_all_used(model: str, file: Path, loaded: PreTrainedModel) -> None:
    """Check that all tensors of a GGUF file were loaded: transformers skips unknown ones, e.g. RoPE scaling factors.

    Raises:
        ModelError: the file holds more weights than the model.
    """
    from search_e1.training.gguf_file import tensor_sizes

    sizes, places = tensor_sizes(file), sum(weight.numel() for weight in _distinct(loaded.state_dict().values()))
    if loaded.config.get_text_config().tie_word_embeddings:
        sizes.pop("output.weight", None)  # a copy of the embedding
    excess = sum(sizes.values()) - places
    if excess:
        names = [name for name, size in sizes.items() if size == excess]
        raise ModelError(
            f"policy.model = {model!r}: {file.name} holds {sum(sizes.values())} weights, and a {loaded.config.model_type} of "
            f"its shape has {places}{f' (left over: {names[0]})' if len(names) == 1 else ''}; transformers does not read all "
            "of it, so give the model's Hugging Face directory"
        )


def _distinct(weights: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return list({weight.data_ptr(): weight for weight in weights}.values())


def _merged(source: Source, base: PreTrainedModel) -> PreTrainedModel:
    from peft import PeftConfig, PeftModel
    from peft.utils import set_peft_model_state_dict

    assert source.adapter
    config = PeftConfig.from_pretrained(str(source.adapter))
    if config.is_prompt_learning:
        raise ModelError(
            f"policy.model = {source.model!r}: a {config.peft_type.value} adapter, which cannot be merged into weights; give "
            "one that can, e.g. LoRA"
        )
    try:
        wrapped = PeftModel(base, config, _ADAPTER)
        given = load_file(source.adapter / ADAPTER_WEIGHTS)
        result: Any = set_peft_model_state_dict(wrapped, given, _ADAPTER)
    except (KeyError, ValueError, RuntimeError) as error:
        raise _base_mismatch(source, _reason(error)) from None
    # `missing_keys` also lists the base's weights.
    missing = sorted(name for name in result.missing_keys if _ADAPTER in name.split("."))
    if missing or result.unexpected_keys:
        what, names = ("missing", missing) if missing else ("left over", result.unexpected_keys)
        raise _base_mismatch(source, f"weights are {what}: {_listed(names)}")
    merged: Any = wrapped.merge_and_unload(safe_merge=True)
    merged.requires_grad_(True)
    return merged


def _reason(error: BaseException) -> str:
    """The library's message in one line: the first size mismatch, if any, else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = next((line for line in lines if line.startswith("size mismatch")), lines[0] if lines else type(error).__name__)
    return re.sub(r"torch\.Size\((.*?)\)", r"\1", found.rstrip("."))


def _base_mismatch(source: Source, reason: str) -> ModelError:
    return ModelError(
        f"policy.model = {source.model!r}: the adapter does not fit its base ({reason}); it was trained on another model, so "
        "write that one in adapter_config.json as base_model_name_or_path"
    )


def _listed(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def check_quantization(model: str, config: PreTrainedConfig) -> None:
    """
    Raises:
        ModelError: transformers does not support the quantization, or its library or device is missing.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    given = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(given.get("quant_method", "unknown"))
    try:
        AutoHfQuantizer.from_config(quantization, pre_quantized=True).validate_environment(device_map=None)
    except (ImportError, ValueError, RuntimeError, TypeError) as error:
        raise ModelError(
            f"policy.model = {model!r}: quantized with {method}, which cannot be loaded here ({_reason(error)}); install what "
            "is missing, or give the model's unquantized directory"
        ) from None


def check_tokenizer(model: str, tokenizer: Any, config: PreTrainedConfig) -> None:
    """Check that every id that can occur has an embedding row.

    Special tokens that neither the chat template nor generation uses cannot occur: all input text is neutralized
    (``prompts.neutralize``). Examples: image tokens of text models extracted from multimodal ones, and the unknown token that
    transformers adds to byte-level tokenizers.

    Raises:
        ModelError: an id has no row.
    """
    rows = config.get_text_config().vocab_size
    beyond = {id: token for token, id in tokenizer.get_vocab().items() if id >= rows}
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for id, token in sorted(beyond.items()):
        if id not in special or id in used or token in str(tokenizer.chat_template or ""):
            raise ModelError(
                f"policy.model = {model!r}: the tokenizer has {max(beyond) + 1} ids and the embedding {rows} rows (no row for "
                f"{token!r}); call resize_token_embeddings before saving the model, or give the tokenizer it was trained with"
            )
