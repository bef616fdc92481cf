"""Policies that are no plain directory: GGUF files, and adapters with their base."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, modeling_gguf_pytorch_utils

from chat import chat_tokenizer
from conftest import TINY_PROMPTS
from search_e1.config import PolicyConfig, Prompts
from search_e1.lab.plan.shapes import read_config, shape_of
from search_e1.rollout.engines.registry import check_engine
from search_e1.stages.inputs import Inputs
from search_e1.training import policy as policies
from search_e1.training.sources import base_of, plain_directory, problem_of, resolve
from test_policy_loading import NORM, change_weights, load, logits, read, refused, save, tiny_model
from test_policy_loading import model as model
from tiny_gguf import MERGES, Kind, write_gguf
from trained import config_of

# GGUF files


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_1])
def test_a_gguf_file_has_the_logits_of_its_dequantised_tensors(tmp_path: Path, kind: Kind) -> None:
    original = tiny_model()
    weights = write_gguf(tmp_path / "tiny.gguf", original, kind=kind)
    quantized = Kind.F32 not in (kind,)
    assert torch.equal(weights["lm_head.weight"], original.lm_head.weight) != quantized
    loaded = load(tmp_path / "tiny.gguf")
    with torch.no_grad():
        for name, weight in original.named_parameters():
            weight.copy_(weights[name])
    torch.testing.assert_close(logits(loaded.model), logits(original), rtol=0, atol=1e-6)
    assert loaded.tokenizer("the <|im_end|><think>").input_ids == chat_tokenizer(MERGES)("the <|im_end|><think>").input_ids
    assert loaded.tokenizer.chat_template == chat_tokenizer().chat_template
    assert policies.load_reader(tmp_path / "tiny.gguf", PolicyConfig(model="x")).context_length == 512


def test_dequantizing_writes_no_progress_bar_into_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model(), kind=Kind.Q8_0)
    load(tmp_path / "tiny.gguf")
    assert capsys.readouterr() == ("", "")
    assert modeling_gguf_pytorch_utils.tqdm is tqdm  # as before


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
    assert "tiny.gguf is not a GGUF file (it does not begin with GGUF); download it again" in refused(damaged(tmp_path, None))
    (tmp_path / "model.onnx").write_bytes(b"x")
    assert "not a .gguf file" in refused(tmp_path / "model.onnx")
    assert "no such directory or file" in refused("models/none.gguf")
    assert "`python scripts/fetch_smollm2.py` fetches it" in refused("elsewhere/SmolLM2-135M-Instruct.Q4_1.gguf")


def test_a_kind_that_cannot_be_dequantised_is_refused(tmp_path: Path) -> None:
    raw = ("blk.0.ffn_up.weight", np.zeros((64, 40), np.uint8), Kind.Q8_1)
    write_gguf(tmp_path / "tiny.gguf", tiny_model(), raw=raw)
    said = refused(tmp_path / "tiny.gguf")
    assert (
        "holds blk.0.ffn_up.weight as Q8_1, which cannot be dequantized; give a file of another type, e.g. Q8_0 or F16" in said
    )
    assert said == refused(tmp_path / "tiny.gguf", read)


def test_an_architecture_that_takes_fewer_kinds_is_asked_itself(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model(), kind=Kind.Q5_0, architecture="lfm2")
    said = refused(tmp_path / "tiny.gguf", read)
    assert "cannot be dequantized (holds tensors of ggml type 6, which is not supported yet" in said


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
    assert f"names the base {str(model)!r}, which is missing or not a model; write its directory, GGUF file or Hub id" in said
    assert said == refused(tmp_path / "adapter", read)


def test_an_adapter_without_a_base_or_of_an_adapter_is_refused(model: Path, tmp_path: Path) -> None:
    make_adapter(model, tmp_path / "none", "")
    assert "adapter_config.json does not name the base; add it there" in refused(tmp_path / "none")
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
    assert "is missing or not a model" in refused(tmp_path / "adapter", lambda path: read_config(str(path)))


def test_a_hub_that_cannot_be_reached_is_named_with_the_way_around_it():
    error = OSError(
        "We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cache.\nMore"
    )
    assert problem_of(error, "some/model") == (
        "it is not on this machine, and the Hub cannot be reached; download it elsewhere (`hf download some/model --local-dir "
        "DIR`) and give that directory"
    )
