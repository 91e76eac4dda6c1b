"""Every family of decoders, packed and unpacked: the same tensors under the same names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from besa.export import ExportConfig, export
from tests.export.sparse import (
    assert_same_model,
    bits_of,
    packed_names,
    pruned_model,
    quantization,
    unpacked_bits,
)
from tests.helpers import EXPERTS, FAMILIES, ODD_FAMILIES, random_model, same_bytes, stored


def is_packable(key: str, tensor: torch.Tensor) -> bool:
    """By the names in the files: the matrices and stacks of the blocks, but no router."""
    return bool(
        re.search(r"\b(layers|h)\.\d+\.", key)
        and tensor.ndim in (2, 3)
        and not re.search(r"router|\.gate\.weight$|_bias$", key)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family: str, tiny_model: Path, tmp_path: Path):
    pruned = pruned_model(family, tmp_path / "pruned", tiny_model)
    before = stored(pruned)
    result = export(pruned, ExportConfig(out=tmp_path / "sparse"))
    sparse = stored(result.out)

    packed = packed_names(sparse)
    assert packed == {key for key, tensor in before.items() if is_packable(key, tensor)}
    for key, tensor in before.items():
        if key not in packed:
            assert same_bytes(sparse[key], tensor), key
            continue
        turned = family == "gpt2" or (family == "gpt_oss" and tensor.ndim == 3)
        matrix = (tensor.mT if turned else tensor).flatten(0, -2)
        magnitudes = np.where(matrix.numpy() == 0, 0, bits_of(matrix))  # -0.0 as +0.0
        assert np.array_equal(unpacked_bits(sparse, key, matrix.shape[1]), magnitudes), key
    others = {re.sub(r"_(values|bitmask|rows)$", "", key) for key in sparse}
    assert others == before.keys()

    config = quantization(result.out)
    assert {k: config[k] for k in ("quant_method", "format_version", "format", "values")} == {
        "quant_method": "besa",
        "format_version": 3 if family in EXPERTS else 1,
        "format": "bitmask",
        "values": "float32",
    }
    record = result.record
    names = {linear.name: linear for linear in record.linears}
    assert names.keys() == {key.removesuffix(".weight") for key in packed}
    for key in packed:
        linear = names[key.removesuffix(".weight")]
        assert linear.nonzeros == int((before[key] != 0).sum())
        assert linear.expert == ("experts" in key)

    export(result.out, ExportConfig(out=tmp_path / "dense", format="dense"))
    assert_same_model(tmp_path / "dense", pruned)
    source = json.loads((pruned / "config.json").read_text())
    assert json.loads((tmp_path / "dense/config.json").read_text()) == source
    for name in ("tokenizer.json", "generation_config.json"):
        for out in ("sparse", "dense"):
            assert (tmp_path / out / name).read_bytes() == (pruned / name).read_bytes()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "mixtral", "qwen3_moe"])
def test_each_linear_is_packed_or_ignored(family: str, tiny_model: Path, tmp_path: Path):
    """An engine that meets a linear knows by its name what to expect in the files."""
    pruned = pruned_model(family, tmp_path / "pruned", tiny_model)
    sparse = export(pruned, ExportConfig(out=tmp_path / "sparse")).out
    packed = {name.removesuffix(".weight") for name in packed_names(stored(sparse))}
    ignored = set(quantization(sparse)["ignore"])
    assert not packed & ignored
    model = random_model(family)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    assert {name for name in packed if "experts" not in name} <= linears
    assert linears <= packed | ignored
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    assert head in ignored
    assert not [name for name in ignored if name.endswith(".experts")]


@pytest.mark.slow
@pytest.mark.parametrize("family", ODD_FAMILIES)
def test_odd_families_there_and_back(family: str, tiny_model: Path, tmp_path: Path):
    pruned = pruned_model(family, tmp_path / "pruned", tiny_model)
    result = export(pruned, ExportConfig(out=tmp_path / "sparse"))
    assert len(packed_names(stored(result.out))) == len(result.record.linears) >= 4
    export(result.out, ExportConfig(out=tmp_path / "dense", format="dense"))
    assert_same_model(tmp_path / "dense", pruned)
