"""besa.json: kinds of runs, today's keys, and files that besa did not write."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from besa.model.export_record import (
    LogitsCheck,
    OnnxRecord,
    PackedProduct,
    PackedRecord,
    UnpackedRecord,
)
from besa.model.prune_record import PruneRecord, Record
from besa.model.record import parse_record, pruning_of, read_raw_record, read_record, write_record
from besa.typed_json import to_json
from tests.report.records import MOE, run

EXPORT = {
    "besa_version": "0.1.0",
    "command": "export",
    "model": "pruned",
    "architecture": "LlamaForCausalLM",
    "settings": {"format": "…"},
    "versions": {"torch": "2.13.0"},
    "seconds": 0.7,
    "peak_memory_bytes": 1 << 28,
    "digests": {"model.safetensors": "0" * 64},
    "source": {"mine": 1},
}
PACKED = {
    **EXPORT,
    "format": "vllm",
    "format_version": 1,
    "values": "int8",
    "group_size": 64,
    "pattern": "2:4",
    "sizes": {"dense_bytes": 9, "bytes": 5, "linears_dense_bytes": 8, "linears_bytes": 4},
    "read_per_token": {"dense_bytes": 9, "packed_bytes": 5, "speedup": 1.8},
    "linears": [
        {
            "name": "model.layers.0.mlp.up_proj",
            "kind": "up_proj",
            "block": 0,
            "shape": [2, 2],
            "nonzeros": 2,
            "density": 0.5,
            "dense_bytes": 8,
            "bytes": 4,
        }
    ],
    "dense": [{"name": "n", "kind": "k", "bytes": 3, "reason": "why", "density": None}],
}
UNPACKED = {
    **EXPORT,
    "format": "dense",
    "sizes": {"packed_bytes": 5, "bytes": 9},
    "unpacked": 1,
}
ONNX = {
    **EXPORT,
    "format": "onnx",
    "graph": "genai",
    "sparse": True,
    "precision": "bf16",
    "group_size": None,
    "pattern": None,
    "packed": [
        {
            "name": "/MatMul",
            "shape": [2, 2],
            "nonzeros": 2,
            "density": 0.5,
            "bytes": 5,
            "sparse": True,
        }
    ],
    "bytes": 5,
    "source_bytes": 9,
    "check": {"error": 1e-6, "agreement": 1.0, "tokens": 16, "dtype": "float32"},
}
KINDS: list[tuple[type[Record], dict[str, Any]]] = [
    (PruneRecord, run(2)),
    (PruneRecord, run(4, MOE, method="wanda")),
    (PackedRecord, PACKED),
    (UnpackedRecord, UNPACKED),
    (OnnxRecord, ONNX),
]


@pytest.mark.parametrize(("kind", "found"), KINDS)
def test_there_and_back(kind: type[Record], found: dict[str, Any], tmp_path: Path):
    """Files without a version, which earlier besas wrote, are read like today's."""
    (tmp_path / "besa.json").write_text(json.dumps(found))
    record = read_record(tmp_path)
    assert type(record) is kind
    assert record is not None
    write_record(record, tmp_path)
    written = read_raw_record(tmp_path)
    assert written is not None
    since: dict[str, Any] = {} if kind is PruneRecord else {"record_version": 1}
    if kind is OnnxRecord:
        since["device"] = "cpu"
    assert written == found | since
    assert read_record(tmp_path) == record


def test_nested_records_have_types():
    record = parse_record(ONNX)
    assert isinstance(record, OnnxRecord)
    assert record.check == LogitsCheck(error=1e-6, agreement=1.0, tokens=16, dtype="float32")
    assert isinstance(record.packed[0], PackedProduct)
    moe = parse_record(run(4, MOE))
    assert isinstance(moe, PruneRecord)
    assert moe.blocks[3].linears[-1].unrouted_experts == (3, 7)
    assert moe.blocks[0].linears[0].rows is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"mine": 1}',
        '{"command": "export"}',
        '{"command": "export", "format": ["vllm"]}',
        '{"model": "m", "settings": {}, "sparsity": {"achieved": "half"}}',
    ],
)
def test_what_besa_did_not_write(text: str, tmp_path: Path):
    (tmp_path / "besa.json").write_text(text)
    assert read_record(tmp_path) is None


def test_no_file(tmp_path: Path):
    assert read_record(tmp_path) is None
    assert read_raw_record(tmp_path) is None


def test_little_is_enough_for_a_pruning_run():
    record = parse_record(
        {"model": "m", "settings": {}, "sparsity": {"achieved": 0.5}, "blocks": 3}
    )
    assert isinstance(record, PruneRecord)
    assert (record.sparsity.achieved, record.sparsity.target, record.blocks) == (0.5, None, ())


def test_an_export_goes_back_to_its_pruning_run():
    pruned = run(1)
    packed = parse_record(PACKED | {"source": pruned})
    assert isinstance(packed, PackedRecord)
    again = {"command": "export", "format": "of a later besa", "source": to_json(packed)}
    unpacked = parse_record(UNPACKED | {"source": again})
    assert isinstance(unpacked, UnpackedRecord)
    for record in (packed, unpacked):
        assert pruning_of(record) == parse_record(pruned)
    assert pruning_of(replace(packed, source={"mine": 1})) is None
    assert pruning_of(replace(packed, source=None)) is None


def test_records_load_without_torch():
    code = "import sys, besa.model.record; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
