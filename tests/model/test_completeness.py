"""Headers against the model: what is missing, surplus or of another shape is said at once."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from besa.errors import BesaError, BesaWarning
from besa.model.checkpoint import Checkpoint
from besa.pruning.config import PruneConfig
from besa.pruning.run import prune
from tests.helpers import load_strictly, random_model, save_with_tokenizer, stored

Change = Callable[[dict[str, Tensor]], object]


def changed(model: Path, place: Path, change: Change, **config: object) -> Path:
    """A copy with other tensors, and other words in its config.json."""
    shutil.copytree(model, place)
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    described = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**described, **config}))
    return place


def test_all_that_is_missing_is_named(tiny_model: Path, tmp_path: Path):
    def without_some(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "up_proj" in name or name == "model.norm.weight"]:
            del tensors[name]

    model = changed(tiny_model, tmp_path / "model", without_some)
    expected = (
        r"lacks 4 weights: model\.layers\.0\.mlp\.up_proj\.weight and 2 alike, "
        r"model\.norm\.weight: download the model again"
    )
    with pytest.raises(BesaError, match=expected):
        Checkpoint.open(model)


def test_a_missing_head_has_its_remedy(tiny_model: Path, tmp_path: Path):
    model = changed(tiny_model, tmp_path / "model", lambda t: t.pop("lm_head.weight"))
    with pytest.raises(BesaError, match=r"lacks the weight lm_head\.weight: .*tie_word_embeddings"):
        Checkpoint.open(model)
    tied = changed(model, tmp_path / "tied", lambda t: None, tie_word_embeddings=True)
    Checkpoint.open(tied)


def test_an_expert_that_is_missing(tiny_model: Path, tmp_path: Path):
    whole = save_with_tokenizer(random_model("mixtral"), tmp_path / "whole", tiny_model)
    Checkpoint.open(whole)
    name = next(name for name in stored(whole) if ".experts.1." in name)
    model = changed(whole, tmp_path / "model", lambda t: t.pop(name))
    with pytest.raises(BesaError, match=r"lacks a part of model\.layers\.0\..*experts"):
        Checkpoint.open(model)


def test_what_the_model_has_no_place_for_is_named_and_kept(
    tiny_model: Path, calibration: Path, tmp_path: Path
):
    extra = {
        "model.layers.0.adapter.weight": torch.ones(2),
        "model.layers.1.adapter.weight": torch.ones(3),
    }
    model = changed(tiny_model, tmp_path / "model", lambda t: t.update(extra))
    few = {"samples": 2, "seqlen": 16, "method": "wanda", "device": "cpu"}
    config = PruneConfig(out=tmp_path / "out", calibration=str(calibration), **few)
    with pytest.warns(BesaWarning, match=r"model\.layers\.0\.adapter\.weight and 1 alike"):
        prune(model, config)
    after = stored(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in extra.items())


def test_a_whole_model_is_no_cause_for_a_warning(tiny_model: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", BesaWarning)
        Checkpoint.open(tiny_model)


def test_a_tied_matrix_stored_as_the_head_alone(
    tiny_model: Path, calibration: Path, tmp_path: Path
):
    """transformers ties either to the other, whichever is there."""
    made = random_model("llama", tie_word_embeddings=True)
    usual = save_with_tokenizer(made, tmp_path / "usual", tiny_model)

    def as_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    other = changed(usual, tmp_path / "other", as_head)
    few = {"samples": 2, "seqlen": 16, "method": "wanda", "device": "cpu"}
    for model in (usual, other):
        out = tmp_path / f"{model.name}-out"
        prune(model, PruneConfig(out=out, calibration=str(calibration), **few))
    ours, theirs = (load_strictly(tmp_path / f"{name}-out") for name in ("usual", "other"))
    tokens = torch.arange(3, 19).view(1, -1)
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_weights_of_torch_alone_come_with_the_way_to_safetensors(tiny_model: Path, tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(BesaError, match="no safetensors weights: write them with") as caught:
        Checkpoint.open(model)
    (code,) = re.findall(r'python -c "(.*)", and take FLOAT', str(caught.value))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    ours, theirs = stored(tmp_path / "FLOAT"), stored(tiny_model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
