"""`ai.besa::SparseMatMul` for GPUs in ONNX Runtime, one node at a time; kernels run on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import pytest
import torch
from onnx import TensorProto
from torch import Tensor

from besa.errors import BesaError
from besa.export.onnx.machine_code import machine_code
from besa.export.onnx.runtime import ort_library
from besa.kernels.cuda import compiler
from tests.export.onnx.cuda_on_cpu import driver_on_cpu, operator_library
from tests.export.onnx.test_cuda_product import COLS, KINDS, ROWS, needed
from tests.export.onnx.test_operator import OPSET, TYPES, run, tensor
from tests.kernels.cuda.emulation import needs_compiler

try:
    ort_library()
except BesaError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(compiler.nvrtc() is None, reason="no NVRTC"),
]


@pytest.fixture(scope="module")
def library() -> str:
    return operator_library(driver_on_cpu([one for kind in KINDS for one in needed(kind)[2]]))


def model(kind: str, **changes: object) -> onnx.ModelProto:
    """A graph of one product; float32 input and output are its type around it.

    Args:
        changes: other attributes; `code`, another machine code; `given`, an initializer that
            becomes an input.
    """
    packed, records, wanted = needed(kind)
    code = changes.pop("code", None)
    given = changes.pop("given", None)
    raw = machine_code(wanted) if code is None else code
    assert isinstance(raw, bytes)
    parts: dict[str, Tensor | None] = {
        "records": records.data,
        "offsets": records.offsets,
        "scale": packed.scale,
        "code": torch.from_numpy(np.frombuffer(raw, np.uint8).copy()),
    }
    attributes: dict[str, object] = {
        "in_features": records.cols,
        "out_features": records.rows,
        "group_size": packed.group_size or 0,
        "capacity": records.capacity,
    }
    names = [name if part is not None else "" for name, part in parts.items()]
    narrow = TYPES[KINDS[kind]]
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["narrow"], to=narrow),
        onnx.helper.make_node(
            "SparseMatMul",
            ["narrow", *names],
            ["product"],
            domain="ai.besa",
            **(attributes | changes),
        ),
        onnx.helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
    ]
    types = TYPES | {torch.int32: TensorProto.INT32}
    inputs = [onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None, None])]
    inputs += [
        onnx.helper.make_tensor_value_info(name, types[part.dtype], list(part.shape))
        for name, part in parts.items()
        if part is not None and name == given
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "product",
        inputs,
        [onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            tensor(name, part) if part.dtype != torch.int32 else int32(name, part)
            for name, part in parts.items()
            if part is not None and name != given
        ],
    )
    imports = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("ai.besa", 1)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)


def int32(name: str, part: Tensor) -> TensorProto:
    raw = part.numpy().tobytes()
    return onnx.helper.make_tensor(name, TensorProto.INT32, list(part.shape), raw, raw=True)


@pytest.mark.parametrize("kind", KINDS)
def test_products(tmp_path: Path, library: str, kind: str) -> None:
    """Inputs that are left out, both types, X of three dimensions."""
    dtype = KINDS[kind]
    x = torch.randn(2, 5, COLS, generator=torch.Generator().manual_seed(2)).to(dtype).float()
    found = run(tmp_path / "model.onnx", model(kind), x, library)
    assert found.shape == (2, 5, ROWS)
    expected = x.double() @ needed(kind)[0].unpack(torch.float32).double().T
    step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    assert ((found.double() - expected).abs() <= 2 * step * expected.abs().amax()).all()


def test_an_empty_batch(tmp_path: Path, library: str) -> None:
    found = run(tmp_path / "model.onnx", model("values"), torch.zeros(0, 3, COLS), library)
    assert found.shape == (0, 3, ROWS)


def test_activations_of_another_width(tmp_path: Path, library: str) -> None:
    with pytest.raises(Exception, match="X does not have in_features columns"):
        run(tmp_path / "model.onnx", model("values"), torch.zeros(1, 1, 64), library)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("values", {"capacity": 0}, "the records are damaged: capacity"),
        ("values", {"out_features": 4000}, "the records are damaged: there are not as many"),
        ("2:4", {"in_features": 512}, "the records are damaged: there are not as many"),
        ("int8", {"group_size": 7}, "the records are damaged: group_size"),
        ("values", {"given": "records"}, "records and code have to be initializers"),
        ("values", {"given": "code"}, "records and code have to be initializers"),
    ],
)
def test_a_damaged_node_is_refused_when_it_is_loaded(
    tmp_path: Path, library: str, kind: str, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(BesaError, match=f"SparseMatMul: {words}") as caught:
        run(tmp_path / "model.onnx", model(kind, **changes), torch.zeros(1, 1, COLS), library)
    assert "\n" not in str(caught.value)


def test_damaged_machine_code(tmp_path: Path, library: str) -> None:
    with pytest.raises(Exception, match="SparseMatMul: the machine code is damaged"):
        run(tmp_path / "model.onnx", model("values", code=b"?"), torch.zeros(1, 1, COLS), library)
