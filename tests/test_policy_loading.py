"""``policy.model`` takes a directory, a GGUF file or an adapter, and refuses in one line what would not load right."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from chat import chat_tokenizer
from conftest import TINY_PROMPTS
from search_e1.config import PolicyConfig, Prompts
from search_e1.errors import ModelError, SearchE1Error
from search_e1.lab.plan.shapes import read_config, shape_of
from search_e1.rollout.engines.registry import check_engine
from search_e1.stages.inputs import Inputs
from search_e1.training import policy as policies
from search_e1.training.policy import Policy, context_length
from search_e1.training.sources import base_of, plain_directory, resolve
from tiny_gguf import MERGES, Kind, write_gguf
from trained import config_of

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


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop(NORM), f"weights are missing: {NORM}; give the whole directory"),
        (lambda w: [w.pop(name) for name in list(w) if ".1." in name], "weights are missing: model.layers.1.input_layernorm"),
        (lambda w: w.update({"score.weight": torch.ones(2, 32)}), "left over, for which this architecture has no place: score"),
        (lambda w: w.update({NORM: torch.ones(16)}), f"of other shapes than its config.json says: {NORM} (16,) for (32,)"),
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


QUANTISED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "hqq": {"quant_method": "hqq"},
    "my-own": {"quant_method": "my-own"},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_directory_whose_library_is_missing_is_refused(model: Path, method: str) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTISED[method]}))
    said = refused(model)
    assert f"quantised with {method}, which cannot be loaded here (" in said
    assert said.endswith("; install what is missing, or give the model's unquantised directory")
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
    assert "mend chat_template.jinja" in said
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


# GGUF files


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_1])
def test_a_gguf_file_has_the_logits_of_its_dequantised_tensors(tmp_path: Path, kind: Kind) -> None:
    original = tiny_model()
    weights = write_gguf(tmp_path / "tiny.gguf", original, kind=kind)
    quantised = Kind.F32 not in (kind,)
    assert torch.equal(weights["lm_head.weight"], original.lm_head.weight) != quantised
    loaded = load(tmp_path / "tiny.gguf")
    with torch.no_grad():
        for name, weight in original.named_parameters():
            weight.copy_(weights[name])
    torch.testing.assert_close(logits(loaded.model), logits(original), rtol=0, atol=1e-6)
    assert loaded.tokenizer("the <|im_end|><think>").input_ids == chat_tokenizer(MERGES)("the <|im_end|><think>").input_ids
    assert loaded.tokenizer.chat_template == chat_tokenizer().chat_template
    assert policies.load_reader(tmp_path / "tiny.gguf", PolicyConfig(model="x")).context_length == 512


def test_a_policy_from_gguf_is_saved_as_a_plain_directory(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model(tie_word_embeddings=True), kind=Kind.Q8_0)
    loaded = load(tmp_path / "tiny.gguf")
    assert not hasattr(loaded.model, "hf_quantizer")
    assert all(weight.requires_grad for weight in loaded.model.parameters())
    loaded.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["model_type"] == "qwen2"
    assert config["tie_word_embeddings"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(again), logits(loaded.model), rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "the land <think>x</think>\n<|im_end|>"
    assert tokenizer(text).input_ids == loaded.tokenizer(text).input_ids


def test_what_lies_beside_a_gguf_file_is_not_mixed_in(model: Path) -> None:
    write_gguf(model / "tiny.gguf", tiny_model(1))
    (model / "chat_template.jinja").write_text("other {{ messages[0].content }}")
    (model / "adapter_config.json").write_text("{}")
    loaded = load(model / "tiny.gguf")
    assert loaded.tokenizer.chat_template == chat_tokenizer().chat_template
    assert loaded.prompts == Prompts()
    torch.testing.assert_close(logits(loaded.model), logits(tiny_model(1)), rtol=0, atol=1e-6)


def damaged(tmp_path: Path, size: int | None) -> Path:
    write_gguf(tmp_path / "tiny.gguf", tiny_model())
    whole = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(whole[:size] if size else b"HTML" + whole[4:])
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("size", [5, 20, 100, 3000, 8000, -1])
def test_a_truncated_gguf_file_is_refused(tmp_path: Path, size: int) -> None:
    path = damaged(tmp_path, size)
    assert refused(path).endswith("tiny.gguf is truncated or damaged; download it again")
    assert refused(path) == refused(path, read)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    assert "tiny.gguf is no GGUF file (it does not begin with GGUF); download it again" in refused(damaged(tmp_path, None))
    (tmp_path / "model.onnx").write_bytes(b"x")
    assert "a file that is no .gguf" in refused(tmp_path / "model.onnx")
    assert "no such directory or file" in refused("models/none.gguf")


def test_a_kind_that_cannot_be_dequantised_is_refused(tmp_path: Path) -> None:
    raw = ("blk.0.ffn_up.weight", np.zeros((64, 40), np.uint8), Kind.Q8_1)
    write_gguf(tmp_path / "tiny.gguf", tiny_model(), raw=raw)
    said = refused(tmp_path / "tiny.gguf")
    assert "holds blk.0.ffn_up.weight as Q8_1, which cannot be dequantised; give a file of another kind, Q8_0 or F16" in said
    assert said == refused(tmp_path / "tiny.gguf", read)


def test_an_architecture_that_takes_fewer_kinds_is_asked_itself(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model(), kind=Kind.Q5_0, architecture="lfm2")
    said = refused(tmp_path / "tiny.gguf", read)
    assert "cannot be dequantised (holds tensors of ggml type 6, which is not supported yet" in said


def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model(), architecture="plamo")
    said = refused(tmp_path / "tiny.gguf", read)
    assert "GGUF model with architecture plamo is not supported yet" in said
    assert said.endswith("give another GGUF file of this model, or its Hugging Face directory")


def test_one_part_of_a_gguf_model_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model(), meta=lambda writer: writer.add_uint16("split.count", 3))
    assert "tiny.gguf is one of 3 parts; join them with `llama-gguf-split --merge`" in refused(tmp_path / "tiny.gguf", read)


def test_gguf_tensors_that_are_missing_or_left_over_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "less.gguf", tiny_model(), without="blk.1.ffn_norm.weight")
    assert "weights are missing: model.layers.1.post_attention_layernorm.weight" in refused(tmp_path / "less.gguf")
    write_gguf(tmp_path / "more.gguf", tiny_model(), extra={"rope_freqs.weight": np.ones(4, np.float32)})
    said = refused(tmp_path / "more.gguf")
    assert "(left over: rope_freqs.weight); transformers does not read all of it, so give" in said


def test_a_directory_of_gguf_files_names_one(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model())
    assert refused(tmp_path).endswith(f"no config.json in it; give the GGUF file itself: {tmp_path / 'tiny.gguf'}")


# Adapters


def make_adapter(base: Path, directory: Path, name: str | None = None, config=None, **lora) -> PeftModel:
    """A random adapter of ``base``, saved with ``name`` as its base."""
    options = dict(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        plain = AutoModelForCausalLM.from_pretrained(base)
        wrapped = get_peft_model(plain, config or LoraConfig(**options | lora))
    wrapped.peft_config["default"].base_model_name_or_path = name if name is not None else str(base)
    wrapped.save_pretrained(directory)
    return wrapped.eval()


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}])
def test_an_adapter_is_merged_onto_its_base(model: Path, tmp_path: Path, lora: dict) -> None:
    wrapped = make_adapter(model, tmp_path / "adapter", **lora)
    loaded = load(tmp_path / "adapter")
    assert (logits(loaded.model) - logits(tiny_model())).abs().max() > 0.1
    torch.testing.assert_close(logits(loaded.model), logits(wrapped), rtol=0, atol=1e-5)
    assert type(loaded.model) is Qwen2ForCausalLM
    assert all(weight.requires_grad for weight in loaded.model.parameters())
    assert loaded.prompts == TINY_PROMPTS  # the base's
    loaded.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "adapter_config.json").exists()
    torch.testing.assert_close(logits(load(tmp_path / "saved").model), logits(loaded.model), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["../model", "model"])
def test_a_base_is_looked_for_from_the_adapter_and_from_here(model: Path, tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(model.parent)
    wrapped = make_adapter(model, tmp_path / "adapter", name)
    torch.testing.assert_close(logits(load("adapter").model), logits(wrapped), rtol=0, atol=1e-5)


def test_an_adapter_of_a_gguf_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model())
    wrapped = make_adapter(save(tmp_path / "model"), tmp_path / "adapter", str(tmp_path / "tiny.gguf"))
    torch.testing.assert_close(logits(load(tmp_path / "adapter").model), logits(wrapped), rtol=0, atol=1e-5)


def test_tokenizer_and_prompts_of_an_adapter_come_first(model: Path, tmp_path: Path) -> None:
    make_adapter(model, tmp_path / "adapter")
    chat_tokenizer(MERGES, "own {{ messages[0].content }}").save_pretrained(tmp_path / "adapter")
    Prompts(instruction="Own: {question}").save(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    assert loaded.tokenizer.chat_template == "own {{ messages[0].content }}"
    assert loaded.prompts.instruction == "Own: {question}"


def test_an_adapter_whose_base_is_not_there_is_refused(model: Path, tmp_path: Path) -> None:
    make_adapter(model, tmp_path / "adapter")
    shutil.rmtree(model)
    said = refused(tmp_path / "adapter")
    assert f"names the base {str(model)!r}, which is not there or is no model; write its directory, GGUF file or Hub id" in said
    assert said == refused(tmp_path / "adapter", read)


def test_an_adapter_without_a_base_or_of_an_adapter_is_refused(model: Path, tmp_path: Path) -> None:
    make_adapter(model, tmp_path / "none", "")
    assert "adapter_config.json does not name the base; write it there" in refused(tmp_path / "none")
    make_adapter(model, tmp_path / "second", str(tmp_path / "none"))
    assert "an adapter too; merge that one first" in refused(tmp_path / "second")
    (tmp_path / "none" / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in refused(tmp_path / "none")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"intermediate_size": 96}, "size mismatch for base_model.model.model.layers.0.mlp"),
        ({"num_hidden_layers": 3}, "weights are missing: base_model.model.model.layers.2."),
        ({"num_hidden_layers": 1}, "weights are left over: base_model.model.model.layers.1."),
    ],
)
def test_an_adapter_of_another_base_is_refused(model: Path, tmp_path: Path, other: dict, said: str) -> None:
    another = save(tmp_path / "another", tiny_model(**other))
    make_adapter(model, tmp_path / "adapter", str(another), target_modules=["q_proj", "up_proj"])
    message = refused(tmp_path / "adapter")
    assert f"the adapter does not fit its base ({said}" in message
    assert message.endswith("write that one in adapter_config.json as base_model_name_or_path")


def test_an_adapter_of_another_architecture_is_refused(model: Path, tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=280, n_embd=32, n_layer=2, n_head=2, n_positions=512)
    save(tmp_path / "gpt2", AutoModelForCausalLM.from_config(config))
    make_adapter(model, tmp_path / "adapter", str(tmp_path / "gpt2"), target_modules=["q_proj"])
    assert "the adapter does not fit its base (Target modules {'q_proj'} not found in the base model" in refused(
        tmp_path / "adapter"
    )


def test_adapters_that_cannot_be_merged_or_are_not_whole_are_refused(model: Path, tmp_path: Path) -> None:
    make_adapter(model, tmp_path / "tuned", config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert "a PROMPT_TUNING adapter, which cannot be merged into weights" in refused(tmp_path / "tuned")
    make_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    assert "weights only as pickles (adapter_model.bin), which can run code" in refused(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.bin").unlink()
    assert "no adapter_model.safetensors in it" in refused(tmp_path / "adapter")
    make_adapter(model, model)
    assert "holds a model and an adapter; move one of them" in refused(model)


def test_an_adapter_with_weights_that_are_not_finite_is_refused(model: Path, tmp_path: Path) -> None:
    make_adapter(model, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    assert "NaNs detected in the merged weights" in refused(tmp_path / "adapter")


# What else reads a policy's path


def test_what_reads_plain_directories_alone_refuses_the_others(model: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model())
    make_adapter(model, tmp_path / "adapter")
    assert plain_directory(str(model), "vLLM") == model
    for path, kind in ((tmp_path / "tiny.gguf", "a GGUF file"), (tmp_path / "adapter", "an adapter")):
        said = refused(path, lambda path: plain_directory(str(path), "vLLM"))
        assert f'{kind}, which vLLM does not read here; set rollout.engine = "torch", or write a plain directory with' in said
        code = said.split('python -c "')[1].split('"`')[0].replace("'DIRECTORY'", repr(str(tmp_path / kind[-4:])))
        exec(code)  # noqa: S102 - the remedy works
        torch.testing.assert_close(logits(load(tmp_path / kind[-4:]).model), logits(load(path).model), rtol=0, atol=1e-6)


def test_vllm_refuses_a_gguf_file_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search_e1.rollout.engines.vllm.version", lambda _: "0.30.0")
    write_gguf(tmp_path / "tiny.gguf", tiny_model())
    config = config_of(tmp_path, rollout={"engine": "vllm"})
    check_engine(config, "small")
    assert "which vLLM does not read here" in refused(tmp_path / "tiny.gguf", lambda path: check_engine(config, path))
    served = config_of(tmp_path, rollout={"engine": "vllm"}, vllm={"url": "http://127.0.0.1:1"})
    check_engine(served, tmp_path / "tiny.gguf")  # a server may have been started with it


def test_base_of(model: Path, tmp_path: Path) -> None:
    make_adapter(model, tmp_path / "adapter")
    assert base_of(str(tmp_path / "adapter")) == str(model)
    assert base_of(str(model)) is base_of("small") is base_of("owner/name") is None
    assert resolve(str(tmp_path / "adapter")) == tmp_path / "adapter"


def test_a_checksum_covers_a_gguf_file_and_an_adapters_base(model: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model())
    make_adapter(model, tmp_path / "adapter")
    paths = (tmp_path / "tiny.gguf", tmp_path / "adapter", model)

    def checksums() -> list[str]:
        inputs = Inputs(config_of(tmp_path), tmp_path)
        return [inputs.checksum(path) for path in paths]

    before = checksums()
    assert before == checksums()
    assert len(set(before)) == 3
    change_weights(model, lambda weights: weights[NORM].add_(1))
    write_gguf(tmp_path / "tiny.gguf", tiny_model(1))
    assert all(old != new for old, new in zip(before, checksums(), strict=True))


def test_a_plan_reads_the_shape_of_a_gguf_file_and_of_an_adapters_base(model: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model())
    make_adapter(model, tmp_path / "adapter")
    for path in (tmp_path / "tiny.gguf", tmp_path / "adapter"):
        shape = shape_of(read_config(str(path)))
        assert (shape.parameters, shape.context_length, shape.layers) == (tiny_model().num_parameters(), 512, 2)
    shutil.rmtree(model)
    assert "is not there or is no model" in refused(tmp_path / "adapter", lambda path: read_config(str(path)))
