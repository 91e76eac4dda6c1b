"""A decoder inside of a model that sees: packed, loaded by transformers, and unpacked again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from besa.export import ExportConfig, export
from besa.model.loading import load_model
from besa.pruning.config import PruneConfig
from besa.pruning.run import prune
from tests.helpers import same_bytes, save_with_tokenizer, stored
from tests.tiny import tiny_model as tiny


@pytest.mark.parametrize("model_type", ["mistral3", "qwen2_5_vl", "qwen3_vl_moe"])
def test_a_wrapper_is_packed_but_for_its_tower(
    model_type: str, tiny_model: Path, calibration: Path, tmp_path: Path
):
    made = tiny(model_type, seen=True).bfloat16()
    model = save_with_tokenizer(made, tmp_path / "model", tiny_model)
    few = {"samples": 2, "seqlen": 16, "method": "wanda", "device": "cpu"}
    prune(model, PruneConfig(out=tmp_path / "pruned", calibration=str(calibration), **few))
    result = export(tmp_path / "pruned", ExportConfig(out=tmp_path / "packed"))

    pruned, packed = stored(tmp_path / "pruned"), stored(result.out)
    towers = [name for name in pruned if "vis" in name or "projector" in name]
    assert towers
    assert all(same_bytes(pruned[name], packed[name]) for name in towers)
    assert len([name for name in packed if name.endswith("_bitmask")]) >= 8
    for folder in ("pruned", "packed"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "model = AutoModelForImageTextToText.from_pretrained(folder" in card

    tokens = torch.arange(3, 19).view(1, -1)
    ours, theirs = (load_model(tmp_path / p, "float32", "cpu") for p in ("packed", "pruned"))
    assert type(ours) is type(made)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    with torch.no_grad():
        logits = [each(input_ids=tokens).logits for each in (ours, theirs)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)

    dense = export(result.out, ExportConfig(out=tmp_path / "dense", format="dense")).out
    again = stored(dense)
    assert again.keys() == pruned.keys()
    assert all(torch.equal(again[name], pruned[name]) for name in pruned)
