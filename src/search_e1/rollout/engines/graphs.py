"""CUDA graphs: steps recorded once and replayed without Python and without a launch per kernel."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], torch.Tensor]
_HOST_READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}


class CaptureError(Exception):
    """A step cannot be replayed; the message says why."""


class Recorder(Protocol):
    """Records steps."""

    @property
    def bytes(self) -> int:
        """Memory of recorded steps, in addition to their input and output tensors."""
        ...

    def capture(self, step: Step) -> tuple[Callable[[], object], torch.Tensor]:
        """A function that replays ``step``, and the tensor that receives its result.

        ``step`` runs a few times during the capture. A replay uses the same memory, so inputs must be updated in place.

        Raises:
            CaptureError: the step cannot be replayed.
        """
        ...


class CudaGraphs:
    """Records CUDA graphs of one device in a shared memory pool; only one may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()

    @property
    def bytes(self) -> int:
        """See ``Recorder``. Torch counts most of it as reserved, not allocated, but only these graphs can use it."""
        return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(self._pool))

    def capture(self, step: Step) -> tuple[Callable[[], object], torch.Tensor]:
        """See ``Recorder``."""
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream()
            try:
                return self._capture(step, before)
            except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
                torch.cuda.set_stream(before)  # the failed context did not restore it
                if out_of_memory := _out_of_memory(error):
                    raise out_of_memory from None
                raise CaptureError(str(error).partition("\n")[0] or type(error).__name__) from error

    def _capture(self, step: Step, before: torch.cuda.Stream) -> tuple[Callable[[], object], torch.Tensor]:
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            step()  # warm-up: lazy setup and autotuning must not be captured
            with NoHostReads():  # check first: a failed capture leaves torch's random generator unusable
                step()
        before.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local", because a retriever's encoder may allocate in its own thread meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = step()
        return graph.replay, result


class NoHostReads(TorchDispatchMode):
    """Raises ``CaptureError`` on transfers between host and device, including reads of a scalar."""

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        devices = {one.device.type for one in args if isinstance(one, torch.Tensor)}
        if (
            (name in _HOST_READS and self._device in devices)
            or (name == "lift_fresh" and result.device.type == self._device)  # a tensor from Python numbers
            or (name in ("_to_copy", "copy_") and len(devices | {result.device.type}) > 1)
        ):
            raise CaptureError(f"the model computes on the host ({name})")
        return result


def _out_of_memory(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """The out-of-memory error in the context chain of ``error``: ending a failed capture raises another error on top of it."""
    while error:
        if isinstance(error, torch.OutOfMemoryError):
            return error
        error = error.__context__
    return None
