"""All that `benchmarks/gpu.py` measures, at tiny sizes on a CPU; its file, its tables, and the planner's constants of it."""

import importlib
import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from forking import end, fork
from in_process import BENCHMARKS, run
from search_e1.lab.plan.constants import load_constants

DOCS = BENCHMARKS.parent / "docs" / "performance.md"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """The file of one run without TRL and Liger, and where it is."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        libraries = {"trl", "liger_kernel"}  # and their parts, which other tests may have imported
        for name in libraries | {name for name in sys.modules if name.partition(".")[0] in libraries}:
            patch.setitem(sys.modules, name, None)
        import gpu

        patch.setattr(gpu, "run", run)
        patch.setattr(gpu, "TINY", replace(gpu.TINY, planned=()))
        patch.setattr(sys, "argv", ["gpu.py", "--tiny", "--json", str(path), "--parts", *(set(gpu.PARTS) - {"tests"})])
        gpu.main()
    return json.loads(path.read_text()), path


def rows(report: dict, part: str) -> dict[tuple, dict]:
    return {tuple(row["of"].values()): row for row in report["parts"][part]["rows"]}


def test_every_part_measures_ours_and_says_what_is_missing(made) -> None:
    report, _ = made
    assert list(report["parts"]) == ["ceilings", "divergence", "decoding", "rollouts", "updates", "coldstart", "plan"]
    assert all(part["complete"] for part in report["parts"].values())
    failed = [row for part in report["parts"].values() for row in part["rows"] if "failed" in row]
    assert {str(row["of"].get("candidate", row["of"].get("contestant"))).split(",")[0] for row in failed} == {"TRL", "Liger"}
    assert all("trl" in row["failed"] or "liger" in row["failed"] for row in failed)
    divergence = rows(report, "divergence")
    assert divergence["all positions", "ours"]["loss"] == pytest.approx(divergence["all positions", "naive"]["loss"], rel=0.02)
    assert {row["tokens_s"] > 0 for row in rows(report, "decoding").values()} == {True}
    assert rows(report, "rollouts")["tiny", "4 turns"]["tokens"] == 2 * 4 * 3
    updates = {key[:3]: row for key, row in rows(report, "updates").items() if key[3] == "ours"}
    assert len(updates) == 4
    for row in updates.values():
        assert row["tokens"] > row["sampled"] > 0
        assert 0 < row["head_share"] < 1
        assert row["norm"] > 0
    # Attention's and the head's operations aside, all weights cost half as much again as adapters.
    ratio = updates["grpo", "tiny", "all"]["flops"] / updates["grpo", "tiny", "lora"]["flops"]
    assert 1.3 < ratio <= 1.5


def test_what_the_file_has_is_not_measured_again(made, monkeypatch, tmp_path) -> None:
    import gpu

    report, path = made
    asked = []

    def counted(command, seconds):
        asked.append(command[0])
        return {"device": report["machine"]["device"], "gpu": None, "versions": {}} if "machine" in command else {"failed": "x"}

    monkeypatch.setattr(gpu, "run", counted)
    monkeypatch.setattr(gpu, "TINY", replace(gpu.TINY, planned=()))
    copy = tmp_path / "copy.json"
    copy.write_text(path.read_text())
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--json", str(copy), "--parts", "ceilings", "updates"])
    gpu.main()
    assert asked == ["gpu_measure.py"]  # which machine this is
    assert json.loads(copy.read_text())["parts"] == report["parts"]
    again = ["gpu.py", "--tiny", "--json", str(copy), "--parts", "ceilings", "--again", "decoding"]
    monkeypatch.setattr(sys, "argv", again)
    gpu.main()
    again = json.loads(copy.read_text())["parts"]
    assert [row["failed"] for row in again["decoding"]["rows"]] == ["x", "x"]
    assert again["updates"] == report["parts"]["updates"]


def test_a_part_out_of_time_is_begun_by_the_next_call_and_a_spare_job_runs_where_the_one_before_failed(
    monkeypatch, tmp_path
) -> None:
    import gpu

    clock, machine = [0.0], {"device": "a", "gpu": None, "versions": {}}

    def job(command, seconds):
        if "machine" in command:
            return machine
        written = tmp_path / "gpu.json"  # if it is cut off now, the part is not complete
        assert not written.exists() or not json.loads(written.read_text())["parts"]["updates"]["complete"]
        clock[0] += 150
        return {"failed": "out of memory"} if "TRL" in command and "--checkpointing" not in command else {"flops": 1.0}

    monkeypatch.setattr(gpu, "run", job)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    report = gpu.Report(tmp_path / "gpu.json", machine)
    report.measure("updates", gpu.TINY, 1e9)  # 360 seconds hold three jobs
    names = [row["of"]["contestant"] for row in report.parts["updates"]["rows"]]
    assert names == ["ours", "TRL, 4 rows a pass", "TRL, 2 rows a pass, checkpointing"]
    assert not json.loads((tmp_path / "gpu.json").read_text())["parts"]["updates"]["complete"]
    for _ in range(3):
        report = gpu.Report.read(tmp_path / "gpu.json", gpu.TINY)
        report.measure("updates", gpu.TINY, 1e9)
    assert report.parts["updates"]["complete"]
    assert len(report.parts["updates"]["rows"]) == 12
    machine = {**machine, "device": "b"}
    with pytest.raises(SystemExit, match=r"gpu.json is of a, and this is b; give another --json FILE"):
        gpu.Report.read(tmp_path / "gpu.json", gpu.TINY)


@pytest.mark.parametrize(
    ("status", "said", "why"),
    [
        (1, "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n", "out of memory"),
        (1, "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes\n  frame 0", "out of memory"),
        (-9, "", "ended by SIGKILL: out of memory?"),
        (1, "ModuleNotFoundError: No module named 'trl'", "trl is not installed"),
        (3, "", "ended with status 3"),
        (1, "a\nValueError: no\n", "ValueError: no"),
    ],
)
def test_a_contestant_that_fails_is_a_row(status: int, said: str, why: str) -> None:
    import contest

    assert contest.reason(status, said) == why


def test_processes_are_rows() -> None:
    from contest import measured

    def ran(code: str, **options):
        return measured([sys.executable, "-c", code], **options)

    assert ran("print('x'); print('{\"a\": 1}')") == {"a": 1}
    said = "x\\nsampling without y, which is slower: z\\n"
    assert ran(f"import sys; sys.stderr.write('{said}'); print('{{}}')") == {
        "slower": ["sampling without y, which is slower: z"]
    }
    assert ran("print('no JSON')") == ran("") == {"failed": "it printed no figures"}
    assert ran("raise MemoryError") == {"failed": "out of memory"}
    assert ran("import time; time.sleep(60)", seconds=0.2) == {"failed": "not done in 0 s"}


# Tables and constants.


def a_report(device: str = "NVIDIA H200", gpu: str | None = "h200-141gb") -> dict:
    """Updates at 20% and 30% of the sheet's 989 TFLOP/s; steps of 36 layers at half the 4,800 GB/s and 0.1 ms a layer."""
    updates = [
        {"of": {"objective": "grpo", "shape": s, "weights": "lora", "contestant": "ours"}, "flops": share * 989e12,
         "seconds": 1.0, "tokens_s": 9.0, "head_share": 0.1, "mib": 1024.0, "loss": 0.0, "norm": 1.0, "pass_tokens": 1024}
        for s, share in (("a", 0.2), ("b", 0.25), ("c", 0.3))
    ]  # fmt: skip
    updates.append({"of": {**updates[0]["of"], "contestant": "TRL, 8 rows a pass"}, "failed": "out of memory"})
    steps = [
        {"of": {"rows": rows}, "bytes": size, "layers": 36, "ms": size / 2400e6 + 3.6, "tokens_s": 1.0, "gib": 1.0}
        for rows, size in ((1, 6e9), (320, 24e9))
    ]
    plans = [{"of": {"stage": "grpo"}, "scoring": 0.4, "ratio": 0.93, "s ratio": 1.1, "MiB measured": 1.0, "computed": 0.93,
              "s": 1.0, "s computed": 1.1}]  # fmt: skip
    parts = {"updates": updates, "decoding": steps, "plan": plans, "ceilings": [
        {"of": {"what": "x"}, "tflops_bfloat16": 800.0, "tflops_float32": 50.0, "copy_gb_s": 4000.0}]}  # fmt: skip
    return {
        "machine": {"device": device, "gpu": gpu, "versions": {"torch": "2.13.0", "trl": None}},
        "parts": {name: {"seconds": 1.0, "complete": name != "plan", "rows": own} for name, own in parts.items()},
    }


def test_the_planners_constants_are_those_that_were_measured(tmp_path: Path, monkeypatch) -> None:
    import gpu_report

    (tmp_path / "gpu.json").write_text(json.dumps(a_report()))
    out = tmp_path / "measured.toml"
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(tmp_path / "gpu.json"), "--constants", str(out)])
    gpu_report.main()
    made = tomllib.loads(out.read_text())
    assert made["hours"] == pytest.approx({"training": 0.25, "forward": 0.4, "bandwidth": 0.5, "layer_ms_torch": 0.1})
    assert made["measured"]["hours_error"] == pytest.approx(0.2)  # 30% beside 25%
    assert made["measured"]["memory_error"] == pytest.approx(0.07)
    known = load_constants(out)
    assert known.measured.device == "NVIDIA H200"
    assert known.hours["layer_ms_vllm"] == load_constants().hours["layer_ms_vllm"]
    (tmp_path / "own.toml").write_text("[hours]\ntraining = 0.4\n")
    assert load_constants(tmp_path / "own.toml").measured is None
    assert gpu_report.constants_of(a_report("7 cores", None)) is None


def test_tables_say_what_was_measured_and_what_was_not() -> None:
    import gpu_report

    text = gpu_report.markdown("updates", a_report())
    lines = text.splitlines()
    assert lines[0].startswith("| objective | shape | weights | contestant | s | tokens/s | of the ceiling |")
    assert lines[2] == "| grpo | a | lora | ours | 1.00 | 9 | 25% | 10% | 1.0 | 0.00000 | 1.0000 | 1,024 |"
    assert lines[5].startswith("| grpo | a | lora | TRL, 8 rows a pass | out of memory | ")
    assert {line.count("|") for line in lines[:6]} == {13}
    assert text.endswith("\n\nNVIDIA H200; torch 2.13.0, trl not installed.")
    slow = a_report()
    slow["parts"]["updates"]["rows"][1]["slower"] = ["decoding without CUDA graphs, which is slower: no"]
    note = "grpo, b, lora, ours: decoding without CUDA graphs, which is slower: no"
    assert gpu_report.markdown("updates", slow) == text.replace("\n\nNVIDIA", f"\n\n{note}\n\nNVIDIA")
    assert gpu_report.markdown("plan", a_report()).endswith(" Incomplete: `python benchmarks/gpu.py --parts plan` goes on.")
    assert gpu_report.markdown("coldstart", a_report()) == "Not measured yet: `python benchmarks/gpu.py --parts coldstart`."


def test_the_docs_have_a_place_for_every_table() -> None:
    import gpu_report

    text = DOCS.read_text(encoding="utf-8")
    filled = gpu_report.fill(text, a_report())
    assert "| grpo | a | lora | ours | 1.00 |" in filled
    assert gpu_report.fill(filled, a_report()) == filled
    with pytest.raises(SystemExit, match="needed once in the text"):
        gpu_report.fill(text.replace("<!-- gpu: plan -->", ""), a_report())


def test_the_tests_of_the_cuda_paths_are_counted(monkeypatch) -> None:
    import gpu_measure

    said = "..s.F                                        [ 50%]\n.....E    [100%]\nFAILED tests/test_gpu.py::test_x - assert\n"

    def ran(command, **options):
        assert [part for part in command if part.endswith("test_gpu.py")]
        assert "gpu" in command
        return type("Done", (), {"stdout": said, "stderr": "", "returncode": 1})

    monkeypatch.setattr(gpu_measure.subprocess, "run", ran)
    found = gpu_measure.tests(None)
    assert found == {"passed": 8, "skipped": 1, "broken": 1, "errors": 1, "status": 1, "names": ["tests/test_gpu.py::test_x"]}
    broken = type("Done", (), {"stdout": "", "stderr": "ImportError while loading conftest\nE   No module named 'x'\n"})
    broken.returncode = 4
    monkeypatch.setattr(gpu_measure.subprocess, "run", lambda *_, **__: broken)
    assert gpu_measure.tests(None) == {"failed": "pytest: E   No module named 'x'"}


def test_a_bare_machine_is_enough(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What the package needs beside the libraries that train is not asked for. These are imported already: seconds less."""
    absent = ("bm25s", "dateutil", "gguf", "httpx", "Stemmer", "tenacity", "tomli_w")
    scripts = ("gpu", "gpu_measure", "gpu_report", "divergence", "plan", "rollout_shape", "update")
    for name in absent:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")

    def imports() -> None:
        for name in list(sys.modules):
            if name.partition(".")[0] in ("search_e1", *absent, *scripts):
                del sys.modules[name]
        sys.path.insert(0, str(tmp_path))
        for name in (*scripts, "search_e1.training.divergence"):
            importlib.import_module(name)

    assert end([fork(imports)]) == [0], capfd.readouterr().err
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("device", "gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "h100-80gb"),
        ("NVIDIA H100 PCIe", 79.1, "h100-pcie-80gb"),
        ("NVIDIA H200", 139.7, "h200-141gb"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA A100-PCIE-80GB", 79.1, "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", 23.5, "4090-24gb"),
        ("Tesla T4", 15, None),
    ],
)
def test_a_gpus_data_sheet_is_found_by_its_drivers_name(device: str, gib: float, name: str | None) -> None:
    from gpu_measure import sheet_of

    found = sheet_of(device, gib)
    assert (found and found.name) == name
