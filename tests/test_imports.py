"""What is imported, and what is not: JAX, which takes three quarters of a GPU when it is first used, by nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from agent_serving import make_bundle

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


def environment(modules: Path) -> dict[str, str]:
    """That of a process which finds ``modules`` first. One thread: several that spin on busy cores take seconds."""
    return {"PYTHONPATH": str(modules), "OMP_NUM_THREADS": "1"}


def test_bm25s_does_not_import_jax(tmp_path: Path) -> None:
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text(FAKE)
    done = subprocess.run([sys.executable, "-c", CODE], env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "jax can be imported by others\n"), done.stderr


def test_a_jax_that_is_imported_already_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import jax, search_e1.retrieval.bm25, sys; assert sys.modules['jax'] is jax; import bm25s; bm25s.BM25()"
    (tmp_path / "jax.py").write_text("")
    done = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), check=False)
    assert done.returncode == 0


EVERYTHING = """
import gc, importlib, pkgutil, sys
gc.disable()  # a million objects that stay
import search_e1
with search_e1.Agent.open(sys.argv[1]) as agent:
    agent.ask("capital of Arda?")
heavy = {"datasets", "diskcache", "faiss", "fastapi", "peft", "pyarrow", "sentence_transformers"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert not {"search_e1.training.trained", "search_e1.stages"} & set(sys.modules)
import search_e1.retrieval.encoder
assert "sentence_transformers" not in sys.modules  # but with the first encoder
for module in pkgutil.walk_packages(search_e1.__path__, "search_e1."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for library in ("bm25s", "datasets", "faiss", "peft", "pyarrow.parquet", "sentence_transformers", "transformers"):
    importlib.import_module(library)
assert "jax" not in sys.modules and "flax" not in sys.modules
"""


def test_an_agent_imports_nothing_that_only_trains_and_nothing_at_all_imports_jax(tmp_path: Path) -> None:
    """JAX is found by its metadata too, as ``transformers`` and ``datasets`` look for it. One process: it takes seconds."""
    bundle = make_bundle(tmp_path / "agent")
    for name in ("jax", "flax"):
        (tmp_path / f"{name}.py").write_text(FAKE)
        (tmp_path / f"{name}-0.8.0.dist-info").mkdir()
        (tmp_path / f"{name}-0.8.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.8.0\n")
    command = [sys.executable, "-c", EVERYTHING, bundle]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
