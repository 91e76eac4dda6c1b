"""Checkpoints that others quantized become floats by `besa export --format dense`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from besa.errors import BesaError
from besa.export import ExportConfig, export
from besa.model.loading import load_model
from besa.pruning.config import PruneConfig
from besa.pruning.run import prune
from tests.helpers import save_with_tokenizer, stored
from tests.tiny import tiny_model as tiny

BLOCK = 8


@pytest.fixture
def dense(tiny_model: Path, tmp_path: Path) -> Path:
    return save_with_tokenizer(tiny("llama").bfloat16(), tmp_path / "model", tiny_model)


def in_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers float8 [out, in], and a scale float32 for each square of BLOCK of them."""
    rows, cols = (size // BLOCK for size in weight.shape)
    squares = weight.float().view(rows, BLOCK, cols, BLOCK)
    scale = squares.abs().amax((1, 3)) / 448
    numbers = squares / scale[:, None, :, None]
    return numbers.reshape(weight.shape).to(torch.float8_e4m3fn), scale


def quantize(model: Path, notes: dict[str, object]) -> dict[str, Tensor]:
    """Stores the linears of a model as fp8; returns what they stand for."""
    expected, tensors = stored(model), {}
    for name, tensor in expected.items():
        tensors[name] = tensor
        if "proj" in name:
            tensors[name], scale = in_fp8(tensor)
            tensors[f"{name}_scale_inv"] = scale
            spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            expected[name] = (tensors[name].float() * spread).bfloat16()
    for path in model.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": notes}))
    return expected


FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}


def test_fp8_becomes_floats_that_can_be_pruned(dense: Path, calibration: Path, tmp_path: Path):
    expected = quantize(dense, FP8)
    few = {"samples": 2, "seqlen": 16, "method": "wanda", "device": "cpu"}
    with pytest.raises(
        BesaError, match=r"is quantized \(fp8\): unpack it first, with `besa export"
    ):
        prune(dense, PruneConfig(out=tmp_path / "pruned", calibration=str(calibration), **few))

    floats = export(dense, ExportConfig(out=tmp_path / "floats", format="dense"))
    assert floats.record.unpacked == sum("proj" in name for name in expected)
    found = stored(floats.out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2**-7, atol=0)
    assert "quantization_config" not in json.loads((floats.out / "config.json").read_text())
    assert (floats.out / "tokenizer.json").is_file()

    load_model(floats.out, "float32", "cpu")
    result = prune(
        floats.out, PruneConfig(out=tmp_path / "pruned", calibration=str(calibration), **few)
    )
    assert result.sparsity == pytest.approx(0.5, abs=0.01)


def test_blocks_that_do_not_fit_are_refused(dense: Path, tmp_path: Path):
    quantize(dense, {**FP8, "weight_block_size": [BLOCK - 1, BLOCK]})
    with pytest.raises(BesaError, match=r"is no multiple of its blocks \[7, 8\]: take the float"):
        export(dense, ExportConfig(out=tmp_path / "floats", format="dense"))


def test_what_transformers_cannot_make_floats_of_is_refused(dense: Path, tmp_path: Path):
    quantize(dense, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(BesaError, match=r"is quantized \(gptq\): take the float model"):
        export(dense, ExportConfig(out=tmp_path / "floats", format="dense"))
    assert not (tmp_path / "floats").exists()


def test_weights_that_are_missing_are_named(dense: Path, tmp_path: Path):
    quantize(dense, FP8)
    tensors = stored(dense)
    lost = next(name for name in tensors if name.endswith("up_proj.weight"))
    save_file(
        {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)},
        dense / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(BesaError, match=f"lacks 1 weights of the model, as {lost}"):
        export(dense, ExportConfig(out=tmp_path / "floats", format="dense"))
    assert not (tmp_path / "floats").exists()
