"""Rotations: where they are possible, that they change no logits, and that they can be pruned."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from besa.model.checkpoint import Checkpoint
from besa.model.prune_record import PruneRecord
from besa.model.record import read_record
from besa.rotation.apply import fold_gains, random_rotation
from besa.rotation.learn import entropy, learn_rotations, statistics_of
from besa.rotation.rotate import rotate
from besa.rotation.structure import structure_of
from tests.helpers import (
    FAMILIES,
    digests,
    load_strictly,
    random_model,
    run,
    save_with_tokenizer,
    small_disk,
    start,
)

BOTH = "the residual stream and the values of each head were rotated"
VALUES = "the values of each head were rotated"

# What can be rotated in each family. Norms that also shift their inputs (OPT, GPT-2), that stand
# behind a block's linears (Gemma 2 and 3) or are as wide for queries (OLMoE) hold the stream; fused
# queries, keys and values (Phi-3) hold the values.
POSSIBLE = {
    "llama": BOTH,
    "mistral": BOTH,
    "qwen2": BOTH,
    "qwen3": BOTH,
    "gemma2": VALUES,
    "gemma3_text": VALUES,
    "phi3": "the residual stream was rotated",
    "opt": None,
    "gpt2": None,
    "gpt_neox": None,
    "mixtral": BOTH,
    "qwen3_moe": BOTH,
    "olmoe": VALUES,
    "gpt_oss": BOTH,
}


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(1, 257, (4, 32), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


def saved(family: str, directory: Path, tiny_model: Path, **more: Any) -> Path:
    return save_with_tokenizer(random_model(family, **more), directory, tiny_model)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_can_be_rotated_is_and_gives_the_same_logits(
    family: str, tiny_model: Path, tmp_path: Path, windows: torch.Tensor
):
    dense = saved(family, tmp_path / "dense", tiny_model)
    words = rotate(Checkpoint.open(dense), windows, tmp_path / "out", untie=True, steps=5)
    assert words == POSSIBLE[family]
    if words is None:
        assert not (tmp_path / "out").exists()
        return
    before, after = load_strictly(dense), load_strictly(tmp_path / "out")
    expected, found = logits_of(before, windows), logits_of(after, windows)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
    moved = {
        name
        for name, parameter in after.named_parameters()
        if name not in dict(before.named_parameters())
        or not torch.equal(parameter, before.get_parameter(name))
    }
    assert any("embed" in name for name in moved) == (words != VALUES)
    assert any("v_proj" in name or "qkv" in name for name in moved)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_stays_tied_unless_asked(
    tied: bool, tiny_model: Path, tmp_path: Path, windows: torch.Tensor
):
    dense = saved("llama", tmp_path / "dense", tiny_model, tie_word_embeddings=tied)
    assert rotate(Checkpoint.open(dense), windows, tmp_path / "out", steps=2) == (
        VALUES if tied else BOTH
    )
    model = load_strictly(tmp_path / "out")
    assert model.config.tie_word_embeddings == tied
    size = (tmp_path / "out/model.safetensors").stat().st_size
    assert size == pytest.approx((dense / "model.safetensors").stat().st_size, rel=0.01)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_learning_makes_importance_uneven(family: str, windows: torch.Tensor):
    model = random_model(family).requires_grad_(False)
    model.set_experts_implementation("eager")
    structure = structure_of(model)
    values = tuple(heads for heads in structure.heads if "v_proj" in heads.value.name)
    structure = type(structure)(structure.width, structure.sites, structure.writers, values)
    if structure.sites:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), False)
        fold_gains(model, structure.sites)
    statistics = statistics_of(model, structure, windows)

    def total(steps: int) -> float:
        found = learn_rotations(model, structure, statistics, steps)
        stream = found.stream
        for rotation in (*found.heads, *([] if stream is None else [stream])):
            identity = torch.eye(rotation.shape[-1]).expand_as(rotation)
            torch.testing.assert_close(rotation.mT @ rotation, identity, atol=1e-4, rtol=0)
        value = values[0].value
        weight, gram = value.of(model), statistics.stream.get("model.layers.0.input_layernorm")
        if stream is None or gram is None:
            squares = statistics.squares[value.name]
        else:
            weight, squares = weight @ stream, (stream * (gram @ stream)).sum(0)
        parts = found.heads[0].mT @ weight.unflatten(0, (-1, values[0].size))
        return float(entropy(parts.flatten(0, 1), squares))

    assert total(40) < total(0)


def test_entropy_is_that_of_shares():
    weight, squares = torch.randn(3, 5), torch.rand(5)
    shares = weight.double().square() * squares
    shares /= shares.sum(1, keepdim=True)
    expected = -(shares * shares.log()).sum()
    assert float(entropy(weight, squares)) == pytest.approx(float(expected), rel=1e-4)


def test_random_rotations_are_rotations():
    for rotation in (random_rotation(16, 0), random_rotation(8, 1, groups=3)):
        identity = torch.eye(rotation.shape[-1]).expand_as(rotation)
        torch.testing.assert_close(rotation.mT @ rotation, identity, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------- in `besa prune`


def arguments(model: Path, calibration: Path, *more: object) -> list[object]:
    return [
        "prune", model, "--out", "out", "--calibration", calibration,
        "--samples", 8, "--seqlen", 32, "--device", "cpu", "--method", "wanda", *more,
    ]  # fmt: skip


def pruning_record(directory: Path) -> PruneRecord:
    record = read_record(directory)
    assert isinstance(record, PruneRecord)
    return record


def test_a_rotated_model_is_pruned(tiny_model: Path, calibration: Path, tmp_path: Path):
    process = run(*arguments(tiny_model, calibration, "--rotate", "auto"), cwd=tmp_path)
    assert process.returncode == 0, process.errors
    out = tmp_path / "out"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]
    record = pruning_record(out)
    assert record.rotation == BOTH
    assert record.model == str(tiny_model)
    assert BOTH in process.output
    card = (out / "README.md").read_text()
    assert f"Before, {BOTH}" in card
    assert "as they were" not in card
    model = load_strictly(out)
    assert record.sparsity.achieved == 0.5
    norm = model.model.layers[0].input_layernorm.weight
    assert torch.equal(norm, torch.ones_like(norm))
    assert {path.name for path in out.iterdir()} >= {"tokenizer.json", "config.json"}
    assert not list(out.glob("*besa-rotation*"))
    plain = run(*arguments(tiny_model, calibration, "--out", "plain"), cwd=tmp_path)
    assert plain.returncode == 0
    assert pruning_record(tmp_path / "plain").rotation is None


@pytest.mark.slow
def test_killed_and_gone_on_with(tiny_model: Path, calibration: Path, tmp_path: Path):
    command = arguments(tiny_model, calibration, "--rotate", "auto")
    assert run(*command, "--out", "whole", cwd=tmp_path).returncode == 0
    for place in ("out.rotated", "out.partial/block-00000.finished.json"):
        process = start(*command, cwd=tmp_path)
        assert process.wait_for((tmp_path / place).exists), process.errors
        process.send(signal.SIGKILL)
        process.wait()
        assert (tmp_path / "out.rotated").is_dir()
    process = run(*command, cwd=tmp_path)
    assert process.returncode == 0, process.errors
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert not (tmp_path / "out.rotated").exists()


def test_a_model_that_cannot_be_rotated_is_pruned_as_it_is(
    tiny_model: Path, calibration: Path, tmp_path: Path
):
    dense = saved("gpt2", tmp_path / "dense", tiny_model)
    process = run(*arguments(dense, calibration, "--rotate", "on"), cwd=tmp_path)
    assert process.returncode == 0, process.errors
    assert pruning_record(tmp_path / "out").rotation is None
    assert run(*arguments(dense, calibration, "--out", "plain"), cwd=tmp_path).returncode == 0
    tensors = [
        {
            k: v
            for path in (tmp_path / name).glob("*.safetensors")
            for k, v in load_file(path).items()
        }
        for name in ("out", "plain")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())


def test_what_is_in_the_way_is_left_alone(tiny_model: Path, calibration: Path, tmp_path: Path):
    mine = tmp_path / "out.rotated/mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    process = run(*arguments(tiny_model, calibration, "--rotate", "auto"), cwd=tmp_path)
    assert process.returncode == 2
    assert "out.rotated is in the way" in process.errors
    assert mine.read_text() == "mine"


def test_a_disk_that_is_too_small(tiny_model: Path, calibration: Path, tmp_path: Path):
    with small_disk(tmp_path / "disk", "256k") as disk:
        command = arguments(tiny_model, calibration, "--rotate", "auto", "--out", disk / "out")
        process = run(*command, cwd=tmp_path)
        assert process.returncode == 2, process.errors
        assert "the disk is full" in process.errors.splitlines()[-1]
        assert "Traceback" not in process.errors
        assert not list(disk.iterdir())
