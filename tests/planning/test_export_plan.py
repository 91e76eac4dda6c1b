"""`besa export --plan`: the bytes that exports then write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from besa.errors import BesaError
from besa.export import ExportConfig, export
from besa.export.packable import PackedLinear
from besa.model.layout import Layout
from besa.planning.export import packed_bytes, plan_export
from besa.planning.shapes import LinearShape
from tests.export.sparse import pruned_model


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def pruned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Path:
    return pruned_model(request.param, tmp_path_factory.mktemp(request.param), tiny_model)


@pytest.mark.parametrize(
    ("quantize", "group"),
    [(None, None), ("int8", None), ("int8", 32), ("int4", 64)],
)
def test_a_packed_linear_has_the_size_that_export_expects(quantize: str | None, group: int | None):
    rows, cols, nonzeros = 48, 136, 3001
    packed = PackedLinear(
        "a.weight", "a", 0, Layout(rows, cols, False), torch.bfloat16, nonzeros, ()
    )
    linear = LinearShape("a", 1, rows, cols)
    found = packed_bytes(linear, nonzeros, 2, quantize, group)
    assert found == pytest.approx(packed.packed_bytes(quantize, group), abs=1)


def test_the_output_has_the_size_that_was_planned(pruned: Path, tmp_path: Path):
    plan = plan_export(pruned, ExportConfig(out=tmp_path / "sparse"), timed=False)
    assert "half of the weights" in " ".join(plan.notes)  # no besa.json says it, and it is so
    export(pruned, ExportConfig(out=tmp_path / "sparse"))
    written = sum(path.stat().st_size for path in (tmp_path / "sparse").glob("*.safetensors"))
    headers = 20_000  # names, of each shard
    assert plan.output == pytest.approx(written, rel=0.1, abs=headers)

    back = plan_export(
        tmp_path / "sparse", ExportConfig(out=tmp_path / "dense", format="dense"), timed=False
    )
    assert back.files["the model now"] == written
    dense = sum(path.stat().st_size for path in pruned.glob("*.safetensors"))
    assert back.output == pytest.approx(dense, rel=0.1, abs=headers)
    with pytest.raises(BesaError, match="packed already"):
        plan_export(tmp_path / "sparse", ExportConfig(out=tmp_path / "again"))


def test_a_graph_is_planned_by_its_precision(pruned: Path):
    sizes = [
        plan_export(
            pruned, ExportConfig(out="onnx", format="onnx", precision=each), timed=False
        ).files
        for each in ("fp32", "int8", "int4")
    ]
    data = [files["the graph's data"] for files in sizes]
    assert data == sorted(data, reverse=True)
