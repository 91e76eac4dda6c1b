"""Checkpoints of other tools: float weights with notes on them, and weights that are no floats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from besa.errors import BesaError
from besa.export import ExportConfig, export
from besa.model.checkpoint import Checkpoint
from besa.model.loading import load_model
from besa.model.quantization import NOTES, stored_as
from besa.pruning.config import PruneConfig
from besa.pruning.run import prune
from tests.helpers import load_strictly, same_bytes, stored

SPARSITY = {
    "format": "dense",
    "global_sparsity": 0.5,
    "ignore": ["lm_head"],
    "sparsity_structure": "2:4",
    "targets": ["Linear"],
}

# What llm-compressor and SparseML have written beside float weights, over the years.
OF_FLOATS: dict[str, dict[str, Any]] = {
    "llm-compressor": {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "sparsity_config": SPARSITY,
            "version": "0.8.1",
        }
    },
    "no groups": {
        "quantization_config": {
            "config_groups": {},
            "format": "dense",
            "quant_method": "compressed-tensors",
            "sparsity_config": SPARSITY,
        }
    },
    "older": {"compression_config": {"sparsity_config": SPARSITY}},
    "SparseML": {"sparsity_config": {"format": "dense", "sparsity_structure": "unstructured"}},
}

OF_OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, "gptq"),
    "AWQ": ({"quant_method": "awq", "bits": 4}, "awq"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "groups": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
            "sparsity_config": SPARSITY,
        },
        "compressed-tensors",
    ),
    "packed zeros": (
        {
            "quant_method": "compressed-tensors",
            "sparsity_config": {**SPARSITY, "format": "sparse-24-bitmask"},
        },
        "compressed-tensors, sparse-24-bitmask",
    ),
}


@pytest.fixture(scope="module")
def pruned(tiny_model: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "pruned"
    few = {"samples": 2, "seqlen": 16, "method": "wanda", "pattern": "2:4", "device": "cpu"}
    prune(tiny_model, PruneConfig(out=out, calibration=str(calibration), **few))
    return out


def with_notes(model: Path, place: Path, notes: dict[str, Any]) -> Path:
    """A copy whose config.json says more."""
    shutil.copytree(model, place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, **notes}))
    return place


@pytest.mark.parametrize("tool", OF_FLOATS)
def test_float_weights_with_notes_are_taken(
    tool: str, pruned: Path, calibration: Path, tmp_path: Path
):
    model = with_notes(pruned, tmp_path / "model", OF_FLOATS[tool])
    assert stored_as(OF_FLOATS[tool]).floats
    load_model(model, "float32", "cpu")

    again = tmp_path / "again"
    few = {"samples": 2, "seqlen": 16, "method": "wanda", "sparsity": 0.6, "device": "cpu"}
    prune(model, PruneConfig(out=again, calibration=str(calibration), **few))
    packed = export(model, ExportConfig(out=tmp_path / "packed")).out
    dense = export(packed, ExportConfig(out=tmp_path / "dense", format="dense")).out

    for out, kept in ((again, set()), (packed, {"quantization_config"}), (dense, set())):
        config = json.loads((out / "config.json").read_text())
        assert {name for name in NOTES if name in config} == kept
    load_strictly(again)
    before, after = stored(model), stored(dense)
    assert before.keys() == after.keys()
    assert all(same_bytes(before[key].abs(), after[key].abs()) for key in before)


@pytest.mark.parametrize("tool", OF_OTHERS)
def test_other_weights_are_refused_with_a_remedy(tool: str, pruned: Path, tmp_path: Path):
    notes, method = OF_OTHERS[tool]
    model = with_notes(pruned, tmp_path / "model", {"quantization_config": notes})
    with pytest.raises(BesaError, match=rf"is quantized \({method}\): (take the float|unpack it)"):
        Checkpoint.open(model)


@pytest.mark.parametrize("form", ["sparse-bitmask", "sparse-24-bitmask"])
def test_packed_zeros_are_unpacked(form: str, pruned: Path, tmp_path: Path):
    notes = {"quant_method": "compressed-tensors", "sparsity_config": {**SPARSITY, "format": form}}
    model = with_notes(pruned, tmp_path / "model", {"quantization_config": notes})
    dense = stored(model)
    tensors = {}
    for name, weight in dense.items():
        if "layers" not in name or weight.ndim != 2:
            tensors[name] = weight
            continue
        values = weight[weight != 0]
        if form == "sparse-24-bitmask":
            values = values.view(len(weight), -1)
        bits = np.packbits((weight != 0).numpy(), axis=-1, bitorder="little")
        tensors[f"{name}.compressed"] = values
        tensors[f"{name}.bitmask"] = torch.from_numpy(bits)
        tensors[f"{name}.shape"] = torch.tensor(weight.shape)
    for path in model.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})

    with pytest.raises(BesaError, match=rf"{form}\): unpack it first, with `besa export --format"):
        Checkpoint.open(model)
    out = export(model, ExportConfig(out=tmp_path / "out", format="dense")).out
    found = stored(out)
    assert found.keys() == dense.keys()
    assert all(same_bytes(found[name], dense[name]) for name in dense)
    assert not set(NOTES) & json.loads((out / "config.json").read_text()).keys()
    load_strictly(out)

    name = next(name for name in tensors if name.endswith(".compressed"))
    tensors[name] = tensors[name].flatten()[1:].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(BesaError, match=r"is damaged: .* values are there of"):
        export(model, ExportConfig(out=tmp_path / "damaged", format="dense"))
    assert not (tmp_path / "damaged").exists()
