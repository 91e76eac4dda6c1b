"""Packed checkpoints in transformers as on a GPU: weights as records, multiplied by their oracle.

No GPU is needed: weights become records on the CPU, too, where the operator makes the canonical
form of them again. So loading, saving, copying and moving are tested, and with them the layout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import besa
from besa.formats.module import SparseLinear
from besa.kernels.cuda import linear as gpu
from tests.helpers import load_strictly, same_bytes, stored
from tests.serve.transformers.test_packed import Pair, logits, make_pair, pairs

__all__ = ["pairs"]  # a fixture

KINDS = [
    ("llama", "bfloat16", {}),
    ("gpt2", "float16", {}),
    ("llama", "int8", {}),
    ("llama", "int8", {"group_size": 32}),
    ("llama", "int4", {"group_size": 32}),
]


@pytest.fixture(autouse=True)
def _records_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "usable", lambda device, values: values != torch.float32)
    monkeypatch.setattr(gpu, "tuned", lambda *arguments: None)


def sparse_linears(model: torch.nn.Module) -> list[SparseLinear]:
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


@pytest.mark.parametrize(("family", "values", "settings"), KINDS)
def test_loaded_saved_and_copied(
    pairs: Callable[..., Pair], family: str, values: str, settings: dict[str, int], tmp_path: Path
) -> None:
    pair = pairs(family, values, **settings)
    with pytest.MonkeyPatch.context() as undone:
        undone.setattr(gpu, "usable", lambda device, values: False)
        expected = logits(load_strictly(pair.sparse, dtype=torch.bfloat16))
    model = load_strictly(pair.sparse, dtype=torch.bfloat16)
    linears = sparse_linears(model)
    assert linears
    assert all(linear.records is not None for linear in linears)
    assert not any(name.endswith("_bitmask") for name, _ in model.named_buffers())
    # bfloat16 in another order of sums; rounded to int8, activations then differ by whole steps.
    step = 0.02 if values == "bfloat16" else 0.1
    torch.testing.assert_close(logits(model), expected, rtol=step, atol=step)

    model.save_pretrained(tmp_path / "saved")
    saved, original = stored(tmp_path / "saved"), stored(pair.sparse)
    packed = [name for name in original if ".weight_" in name]
    assert saved.keys() == original.keys()
    assert all(same_bytes(saved[name], original[name]) for name in packed)

    assert logits(copy.deepcopy(model)).equal(logits(model))
    assert logits(load_strictly(tmp_path / "saved", dtype=torch.bfloat16)).equal(logits(model))
    assert logits(model.to("cpu")).equal(logits(model))


def test_weights_go_in_and_out(pairs: Callable[..., Pair]) -> None:
    pair = pairs("llama", "bfloat16")
    model, other = load_strictly(pair.sparse), load_strictly(pair.sparse)
    for parameter in other.parameters():
        parameter.data.zero_()
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(linear.records is not None for linear in sparse_linears(other))
    assert logits(other).equal(logits(model))


def test_dense_on_request_and_afterwards(pairs: Callable[..., Pair]) -> None:
    pair = pairs("llama", "bfloat16")
    dense = load_strictly(pair.dense)
    asked = load_strictly(pair.sparse, quantization_config=besa.BesaConfig(dense=True))
    for model in (asked, load_strictly(pair.sparse).dequantize()):
        for name, parameter in dense.named_parameters():
            assert model.get_parameter(name).equal(parameter), name


def test_captured_as_one_graph(pairs: Callable[..., Pair]) -> None:
    model = load_strictly(pairs("llama", "bfloat16").sparse)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert logits(compiled).equal(logits(model))


def test_a_weight_that_a_model_reads(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "gpt2", "bfloat16")
    model, dense = load_strictly(pair.sparse), load_strictly(pair.dense)
    name = "transformer.h.0.attn.c_attn"
    assert model.get_submodule(name).weight.equal(dense.get_submodule(name).weight)
