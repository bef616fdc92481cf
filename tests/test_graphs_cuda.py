"""Recorded steps with CUDA: how a capture fails, by a stand-in; and the real one where there is a GPU (`pytest -m gpu`)."""

import inspect
from contextlib import contextmanager, nullcontext

import pytest
import torch

from search_e1.rollout.engines import torch as hf
from search_e1.rollout.engines.graphs import CaptureError, CudaGraphs
from test_engine import random_policy
from test_graphs import plainly, tokens


class _Cuda:
    """What ``CudaGraphs`` takes of ``torch.cuda``, by the names and arguments that the real one has."""

    CUDAGraph = type("CUDAGraph", (), {"replay": lambda self: "replayed"})
    graph_pool_handle = staticmethod(lambda: "pool")
    memory_snapshot = staticmethod(lambda mempool_id: {"pool": [{"total_size": 2**21}, {"total_size": 2**20}]}[mempool_id])
    device = staticmethod(lambda device: nullcontext())
    real_graph = inspect.signature(torch.cuda.graph.__init__)

    def __init__(self, failure: Exception | None) -> None:
        self.failure, self.current, self.capturing = failure, self.Stream(), False

    class Stream:
        def wait_stream(self, stream) -> None:
            pass

    def take_over(self, monkeypatch) -> None:
        for name in (
            "CUDAGraph", "Stream", "current_stream", "set_stream", "stream", "graph", "graph_pool_handle", "device",
            "memory_snapshot",
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def current_stream(self):
        return self.current

    def set_stream(self, stream) -> None:
        self.current = stream

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def graph(self, *args, **kwargs):
        self.real_graph.bind(None, *args, **kwargs)
        before, self.current, self.capturing = self.current, kwargs["stream"], True
        try:
            yield
            if self.failure:
                raise self.failure
        finally:  # as torch does: after a failure the end of the capture fails, too, and its stream stays the current one
            if self.failure:
                raise RuntimeError("operation failed due to a previous error during capture\nMore of it")
        self.current, self.capturing = before, False


@pytest.mark.parametrize(
    ("failure", "raised", "message"),
    [
        (None, None, ""),
        (RuntimeError("operation not permitted when stream is capturing"), CaptureError, "operation failed due to"),
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError, "CUDA out of memory."),
    ],
)
def test_a_capture_that_fails_says_why_and_leaves_the_stream_as_it_was(failure, raised, message: str, monkeypatch) -> None:
    fake, ran = _Cuda(failure), []
    before = fake.current
    fake.take_over(monkeypatch)

    def step() -> torch.Tensor:
        ran.append((fake.current is before, fake.capturing))
        return torch.zeros(1)

    with pytest.raises(raised, match=message) if raised else nullcontext():
        replay, result = CudaGraphs(torch.device("cuda")).capture(step)
        assert (replay(), result.tolist()) == ("replayed", [0.0])
    assert ran == [(False, False), (False, False), (False, True)]
    assert fake.current is before


def test_what_graphs_hold_are_the_segments_of_their_pool(monkeypatch) -> None:
    _Cuda(None).take_over(monkeypatch)
    assert CudaGraphs(torch.device("cuda")).bytes == 3 * 2**20


def test_a_step_that_fails_before_its_capture_says_why(monkeypatch) -> None:
    fake = _Cuda(None)
    before = fake.current
    fake.take_over(monkeypatch)

    def step() -> torch.Tensor:
        raise NotImplementedError("no kernel for 80 heads\nand more")

    with pytest.raises(CaptureError, match=r"^no kernel for 80 heads$"):
        CudaGraphs(torch.device("cuda")).capture(step)
    assert fake.current is before


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
SAMPLED = pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma3_text", "lfm2"])
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def gpu_policy(family: str, dtype: torch.dtype):
    policy = random_policy(family, hidden_size=256, head_dim=64)
    policy.model = policy.model.to("cuda", dtype)
    return policy


@pytest.mark.gpu
@on_a_gpu
@TYPES
@SAMPLED
def test_graphs_on_a_gpu_sample_from_updated_weights(family: str, dtype: torch.dtype) -> None:
    policy, seen = gpu_policy(family, dtype), []
    for _ in range(2):
        seen.append((tokens(policy, temperature=0.0), plainly(lambda: tokens(policy, temperature=0.0))))
        loop = hf._kept[policy.model].loop  # its first replay had the plain step's logits
        assert type(loop.cache) is (hf.RaggedCache if dtype == torch.float32 else hf.PagedCache)
        assert len(loop._recorded) == 1
        with torch.no_grad():
            head = policy.model.get_output_embeddings().weight
            head.copy_(head.roll(1, 0))
    assert seen[0][0] != seen[1][0]
    if dtype == torch.float32:  # in half precision rounding decides between ids of like probability
        assert all(ours == plain for ours, plain in seen)


@pytest.mark.gpu
@on_a_gpu
@TYPES
@SAMPLED
def test_a_replay_on_a_gpu_waits_for_nothing(family: str, dtype: torch.dtype) -> None:
    policy = gpu_policy(family, dtype)
    tokens(policy)
    loop = hf._kept[policy.model].loop
    assert loop.bytes > loop.cache.bytes
    [recorded] = loop._recorded.values()
    torch.cuda.set_sync_debug_mode("error")
    try:
        recorded.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_a_gpu
def test_a_gpu_goes_without_graphs_where_the_model_computes_on_the_host(monkeypatch, caplog) -> None:
    policy = gpu_policy("qwen2", torch.float32)
    expected, forward = plainly(lambda: tokens(policy)), policy.model.forward

    def reading(*args, position_ids, **kwargs):
        return forward(*args, position_ids=position_ids + 0 * int(position_ids.max()), **kwargs)

    monkeypatch.setattr(policy.model, "forward", reading)
    assert tokens(policy) == expected
    assert "without CUDA graphs" in caplog.text
    assert torch.rand(2, device="cuda").isfinite().all(), "torch's generator is as it was"
