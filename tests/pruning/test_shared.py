"""Blocks that share weights: pruned once, by the inputs of all their uses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from besa.model.checkpoint import Checkpoint
from besa.model.loading import load_model
from besa.pruning.config import PruneConfig
from besa.pruning.patterns import lowest_pruned
from besa.pruning.pipeline import _Pipeline
from besa.pruning.run import prune
from besa.pruning.shared import borrows
from tests.helpers import digests, save_with_tokenizer, stored
from tests.tiny import tiny_model as tiny

FIRST, SECOND = "model.layers.1.shared_transformer.", "model.layers.3.shared_transformer."
FEW = {"samples": 4, "seqlen": 16, "device": "cpu", "method": "wanda"}


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks 1 and 3 use one transformer."""
    return save_with_tokenizer(tiny("zamba2"), tmp_path_factory.mktemp("models") / "m", tiny_model)


def test_who_borrows_from_whom(model: Path):
    checkpoint = Checkpoint.open(model)
    assert [borrows(checkpoint, index) for index in range(4)] == [False, False, False, True]
    assert not [name for name in stored(model) if name.startswith(SECOND)]


def test_shared_weights_are_scored_by_the_inputs_of_all_uses(
    model: Path, calibration: Path, tmp_path: Path
):
    """Block 1 alone is pruned, so that all inputs are those of the dense model."""
    name = "shared_transformer.self_attn.q_proj"
    options = {**FEW, "include": rf"layers\.1\.{name}"}
    result = prune(
        model, PruneConfig(out=tmp_path / "out", calibration=str(calibration), **options)
    )
    (linear,) = [x for block in result.record.blocks for x in block.linears]
    assert linear.name == name

    dense = load_model(model, "float32", "cpu")
    squares = torch.zeros(linear.shape[1])
    for prefix in (FIRST, SECOND):
        module = dense.get_submodule(prefix + "self_attn.q_proj")

        def add(_module: object, args: tuple[torch.Tensor, ...], _output: object) -> None:
            squares.add_(args[0].reshape(-1, len(squares)).square().sum(0))

        module.register_forward_hook(add)
    from tests.pruning.test_families import windows_of

    with torch.no_grad():
        dense(windows_of(model, calibration), use_cache=False)
    weight = stored(model)[FIRST + "self_attn.q_proj.weight"]
    half = torch.full((len(weight),), weight.shape[1] // 2)
    expected = lowest_pruned(weight.abs() * squares.sqrt(), half)
    assert torch.equal(stored(result.out)[FIRST + "self_attn.q_proj.weight"] != 0, expected)


def test_an_interrupted_run_goes_on_with_the_pruned_weights(
    model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def config(name: str) -> PruneConfig:
        return PruneConfig(out=tmp_path / name, calibration=str(calibration), **FEW)

    prune(model, config("whole"))
    finish = _Pipeline._finish_block

    def stop(self: _Pipeline, index: int, *rest: object) -> object:
        if index == 3:
            raise KeyboardInterrupt
        return finish(self, index, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(_Pipeline, "_finish_block", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(model, config("halves"))
    prune(model, config("halves"))
    assert digests(tmp_path / "halves") == digests(tmp_path / "whole")
