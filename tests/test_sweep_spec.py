"""The sweep file: variants, the grid, what lies over what, and what is refused."""

from pathlib import Path

import pytest

from search_e1.errors import ConfigError
from search_e1.lab.sweep import spec

CONFIG = """
run = "runs/x"
rounds = 3
[policy]
model = "small"
[data]
corpus = "corpus.jsonl"
train = "train.jsonl"
eval = { nq = "nq.jsonl" }
[grpo]
steps = 5
"""


def read(tmp_path: Path, text: str, *flags: str) -> spec.Sweep:
    (tmp_path / "base.toml").write_text(CONFIG)
    (tmp_path / "sweep.toml").write_text(text)
    return spec.read(tmp_path / "sweep.toml", tmp_path / "base.toml", Path("out"), flags)


def refusal(tmp_path: Path, text: str, *flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, *flags)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_variants_times_seeds(tmp_path):
    sweep = read(
        tmp_path,
        'seeds = [3, 1]\nreference = "b"\n'
        '[variants.a]\ndistill.divergence = "js"\ndistill.beta = 0.3\n[variants.b]\nrounds = 1\n',
    )
    assert [run.name for run in sweep.runs] == ["a/3", "a/1", "b/3", "b/1"]
    assert (sweep.reference, sweep.variants, sweep.seeds) == ("b", ["a", "b"], [3, 1])
    first, last = sweep.runs[0].config, sweep.runs[-1].config
    assert (first.run, first.seed, first.rounds) == (Path("out/runs/a/3"), 3, 3)
    assert (first.distill.divergence, first.distill.beta) == ("js", 0.3)
    assert (last.run, last.seed, last.rounds, last.distill.divergence) == (Path("out/runs/b/1"), 1, 1, "forward_kl")


def test_a_variant_lies_over_flags_over_common_over_the_config(tmp_path):
    text = "[common]\ngrpo.steps = 6\nrounds = 2\n[variants.plain]\n[variants.long]\ngrpo.steps = 8\n"
    plain, long = (run.config for run in read(tmp_path, text, "--grpo.steps", "7").runs)
    assert (plain.grpo.steps, plain.rounds) == (7, 2)
    assert (long.grpo.steps, long.rounds) == (8, 2)


@pytest.mark.parametrize("flags", [("--seed", "5"), ("--run", "elsewhere")])
def test_flags_set_neither_seed_nor_directory(tmp_path, flags):
    assert refusal(tmp_path, "[variants.a]\n", *flags).startswith(f"{flags[0]}: the sweep sets it; give `seeds`")


def test_each_run_goes_on_from_what_another_sweep_made_under_its_seed(tmp_path):
    text = 'seeds = [3, 1]\n[common]\npolicy.model = "runs/first/{seed}/policy"\n'
    text += '[variants.a]\nprompts.instruction = "{question}"\n'
    sweep = read(tmp_path, text)
    assert [run.config.policy.model for run in sweep.runs] == ["runs/first/3/policy", "runs/first/1/policy"]
    assert {run.config.prompts.instruction for run in sweep.runs if run.config.prompts} == {"{question}"}


def test_a_grid_multiplies_the_variants(tmp_path):
    grid = '[grid]\ngrpo.steps = [1, 2]\n"distill.clip" = ["entry", "none"]\n'
    sweep = read(tmp_path, grid)
    assert sweep.variants == ["steps-1+clip-entry", "steps-1+clip-none", "steps-2+clip-entry", "steps-2+clip-none"]
    assert [(run.config.grpo.steps, run.config.distill.clip) for run in sweep.runs] == [
        (1, "entry"), (1, "none"), (2, "entry"), (2, "none"),
    ]  # fmt: skip
    both = read(tmp_path, f"{grid}[variants.a]\nrounds = 1\n[variants.b]\n")
    assert both.variants[0] == "a+steps-1+clip-entry"
    assert len(both.runs) == 8


def test_keys_of_the_grid_that_end_alike_are_told_apart(tmp_path):
    sweep = read(tmp_path, "[grid]\ngrpo.learning_rate = [1e-6]\ndistill.learning_rate = [2e-5]\n")
    assert sweep.variants == ["grpo.learning_rate-1e-06+distill.learning_rate-2e-05"]


def test_without_variants_the_config_itself_is_run(tmp_path):
    assert [run.name for run in read(tmp_path, "seeds = [0, 1]").runs] == ["base/0", "base/1"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed = [1]", "sweep.toml: seed: extra inputs are not permitted; known: seeds, reference, common, variants, grid"),
        ("seeds = []", "sweep.toml: seeds: tuple should have at least 1 item"),
        ("seeds = [1, 1]", "sweep.toml: seeds: a value is repeated"),
        ("seeds = [-1]", "sweep.toml: seeds.0: input should be greater than or equal to 0"),
        ('reference = "c"\n[variants.a]\n', "sweep.toml: reference = 'c': no such variant; known: a"),
        ("[variants.a]\nseed = 1", "sweep.toml: variants.a.seed: the sweep sets it"),
        ('[common]\nrun = "x"', "sweep.toml: common.run: the sweep sets it"),
        ("[variants.a]\ngrpo.step = 1", "variant 'a': base.toml: unknown key 'grpo.step'; did you mean 'grpo.steps'?"),
        ("[variants.a]\ndistill.beta = 0.3", "variant 'a': base.toml: distill"),
        ("[grid]\ngrpo.steps = 3", "sweep.toml: grid.grpo.steps = 3: give a list of values"),
        ('[variants."../a"]', "sweep.toml: variant '../a': cannot be the name of a directory"),
        ("[variants.a]\n[variants.b]\n", "sweep.toml: variants 'a' and 'b' are the same config; remove one"),
        ("[variants", "sweep.toml: not TOML"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, text, said):
    assert refusal(tmp_path, text).startswith(said)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none.toml: no such file"):
        spec.read(tmp_path / "none.toml", tmp_path / "base.toml", tmp_path)


def test_the_checked_in_sweeps_can_be_read():
    root = Path(__file__).parent.parent / "configs"
    files = sorted((root / "sweeps").glob("*.toml"))
    assert files
    for file in files:
        assert spec.read(file, root / "quickstart.toml", Path("out")).runs
