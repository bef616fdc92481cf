"""``policy.model`` takes a directory, a GGUF file or an adapter, and refuses in one line what would not load right."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoConfig, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from chat import chat_tokenizer
from conftest import TINY_PROMPTS
from search_e1.config import PolicyConfig
from search_e1.errors import ModelError, SearchE1Error
from search_e1.training import policy as policies
from search_e1.training.policy import Policy, context_length
from tiny_gguf import MERGES

IDS = torch.tensor([[5, 9, 77, 130, 9, 2, 61]])


def tiny_model(seed: int = 0, **changes) -> Qwen2ForCausalLM:
    tokenizer = chat_tokenizer(MERGES)
    shape = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(Qwen2Config(**shape | changes))
        for weight in model.parameters():  # biases and norms too
            weight.data += 0.05 * torch.randn_like(weight)
    return model.eval()


def save(directory: Path, model: Qwen2ForCausalLM | None = None) -> Path:
    Policy(model or tiny_model(), chat_tokenizer(MERGES), TINY_PROMPTS).save(directory)
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "model")


def load(path: Path | str, **config) -> Policy:
    return policies.load(path, PolicyConfig(model=str(path), **{"dtype": "float32", "device": "cpu"} | config))


def refused(path: Path | str, load: Callable = load) -> str:
    with pytest.raises(ModelError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"policy.model = {str(path)!r}: ") or "chat template" in str(caught.value)
    return str(caught.value)


def read(path: Path | str) -> None:
    """All but the weights."""
    policies.load_reader(path, PolicyConfig(model=str(path)))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


# Directories


def test_a_directory_has_the_logits_that_were_saved(model: Path) -> None:
    torch.testing.assert_close(logits(load(model).model), logits(tiny_model()), rtol=0, atol=0)


def test_what_transformers_warns_of_is_said_once(model: Path, caplog, capfd) -> None:
    file = model / "config.json"
    rope = {"rope_type": "yarn", "factor": 2.0, "beta_fst": 1, "rope_theta": 10_000.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_parameters": rope}))
    load(model)
    load(model)
    said = f"policy.model = {str(model)!r}: Unrecognized keys in `rope_parameters` for 'rope_type'='yarn': {{'beta_fst'}}"
    assert caplog.messages == [said]
    assert "[transformers]" not in capfd.readouterr().err  # not a second time by its own handler


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda w: [w.update({f"_orig_mod.{name}": w.pop(name)}) for name in list(w)],
            "; left over: this architecture has no place for them: _orig_mod.lm_head.weight and 26 more; give",
        ),
        (lambda w: w.pop(NORM), f"weights are missing: {NORM}; give the whole directory"),
        (lambda w: [w.pop(name) for name in list(w) if ".1." in name], "weights are missing: model.layers.1.input_layernorm"),
        (lambda w: w.update({"score.weight": torch.ones(2, 32)}), "left over: this architecture has no place for them: score"),
        (lambda w: w.update({NORM: torch.ones(16)}), f"of shapes that its config.json does not give: {NORM} (16,) for (32,)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(model: Path, change, said: str, capfd) -> None:
    change_weights(model, change)
    assert said in refused(model)
    assert capfd.readouterr() == ("", "")  # nothing beside that line


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    tied = tiny_model(tie_word_embeddings=True)
    save(tmp_path, tied)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(logits(load(tmp_path).model), logits(tied), rtol=0, atol=0)


def test_a_tokenizer_larger_than_the_embedding_is_refused(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<search>", "</search>"])
    tokenizer.save_pretrained(model)
    said = f"the tokenizer has {rows + 2} ids and the embedding {rows} rows (no row for '<search>'); call resize_token_emb"
    assert said in refused(model)
    assert said in refused(model, read)


def test_a_special_token_without_a_row_that_nothing_writes_is_let_be(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([AddedToken("<image_soft_token>", special=True)], special_tokens=True)
    tokenizer.save_pretrained(model)
    loaded = load(model)
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size + 1
    tokenizer.pad_token = "<image_soft_token>"
    tokenizer.save_pretrained(model)
    assert "no row for '<image_soft_token>'" in refused(model)


QUANTIZED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "hqq": {"quant_method": "hqq"},
    "my-own": {"quant_method": "my-own"},
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_a_quantised_directory_whose_library_is_missing_is_refused(model: Path, method: str) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZED[method]}))
    said = refused(model)
    assert f"quantized with {method}, which cannot be loaded here (" in said
    assert said.endswith("; install what is missing, or give the model's unquantized directory")
    assert said == refused(model, read)


def one_line(path: Path) -> str:
    with pytest.raises(SearchE1Error) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _tokenizer_with(pattern: str) -> Callable[[dict], dict]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda held: {**held, "pre_tokenizer": split}


DAMAGED = {
    "settings that are a list": (
        "tokenizer_config.json",
        lambda held: [held],
        "tokenizer_config.json holds list, not an object",
    ),
    "settings that are a text": ("special_tokens_map.json", lambda _: "x", "special_tokens_map.json holds str, not an object"),
    "a config that is nothing": ("config.json", lambda _: None, "config.json holds NoneType, not an object"),
    "a tokenizer that is a list": ("tokenizer.json", lambda _: [1], "tokenizer.json holds list, not an object"),
    "a pattern that is none": (
        "tokenizer.json",
        _tokenizer_with("("),
        "tokenizer.json, tokenizer_config.json) does not load: Onig",
    ),
    "a size that is a text": (
        "config.json",
        lambda held: {**held, "vocab_size": "x"},
        "'vocab_size': TypeError: Field 'vocab_size'",
    ),
    "a length that is a text": (
        "tokenizer_config.json",
        lambda held: {**held, "model_max_length": "x"},
        "not supported between",
    ),
    "a template that divides by zero": (
        "tokenizer_config.json",
        lambda held: {**held, "chat_template": "{{ messages[0]['content'] }}{{ 1 / 0 }}"},
        "chat template fails (division by zero)",
    ),
    "a template that calls itself": (
        "tokenizer_config.json",
        lambda held: {**held, "chat_template": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"},
        "chat template fails (maximum recursion depth exceeded",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_one_line_that_names_it(model: Path, case: str) -> None:
    name, change, said = DAMAGED[case]
    file = model / name
    held = json.loads(file.read_text()) if file.exists() else {}
    (model / "chat_template.jinja").unlink(missing_ok=True)
    file.write_text(json.dumps(change(held)))
    assert said in one_line(model)


@pytest.mark.parametrize(
    "name", ["search_e1.json", "config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"]
)
def test_json_nested_too_deep_is_one_line_that_names_the_file(model: Path, name: str) -> None:
    (model / name).write_text("[" * 100_000)
    assert name in one_line(model)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}Assistant:",
        "{{ messages[1:] | map(attribute='content') | join }}",
        "{{ messages[0].content[:20] }}",
    ],
)
def test_a_chat_template_that_drops_the_question_is_refused(model: Path, template: str) -> None:
    (model / "chat_template.jinja").write_text(template)
    said = refused(model)
    assert "chat template drops the question" in said
    assert "fix chat_template.jinja" in said
    assert said == refused(model, read)


@pytest.mark.parametrize(
    ("name", "length"),
    [("gpt2", 1024), ("mpt", 2048), ("mistral", 131072), *((name, sys.maxsize) for name in ("mamba", "bloom", "xlnet"))],
)
def test_context_length(name: str, length: int) -> None:
    assert context_length(AutoConfig.for_model(name)) == length


def test_an_old_bloom_says_its_length() -> None:
    assert context_length(AutoConfig.for_model("bloom", seq_length=2048)) == 2048


def test_every_architecture_has_a_context_length() -> None:
    several = {"musicgen", "musicgen_melody", "gemma4_assistant"}  # of which transformers cannot say what the text model is
    names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - several
    assert len(names) > 100
    assert {name for name in names if context_length(AutoConfig.for_model(name)) < 1} == set()
