"""Helpers to load a model: its device, and no progress bars."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging as transformers_logging

from search_e1.errors import ModelError


@contextmanager
def no_bars() -> Iterator[None]:
    """Turn off transformers' progress bars over files and weights within the context."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is an accelerator if there is one.

    Raises:
        ModelError: the device is unknown, or this machine does not have it.
    """
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return there or torch.device("cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ModelError(f"device = {name!r}: no such device; write auto, cpu, cuda, cuda:1, ...") from None
    if found.type not in ("cpu", "meta", there.type if there else "cpu"):
        raise ModelError(f"device = {name!r}: not available here; use auto, or {there.type if there else 'cpu'}")
    return found
