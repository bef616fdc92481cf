"""Benchmarks and scripts still find what they use in the package; what they measure is run by hand."""

import runpy
import sys
from pathlib import Path

import pytest

from forking import end, fork

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("benchmarks", "scripts") for path in (ROOT / folder).glob("*.py"))


def load(path: Path) -> None:
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="loaded")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_it_loads(path):
    """In a fork: what it sets is for itself."""
    assert end([fork(load, path)]) == [0]
