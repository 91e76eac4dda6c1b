"""`besa prune --plan`: what it says is what runs take, it writes nothing, and needs no weights."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from besa.bench.random_models import SHAPES
from besa.demo import MODEL
from besa.planning.advice import advice_for
from besa.planning.need import lacking, need_of, setting_of
from besa.planning.prune import plan_prune, work_of
from besa.planning.room import Room
from besa.planning.shapes import ModelShape, open_headers, shape_of
from besa.planning.work import Speed, Work
from besa.pruning.config import PruneConfig
from tests.helpers import everything, random_model, run, save_with_tokenizer

CPU = torch.device("cpu")
LLAMA_405B = {
    **SHAPES["llama-2-7b"],
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}
SETTINGS = ("--samples", 8, "--seqlen", 64)


def shape_from(directory: Path, config: dict[str, object]) -> ModelShape:
    """The shape of a model that has a config.json alone."""
    (directory / "config.json").write_text(json.dumps(config))
    return shape_of(open_headers(directory), PruneConfig(out="pruned"))


def planned_bytes(output: str) -> float:
    """The bytes at the peak that a plan prints."""
    number, unit = re.search(r"together +([\d.]+) (MiB|GiB) of", output).groups()
    return float(number) * {"MiB": 2**20, "GiB": 2**30}[unit]


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """One block of 7 million weights: enough to see it beside Python and torch."""
    model = random_model(
        "llama", hidden_size=768, intermediate_size=2048, num_hidden_layers=1, dtype=torch.bfloat16
    )
    return save_with_tokenizer(model.bfloat16(), tmp_path_factory.mktemp("wide"), tiny_model)


@pytest.mark.parametrize("name", ["embedded", "wide"])
def test_memory_is_what_a_run_takes(name: str, wide_model: Path, tmp_path: Path):
    model = MODEL if name == "embedded" else wide_model
    before = everything(model)
    plan = run("prune", model, "--plan", *SETTINGS, cwd=tmp_path)
    assert plan.returncode == 0, plan.errors
    assert "It fits." in plan.output
    # It wrote nothing.
    assert {path.name for path in tmp_path.iterdir()} == {"stdout-0", "stderr-0"}
    assert everything(model) == before
    done = run("prune", model, "--out", "pruned", *SETTINGS, cwd=tmp_path)
    assert done.returncode == 0, done.errors
    peak = json.loads((tmp_path / "pruned/besa.json").read_text())["peak_memory_bytes"]
    assert planned_bytes(plan.output) == pytest.approx(peak, rel=0.25)


def test_a_run_still_needs_an_out(tiny_model: Path, tmp_path: Path):
    process = run("prune", tiny_model, cwd=tmp_path)
    assert process.returncode == 2
    assert process.errors == "besa prune: the following arguments are required: --out\n"


def test_what_does_not_fit_has_an_exit_code_and_advice(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_405B))
    process = run("prune", tmp_path, "--plan", cwd=tmp_path)
    assert process.returncode == 3, process.errors
    assert "406 B parameters in 126 blocks" in process.output
    assert "It does not fit" in process.output
    assert "--update none: " in process.output


def test_mixtures_are_planned_by_their_config(tmp_path: Path):
    shape = shape_from(tmp_path, SHAPES["qwen3-30b-a3b"])
    assert shape.parameters == pytest.approx(30.5e9, rel=0.01)
    experts = [x for x in shape.blocks[0].linears if x.share < 1]
    assert {x.uses for x in experts} == {8}
    setting = setting_of(PruneConfig(out="pruned"), shape, CPU, 2048)
    seen = work_of(shape, setting)["statistics"].products / setting.tokens / 2
    assert seen == pytest.approx(3.3e9, rel=0.2)  # the weights that a token meets, and attention


def test_advice_fits_and_gains_what_it_says(tmp_path: Path):
    config = PruneConfig(out="pruned")
    shape = shape_from(tmp_path, {**SHAPES["tinyllama"], "dtype": "bfloat16"})
    setting = setting_of(config, shape, CPU, 2048)
    before = need_of(shape, setting, 0)
    room = Room(host=before.host.total * 3 // 4, process=0, device=None, disk=10**12)
    advice = {each.flag: each for each in advice_for(shape, setting, CPU, 2048, room)}
    assert next(iter(advice)) in ("--activations disk", "--method wanda --update none")
    changed = replace(config, activations="disk")
    after = need_of(shape, setting_of(changed, shape, CPU, 2048), 0)
    assert advice["--activations disk"].gain == before.host.total - after.host.total
    assert advice["--activations disk"].fits == (not lacking(after, room))
    assert after.activations > 0


def test_changes_that_do_not_suffice_alone_are_tried_together(tmp_path: Path):
    config = PruneConfig(out="pruned")
    shape = shape_from(tmp_path, {**SHAPES["tinyllama"], "dtype": "bfloat16"})
    setting = setting_of(config, shape, CPU, 2048)
    room = Room(host=2 * 10**9, process=0, device=None, disk=10**12)
    *alone, together = advice_for(shape, setting, CPU, 2048, room)
    assert not any(each.fits for each in alone)
    assert together.fits
    assert together.flag.count("--") > 1


def test_a_gpu_holds_the_block_and_the_host_the_stored_ones(tmp_path: Path):
    """LLaMA-2-7B's blocks on an H100 (benchmarks/results/gpu-pipeline.json)."""
    shape = shape_from(
        tmp_path, {**SHAPES["llama-2-7b"], "num_hidden_layers": 2, "vocab_size": 4096}
    )
    shape = replace(shape, dtype=torch.bfloat16)
    config = PruneConfig(out="pruned", samples=32, update="none", teacher="pruned")
    setting = setting_of(config, shape, torch.device("cuda"), 2048)
    need = need_of(shape, setting, process=2 * 10**9)
    assert need.device is not None
    assert need.device.total == pytest.approx(2_358_883_328, rel=0.25)
    assert need.host.total == pytest.approx(4_602_597_376, rel=0.25)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "besa"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_time_is_that_of_the_work(method: str, pattern: str):
    config = PruneConfig(out="pruned", method=method, pattern=pattern, samples=8, seqlen=64)
    plan = plan_prune(MODEL, config, timed=False)
    speed = Speed(1e9, 1e9, 1e9, 1e9, 0.0, 1e9)
    assert plan.seconds is None
    work = sum(plan.work.values(), Work())
    assert work.seconds(speed) > 0
    doubled = work_of(plan.shape, replace(plan.setting, samples=16))
    # Reading, sorting, factors and writing are of blocks; all else is of tokens.
    assert plan.flops < sum(x.flops for x in doubled.values()) <= 2.1 * plan.flops
