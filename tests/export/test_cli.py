"""`besa export` as users type it: what it shows and refuses, and what stays when it is stopped."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import besa  # noqa: F401 - teaches transformers the format
from tests.export.sparse import assert_same_model, pruned_model
from tests.helpers import Process, digests, everything, fill, run, small_disk, start, stored

BLOCKS = 24


@pytest.fixture(scope="module")
def pruned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks enough to be stopped between two of them."""
    directory = tmp_path_factory.mktemp("models") / "pruned"
    return pruned_model("llama", directory, tiny_model, num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def whole(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Process]:
    """An undisturbed run, and its process."""
    directory = tmp_path_factory.mktemp("whole")
    process = run("export", pruned, "--out", "sparse", cwd=directory)
    assert process.returncode == 0, process.errors
    return directory / "sparse", process


def refused(process: Process, progress: str = "") -> str:
    """The one line of a command that could not be, after lines of progress if any may be."""
    assert process.returncode == 2, process.errors
    assert process.output == ""
    *before, line = process.errors.splitlines()
    assert all(progress and re.match(progress, other) for other in before), process.errors
    assert line.startswith("besa export: ")
    return line


PROGRESS = r"(reading|packing|unpacking|finished before:) (model\.layers\.\d+|embedding and head)$"


def test_what_it_prints(pruned: Path, whole: tuple[Path, Process]):
    out, process = whole
    record = json.loads((out / "besa.json").read_text())
    lines = process.output.splitlines()
    assert lines[0] == (
        f"sparse: {7 * BLOCKS} linears packed as float32; unstructured, anywhere in a row"
    )
    table = {cells[0]: cells[1:] for line in lines if (cells := re.split(r"\s{2,}", line.strip()))}
    before, after = stored(pruned), stored(out)
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        weights = [tensor for name, tensor in before.items() if f".{kind}." in name]
        densities = [float((w != 0).double().mean()) for w in weights]
        packed = sum(tensor.nbytes for name, tensor in after.items() if f".{kind}." in name)
        assert table[kind] == [
            str(BLOCKS),
            f"{min(densities):.4f}",
            f"{sum(densities) / BLOCKS:.4f}",
            f"{max(densities):.4f}",
            f"{packed / sum(w.nbytes for w in weights):.3f}×",
        ]
    sizes = [
        sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        for directory in (pruned, out)
    ]
    assert table["weight files"][-1] == f"{sizes[1] / sizes[0]:.3f}×"
    assert lines[-1] == (
        f"Expected decoding at batch 1: {record['read_per_token']['speedup']:.2f}× as fast, "
        "from bytes read; `besa bench` measures it."
    )
    shown = process.errors.splitlines()
    assert all(re.match(PROGRESS, line) for line in shown)
    assert shown.count(f"packing model.layers.{BLOCKS - 1}") == 1
    assert "layers.3.mlp" not in process.output
    assert {path.name for path in out.iterdir()} >= {
        *("config.json", "README.md", "besa.json", "tokenizer.json"),
        *("model.safetensors.index.json", "generation_config.json"),
    }
    assert not [path for path in out.iterdir() if re.search("finished|settings|lock", path.name)]


def test_experts_are_packed_or_it_is_said_why_not(tiny_model: Path, tmp_path: Path):
    pruned_model("mixtral", tmp_path / "pruned", tiny_model)
    process = run("export", "pruned", "--out", "sparse", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    assert "stays dense" not in process.output
    assert re.search(r"^ *gate_up_proj +16 +0\.4", process.output, re.MULTILINE)
    pruned_model("mixtral", tmp_path / "pruned-2", tiny_model, hidden_act="tanh")
    process = run("export", "pruned-2", "--out", "sparse-2", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    lines = [line for line in process.output.splitlines() if line.startswith("stays dense: ")]
    assert [
        re.search(r" as (\S+) .*: its module is none of experts", line)[1] for line in lines
    ] == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ]
    card = (tmp_path / "sparse-2/README.md").read_text()
    assert "its module is none of experts" in card.partition("Stored dense:")[2]


def test_verbose_and_back(pruned: Path, tmp_path: Path):
    process = run(
        *("export", pruned, "--out", "sparse", "--quantize", "int8", "--group-size", 32),
        "--verbose",
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.errors
    assert "packed as int8 with a scale per 32 columns" in process.output
    assert len(re.findall(r"model\.layers\.\d+\.\S+ +\d+×\d+", process.output)) == 7 * BLOCKS
    process = run("export", "--format", "dense", "sparse", "--out", "dense", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    assert re.match(rf"dense: {7 * BLOCKS} linears unpacked, \S+ \S+ to \S+ \S+$", process.output)
    assert stored(tmp_path / "dense").keys() == stored(pruned).keys()


def test_dense_again(pruned: Path, whole: tuple[Path, Process], tmp_path: Path):
    process = run("export", "--format", "dense", whole[0], "--out", "dense", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    assert_same_model(tmp_path / "dense", pruned)


def test_weight_only(pruned: Path, tmp_path: Path):
    """Products are those of the rounded weights; otherwise the activations' rounding is in them."""
    prompt, logits = torch.arange(40, 80)[None], {}
    for name, more in (("rounded", []), ("exact", ["--weight-only"])):
        process = run("export", pruned, "--out", name, "--quantize", "int8", *more, cwd=tmp_path)
        assert process.returncode == 0, process.errors
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        logits[name] = model(prompt).logits.detach()
    assert (
        run("export", "--format", "dense", "exact", "--out", "dense", cwd=tmp_path).returncode == 0
    )
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(prompt).logits.detach()
    off = {name: float((each - dense).norm() / dense.norm()) for name, each in logits.items()}
    assert off["exact"] < 1e-5
    assert off["rounded"] > 1e-3


OPTIONS = {
    "format": (["--format", "gguf"], "format 'gguf': choose one of vllm, dense, onnx"),
    "quantize": (["--quantize", "int3"], "quantize 'int3'"),
    "group size": (["--quantize", "int8", "--group-size", 48], "group_size 48"),
    "group size word": (["--group-size", "big"], "--group-size: invalid int value: 'big'"),
    "weight-only floats": (["--weight-only"], "--weight-only is for --quantize int8 or int4"),
    "weight-only graph": (["--format", "onnx", "--weight-only"], "values of --format vllm"),
    "flag": (["--frobnicate"], "unrecognized arguments: --frobnicate"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name: str, pruned: Path, tmp_path: Path):
    options, words = OPTIONS[name]
    assert words in refused(run("export", pruned, "--out", "out", *options, cwd=tmp_path))
    assert not list(tmp_path.glob("out*"))


def test_bad_models(tiny_model: Path, tmp_path: Path):
    line = refused(run("export", tiny_model, "--out", "out", cwd=tmp_path), PROGRESS)
    assert "is not pruned" in line
    line = refused(run("export", "nothing", "--out", "out", cwd=tmp_path))
    assert "nothing does not exist" in line
    (tmp_path / "empty").mkdir()
    for options in ([], ["--format", "dense"]):
        line = refused(run("export", "empty", "--out", "out", *options, cwd=tmp_path))
        assert "empty is no model: it has no config.json" in line
    assert not list(tmp_path.glob("out*"))


def test_out_is_taken(pruned: Path, whole: tuple[Path, Process], tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("")
    line = refused(run("export", pruned, "--out", "out", cwd=tmp_path))
    assert "out is not empty" in line
    assert list(out.iterdir()) == [out / "mine.txt"]
    process = run("export", pruned, "--out", "out", "--overwrite", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    assert digests(out) == digests(whole[0])


# -------------------------------------------------------------------------------- stopped


def stopped(pruned: Path, directory: Path, number: signal.Signals, *options: object) -> Process:
    """A run that gets a signal when its first block is written."""
    process = start("export", pruned, "--out", "out", *options, cwd=directory)
    assert process.wait_for((directory / "out.partial/block-00000.finished.json").exists)
    process.send(number)
    process.wait()
    return process


def test_killed(pruned: Path, whole: tuple[Path, Process], tmp_path: Path):
    assert stopped(pruned, tmp_path, signal.SIGKILL).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    process = run("export", pruned, "--out", "out", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    assert "finished before: model.layers.0\n" in process.errors
    assert digests(tmp_path / "out") == digests(whole[0])
    assert not (tmp_path / "out.partial").exists()


def test_interrupted(pruned: Path, whole: tuple[Path, Process], tmp_path: Path):
    process = stopped(pruned, tmp_path, signal.SIGINT)
    assert process.returncode == 130
    line = process.errors.splitlines()[-1]
    assert "interrupted" in line
    assert "the same command goes on" in line
    assert not (tmp_path / "out").exists()
    other = run("export", pruned, "--out", "out", "--quantize", "int8", cwd=tmp_path)
    assert "unfinished run with quantize = None, not int8" in refused(other, PROGRESS)
    assert run("export", pruned, "--out", "out", cwd=tmp_path).returncode == 0
    assert digests(tmp_path / "out") == digests(whole[0])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_a_shard_that_was_damaged_meanwhile(
    damage: Callable[[Path], None], pruned: Path, whole: tuple[Path, Process], tmp_path: Path
):
    stopped(pruned, tmp_path, signal.SIGKILL)
    damage(tmp_path / f"out.partial/model-00002-of-{BLOCKS + 1:05d}.safetensors")
    process = run("export", pruned, "--out", "out", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    assert "packing model.layers.0\n" in process.errors
    assert digests(tmp_path / "out") == digests(whole[0])


def test_a_disk_that_is_too_small(pruned: Path, whole: tuple[Path, Process], tmp_path: Path):
    with small_disk(tmp_path / "disk", "256k") as disk:
        for source, options in ((pruned, []), (whole[0], ["--format", "dense"])):
            process = run("export", source, "--out", disk / "out", *options, cwd=tmp_path)
            assert "the disk is too full" in refused(process, PROGRESS)
            assert not list(disk.iterdir())


def test_a_disk_that_fills_up(pruned: Path, whole: tuple[Path, Process], tmp_path: Path):
    with small_disk(tmp_path / "disk", "8M") as disk:
        process = start("export", pruned, "--out", disk / "out", cwd=tmp_path)
        assert process.wait_for((disk / "out.partial/block-00000.finished.json").exists)
        ballast = fill(disk)
        process.wait()
        assert "the disk is full" in refused(process, PROGRESS)
        assert not (disk / "out").exists()
        ballast.unlink()
        process = run("export", pruned, "--out", disk / "out", cwd=tmp_path)
        assert process.returncode == 0, process.errors
        assert digests(disk / "out") == digests(whole[0])


def test_the_source_is_not_touched(pruned: Path, tmp_path: Path):
    before = everything(pruned)
    run("export", pruned, "--out", "out", cwd=tmp_path)
    assert everything(pruned) == before
