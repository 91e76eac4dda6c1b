"""The models that are damaged: tiny ones, packed in each way, and graphs of one packed product."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import torch

from besa.errors import BesaError
from besa.export import ExportConfig, export
from besa.formats import Packed, pack, quantize_int4, quantize_int8
from besa.model.digests import companion_digests
from tests.export.sparse import pruned_model
from tests.helpers import byte_tokenizer

# How each is packed, and of what family it is.
PACKED = {
    "float": ("llama", {}),
    "int8": ("llama", {"quantize": "int8", "group_size": 32}),
    "int4": ("qwen2", {"quantize": "int4", "group_size": 32}),
    "experts": ("mixtral", {}),
}
COLUMNS = 100


def make_models(directory: Path) -> dict[str, Path]:
    """All of them, by their names; graphs where ONNX Runtime and the operator are there."""
    byte_tokenizer().save_pretrained(directory / "tokenizer")
    made = {}
    for name, (family, options) in PACKED.items():
        plain = pruned_model(family, directory / f"{name}-plain", directory / "tokenizer")
        made[name] = export(plain, ExportConfig(out=directory / name, **options)).out
    made["plain"] = directory / "float-plain"
    try:
        from besa.export.onnx.runtime import ort_library, runtime

        runtime()
        ort_library()
    except BesaError:
        return made
    return made | {f"graph-{name}": graph(directory / f"graph-{name}", name) for name in _PRODUCTS}


def _weight() -> torch.Tensor:
    weight = torch.randn(24, COLUMNS, generator=torch.Generator().manual_seed(0))
    return weight * (weight > 0)


_PRODUCTS = {
    "float": lambda: pack(_weight()),
    "int8": lambda: pack(*quantize_int8(_weight(), 32), 32),
    "int4": lambda: _int4(32),
}


def _int4(group: int) -> Packed:
    numbers, scale, steps = quantize_int4(_weight(), group)
    return pack(numbers, scale, group, steps)


def graph(directory: Path, kind: str) -> Path:
    """A directory as an ONNX export leaves it: a graph, its data, and what GenAI reads."""
    from tests.export.onnx.test_operator import model

    directory.mkdir()
    described = {
        "vocab_size": 257,
        "context_length": 64,
        "eos_token_id": 0,
        "decoder": {"filename": "model.onnx", "session_options": {"provider_options": []}},
    }
    (directory / "genai_config.json").write_text(json.dumps({"model": described}))
    onnx.save(
        model(_PRODUCTS[kind]()),
        directory / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    digests = companion_digests(directory, ())
    (directory / "besa.json").write_text(json.dumps({"digests": digests}))
    return directory
