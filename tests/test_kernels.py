"""The head's kernels: what Triton's interpreter makes of them, what the compiler does, and when they are used."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from search_e1.errors import ConfigError
from search_e1.training import kernels
from search_e1.training.divergence import fused_divergence
from search_e1.training.head import Head
from search_e1.training.kernels import choice, launch
from search_e1.training.logprobs import fused_token_loss
from search_e1.training.projection import kernel_chunks

WEIGHT, HIDDEN = torch.ones(4, 3), torch.ones(2, 3)
GPU = torch.device("cuda:0")


def test_values_and_gradients_by_the_interpreter():
    pytest.importorskip("triton")
    path = Path(__file__).with_name("kernels_interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr


ROWS, HALF, SCALES = "*fp32", "*bf16", ["fp32"] * 4
# Types of the arguments that are not constants, in order, and the constants: each branch of each kernel at least once.
DIVERGENCES = [
    (90, [ROWS, ROWS, HALF, ROWS, "i32", *SCALES, *SCALES],
     dict(student_bias=None, teacher_bias=None, DIVERGENCE="forward_kl", CLIPPED=True, WANTED=True, ASIDE=True,
          STUDENT_CAPPED=False, TEACHER_CAPPED=False)),
    (80, [ROWS, ROWS, "*fp16", ROWS, "i32", *SCALES, *SCALES],
     dict(student_bias=None, teacher_bias=None, DIVERGENCE="forward_kl", CLIPPED=False, WANTED=True, ASIDE=True,
          STUDENT_CAPPED=True, TEACHER_CAPPED=True)),
    (90, [ROWS, ROWS, ROWS, HALF, HALF, ROWS, "i32", *SCALES, *SCALES],
     dict(DIVERGENCE="js", CLIPPED=True, WANTED=True, ASIDE=False, STUDENT_CAPPED=True, TEACHER_CAPPED=False)),
    (80, [ROWS, ROWS, ROWS, ROWS, "i32", *SCALES, *SCALES],
     dict(gradient=None, teacher_bias=None, DIVERGENCE="reverse_kl", CLIPPED=True, WANTED=False, ASIDE=False,
          STUDENT_CAPPED=False, TEACHER_CAPPED=False)),
]  # fmt: skip
TOKENS = [
    (90, [ROWS, HALF, "*i64", ROWS, ROWS, "i32", "fp32", "fp32"], dict(bias=None, WANTED=True, CAPPED=False)),
    (80, [ROWS, HALF, "*i64", ROWS, ROWS, "i32", "fp32", "fp32"], dict(gradient=None, WANTED=False, CAPPED=True)),
]


@pytest.mark.parametrize(
    ("name", "capability", "types", "constants"),
    [*(("divergence", *case) for case in DIVERGENCES), *(("token", *case) for case in TOKENS)],
)
def test_compiles_to_machine_code(name, capability, types, constants, tmp_path, monkeypatch):
    """For GPUs that are not here, with the block of a large vocabulary and rows that are aligned."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        pytest.skip("Triton interprets in this process")
    try:
        triton.knobs.nvidia.ptxas  # noqa: B018 (it looks for the program)
    except RuntimeError:
        pytest.skip("no ptxas")
    from search_e1.training.kernels import programs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shape = launch._shape(151_936)
    kernel, constants = getattr(programs, name), {**constants, "BLOCK": shape["BLOCK"]}
    rest = iter(types)
    signature = {argument: "constexpr" if argument in constants else next(rest) for argument in kernel.arg_names}
    assert next(rest, None) is None
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] in "*i"}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": shape["num_warps"]}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert "ld.global.v4" in compiled.asm["ptx"]  # rows are read 16 bytes at a time


@pytest.mark.parametrize(
    ("positions", "vocabulary", "mib", "gradient", "sizes"),
    [
        # 2 roles x 4 bytes, and 2 for the gradient beside them: 384 of 151,936 entries are 557 MiB, 448 would be 650.
        (8192, 151_936, 1024, torch.bfloat16, [384] * 21 + [128]),
        (1000, 151_936, 1024, torch.bfloat16, [384, 384, 232]),
        (200, 151_936, 100, torch.bfloat16, [64, 64, 64, 8]),
        (200, 151_936, 100, torch.float32, [64, 64, 64, 8]),
        (5, 151_936, 3, torch.bfloat16, [2, 2, 1]),
        (5, 151_936, 3, None, [2, 2, 1]),
        (2, 151_936, 0.1, torch.bfloat16, [1, 1]),  # one must do
        (3, 10, 1024, torch.bfloat16, [3]),
        (0, 10, 1024, torch.bfloat16, []),
    ],
)
def test_chunks_fit_into_memory_and_make_whole_products(positions, vocabulary, mib, gradient, sizes):
    like = torch.empty(0, device="meta")
    got = list(kernel_chunks(positions, vocabulary, like, int(mib * 2**20), 2, gradient))
    assert [c.rows.stop - c.rows.start for c in got] == sizes
    assert [c.rows.start for c in got] == [sum(sizes[:i]) for i in range(len(sizes))]
    for chunk in got:
        (logits,) = chunk.tiles
        shape = (chunk.rows.stop - chunk.rows.start, vocabulary)
        assert logits.shape == (2, *shape)
        assert logits.is_contiguous()
        assert (chunk.gradient is None) == (gradient is None)
        if gradient is not None:
            assert (chunk.gradient.shape, chunk.gradient.dtype) == (shape, gradient)
            assert (chunk.gradient._base is logits._base) == (gradient is torch.float32)


@pytest.fixture
def _gpu(monkeypatch):
    """As if there were a GPU of today."""
    monkeypatch.setattr(choice, "multiplies_bfloat16", lambda device: True)
    choice.works.cache_clear()
    yield
    choice.works.cache_clear()


def on_gpu(tensor):
    return SimpleNamespace(device=GPU, dtype=tensor.dtype)


def test_used_on_a_gpu_where_they_work_and_know_the_case(monkeypatch):
    asked: list[torch.device] = []
    monkeypatch.setattr(choice, "works", lambda device: asked.append(device) or True)
    assert not choice.use_kernels(None, [(HIDDEN, Head(WEIGHT))])
    assert not choice.use_kernels(None, [(on_gpu(HIDDEN), Head(WEIGHT))], top_k=5)
    assert not choice.use_kernels(None, [(on_gpu(HIDDEN.double()), Head(WEIGHT))])
    assert not choice.use_kernels(None, [(on_gpu(HIDDEN), Head(WEIGHT)), (on_gpu(HIDDEN), Head(WEIGHT.bfloat16()))])
    assert not choice.use_kernels(False, [(on_gpu(HIDDEN), Head(WEIGHT))])
    assert not asked
    assert choice.use_kernels(None, [(on_gpu(HIDDEN), Head(WEIGHT)), (on_gpu(HIDDEN.bfloat16()), Head(WEIGHT))])
    assert asked == [GPU]


def fails(device):
    raise RuntimeError("device kernel image is invalid\nand more")


def why_not(caplog):
    """What the log says when the choice is made twice and falls on plain torch."""
    for _ in range(2):
        assert not choice.use_kernels(None, [(on_gpu(HIDDEN), Head(WEIGHT))])
    (record,) = caplog.records
    start, _, reason = record.getMessage().partition(" in plain torch, which is slower: ")
    assert start == "cuda:0: the loss over the vocabulary is computed"
    assert "\n" not in reason
    return reason


@pytest.mark.usefixtures("_gpu")
def test_without_triton_plain_torch_is_used(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, programs_name := f"{kernels.__name__}.programs", raising=False)
    monkeypatch.delattr(kernels, "programs", raising=False)
    reason = why_not(caplog)
    assert reason.startswith("Triton cannot be imported (")
    assert reason.endswith(f"install the version that torch {torch.__version__} requires")
    assert programs_name not in sys.modules


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(
    ("name", "result", "reason"),
    [
        ("multiplies_bfloat16", lambda device: False, "the GPU has no bfloat16; the kernels are for compute capability 8.0"),
        ("_differs", fails, "Triton's kernels do not run (RuntimeError: device kernel image is invalid); a newer driver may"),
        ("_differs", lambda device: "they differ from torch", "they differ from torch"),
    ],
)
def test_a_line_says_once_why_they_are_not_used(name, result, reason, monkeypatch, caplog):
    pytest.importorskip("triton")
    monkeypatch.setattr(choice, name, result)
    assert why_not(caplog).startswith(reason)


@pytest.mark.parametrize(("factor", "said"), [(1.0, None), (1.1, "by 0.1"), (float("nan"), "by nan")])
def test_the_trial_compares_with_torch(factor, said, monkeypatch):
    def plain(*args, kernel, **options):
        loss, figures = fused_divergence(*args, kernel=False, **options)
        return (loss * factor if kernel else loss), figures

    monkeypatch.setattr("search_e1.training.divergence.fused_divergence", plain)
    monkeypatch.setattr("search_e1.training.logprobs.fused_token_loss", partial(without_kernel, fused_token_loss))
    with torch.no_grad():  # as where log-probabilities are computed before an update
        found = choice._differs(torch.device("cpu"))
    assert found == (said and f"their results differ from torch's {said} (relative)")


def without_kernel(function, *args, kernel, **options):
    return function(*args, kernel=False, **options)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: fused_divergence(HIDDEN, HIDDEN, Head(WEIGHT), top_k=2, kernel=True), "not support top_k; leave `kernel` out"),
        (lambda: fused_divergence(HIDDEN.double(), HIDDEN.double(), Head(WEIGHT.double()), kernel=True), "torch.float64"),
        (lambda: fused_token_loss(HIDDEN, torch.tensor([0, 1]), Head(WEIGHT.bfloat16()), kernel=True), "in torch.bfloat16"),
    ],
)
def test_what_the_kernels_do_not_know_is_refused(call, what):
    with pytest.raises(ConfigError, match=what):
        call()
