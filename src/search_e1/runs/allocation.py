"""How the process takes memory from the system."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT = 2**30


def keep_freed_memory() -> None:
    """Let glibc keep up to 1 GiB of freed memory, and take large blocks from it too, for the life of the process.

    A forward pass on a CPU frees all of its activations and takes them again in the next. By default large blocks go back
    to the system each time and come again as pages to be cleared: a sixth to a quarter of the time of sampling from the
    small policy. Elsewhere than under glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_TRIM_THRESHOLD, _KEPT)
    mallopt(_MMAP_THRESHOLD, _KEPT)
