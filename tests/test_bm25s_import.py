"""JAX stays out of a process that searches with BM25."""

import subprocess
import sys
from pathlib import Path

import pytest

FAKE = "raise SystemExit('jax was imported, and would hold most of a GPU')"
CODE = """
import sys
import search_e1.retrieval.bm25, bm25s, bm25s.selection
assert not bm25s.selection.JAX_IS_AVAILABLE
assert "jax" not in sys.modules
try:
    import jax
except SystemExit:
    print("jax can be imported by others")
"""


def test_bm25s_does_not_import_jax(tmp_path: Path) -> None:
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text(FAKE)
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "jax can be imported by others\n"), done.stderr


def test_a_jax_that_is_imported_already_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import jax, search_e1.retrieval.bm25, sys; assert sys.modules['jax'] is jax; import bm25s; bm25s.BM25()"
    (tmp_path / "jax.py").write_text("")
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path)}, check=False)
    assert done.returncode == 0
