"""Turns the products of a graph into ones with packed weights.

>>> import onnx_ir
>>> from pathlib import Path
>>> from besa.export.onnx.builder import build
>>> build(Path("path/to/pruned"), Path("onnx"), precision="fp32")
>>> products = pack_graph(onnx_ir.load("onnx/model.onnx"), OnnxPacking(values="bfloat16"))

A MatMul or Gemm whose weight has zeros enough becomes `ai.besa::SparseMatMul` on the values that
are left and a bitmask (see besa/kernels/ort_operator.cpp). What has too few, the head above all, is
not left in float32 either: with values of 16 bits it is packed as well, for a bit a weight; with
int8 or int4 values it becomes ONNX Runtime's MatMulNBits of 8 bits. Embeddings are kept in 16 bits,
and widened row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from besa.errors import BesaError
from besa.export.onnx.function import DOMAIN, NAME, sparse_matmul
from besa.export.weights import WORTH, nonzeros_and_patterns, pack_weight
from besa.formats import Packed, quantize_int8
from besa.kernels.abi import WHOLE
from besa.model.export_record import PackedProduct

# Weights that a function of standard operators may be left to expand while the model loads.
SMALL = 1 << 23

_DTYPES = {torch.bfloat16: ir.DataType.BFLOAT16, torch.float16: ir.DataType.FLOAT16}

# Of MatMulNBits: columns that share a scale, and activations that are quantized to int8 as well.
_BLOCK, _ACCURACY = 32, 4


@dataclass(frozen=True)
class OnnxPacking:
    """How weights are packed.

    Attributes:
        values: "bfloat16", "float16", "float32", "int8" or "int4".
        group_size: for int8 and int4, how many columns share a scale; None if the whole row does.
        peak: for int8, what the largest weight of a group becomes.
    """

    values: str
    group_size: int | None = None
    peak: int = 127

    @property
    def float_type(self) -> torch.dtype:
        """Of what stays floating point: the values' own type, bfloat16 beside whole numbers."""
        return torch.bfloat16 if self.values in WHOLE else getattr(torch, self.values)


def pack_graph(model: ir.Model, packing: OnnxPacking) -> list[PackedProduct]:
    """Packs the weights of a float32 graph, in place; tells which products they belong to.

    Raises:
        BesaError: no weight has zeros enough.
    """
    products = []
    weights = 0
    for node in list(model.graph):
        weight = constant_weight(node)
        if weight is None:
            continue
        nonzeros, _ = nonzeros_and_patterns(weight)
        sparse = gains(weight, nonzeros, packing)
        if packing.values in WHOLE and not sparse:
            _put_int8_product(model, node, weight)
            continue
        if packing.values == "float32" and not sparse:
            continue
        packed = pack_weight(weight, packing.values, packing.group_size, packing.peak)
        _put_packed_product(model, node, packed, packing)
        weights += weight.numel()
        products.append(
            PackedProduct(
                name=str(node.name),
                shape=tuple(packed.shape),
                nonzeros=packed.nonzeros,
                density=packed.density,
                bytes=packed.nbytes,
                sparse=sparse,
            )
        )
    if not any(product.sparse for product in products):
        raise BesaError(
            "the model is not pruned: no linear has zeros enough; run `besa prune` first"
        )
    if packing.values != "float32":
        _shrink_embedding(model, packing.float_type)
    model.opset_imports[DOMAIN] = 1
    if weights <= SMALL and packing.values != "int4":
        function = sparse_matmul(packing.values, model.opset_imports[""])
        model.functions[function.identifier()] = function
    return products


def constant_weight(node: ir.Node) -> Tensor | None:
    """The constant weight of a MatMul or Gemm as float32 [out, in]; None if there is none."""
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
        return None
    value = node.inputs[1]
    if value is None:
        return None
    turned, producer = False, value.producer()
    if producer is not None and producer.op_type == "Transpose":
        turned, value = True, producer.inputs[0]
    if node.op_type == "Gemm":
        attributes = {name: one.value for name, one in node.attributes.items()}
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        if any(attributes.get(name, number) != number for name, number in plain.items()):
            return None
        turned ^= bool(attributes.get("transB", 0))
    matrix = None if value is None else _matrix(value)
    return matrix if matrix is None or turned else matrix.mT.contiguous()


def _matrix(value: ir.Value) -> Tensor | None:
    """A constant matrix as float32."""
    constant = value.const_value
    if constant is None or len(constant.shape) != 2:
        return None
    return torch.from_numpy(np.array(constant.numpy(), np.float32))


def gains(weight: Tensor, nonzeros: int, packing: OnnxPacking) -> bool:
    """Whether the packed weight takes clearly fewer bytes than a dense one of the same type."""
    size = {"int8": 1.0, "int4": 0.5}.get(packing.values, packing.float_type.itemsize)
    return nonzeros * size + weight.numel() / 8 < WORTH * weight.numel() * size


def _put_packed_product(
    model: ir.Model, node: ir.Node, packed: Packed, packing: OnnxPacking
) -> None:
    """Makes a product a SparseMatMul, in place."""
    old = node.inputs[1]
    assert old is not None
    name = str(old.name).removesuffix(".weight")
    inputs = [node.inputs[0], initializer(model, f"{name}.weight_values", packed.values)]
    inputs.append(initializer(model, f"{name}.weight_bitmask", packed.bitmask))
    if packed.scale is not None:
        inputs.append(initializer(model, f"{name}.weight_scale", packed.scale))
    if packed.steps is not None:
        inputs.append(initializer(model, f"{name}.weight_steps", packed.steps))
    attributes = {"in_features": packed.in_features, "group_size": packing.group_size or 0}
    replace_operator(model, node, DOMAIN, NAME, inputs, attributes)


def _put_int8_product(model: ir.Model, node: ir.Node, weight: Tensor) -> None:
    """Makes a product one of ONNX Runtime's with 8-bit weights and a scale for each 32 columns.

    A weight is (number − 128) × scale, 128 being the zero point where none is given.
    """
    old = node.inputs[1]
    assert old is not None
    name = str(old.name).removesuffix(".weight")
    rows, cols = weight.shape
    whole, scale = quantize_int8(weight, _BLOCK)
    blocks = -(-cols // _BLOCK)
    padded = torch.zeros(rows, blocks * _BLOCK, dtype=torch.uint8)
    padded[:, :cols] = (whole.to(torch.int16) + 128).to(torch.uint8)
    padded[:, cols:] = 128
    inputs = [
        node.inputs[0],
        initializer(model, f"{name}.weight_Q8", padded.view(rows, blocks, _BLOCK)),
        initializer(model, f"{name}.weight_scales", scale.contiguous()),
    ]
    attributes = {
        "K": cols,
        "N": rows,
        "bits": 8,
        "block_size": _BLOCK,
        "accuracy_level": _ACCURACY,
    }
    model.opset_imports.setdefault("com.microsoft", 1)
    replace_operator(model, node, "com.microsoft", "MatMulNBits", inputs, attributes)


def replace_operator(
    model: ir.Model,
    node: ir.Node,
    domain: str,
    op_type: str,
    inputs: list[ir.Value | None],
    attributes: dict[str, int],
) -> None:
    """Puts another operator in the place of a product; a weight without readers is removed."""
    old = node.inputs[1]
    assert old is not None
    if len(node.inputs) > 2:  # of a Gemm
        _add_bias(model, node, node.inputs[2])
    node.domain, node.op_type = domain, op_type
    node.resize_inputs(len(inputs))
    for position, value in enumerate(inputs):
        node.replace_input_with(position, value)
    node.attributes.clear()
    for name, number in attributes.items():
        node.attributes.add(ir.AttrInt64(name, number))
    turned = old.producer()
    if not old.uses() and turned is not None:
        old = turned.inputs[0]
        assert old is not None
        model.graph.remove(turned, safe=True)
    if not old.uses():
        model.graph.initializers.pop(str(old.name))


def _add_bias(model: ir.Model, node: ir.Node, bias: ir.Value | None) -> None:
    product = node.outputs[0]
    add = ir.Node("", "Add", [product, bias], name=f"{node.name}/Add")
    total = add.outputs[0]
    total.name, total.shape, total.type = f"{product.name}/sum", product.shape, product.type
    product.replace_all_uses_with(total, replace_graph_outputs=True)
    add.replace_input_with(0, product)
    model.graph.insert_after(node, add)


def initializer(model: ir.Model, name: str, tensor: Tensor) -> ir.Value:
    """A new constant of the graph."""
    constant = TorchTensor(tensor, name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(constant.shape),
        type=ir.TensorType(constant.dtype),
        const_value=constant,
    )
    model.graph.register_initializer(value)
    return value


def _shrink_embedding(model: ir.Model, dtype: torch.dtype) -> None:
    """Stores tables of embeddings in `dtype`; the rows that are looked up become float32 again."""
    for node in list(model.graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        rows = None if table is None or len(table.uses()) > 1 else _matrix(table)
        if table is None or rows is None or table.dtype != ir.DataType.FLOAT:
            continue
        name = str(table.name)
        model.graph.initializers.pop(name)
        node.replace_input_with(0, initializer(model, name, rows.to(dtype)))
        found = node.outputs[0]
        cast = ir.Node(
            "", "Cast", [found], [ir.AttrInt64("to", ir.DataType.FLOAT.value)], name=f"{name}/Cast"
        )
        wide = cast.outputs[0]
        wide.name, wide.shape, wide.type = f"{found.name}/float", found.shape, found.type
        found.replace_all_uses_with(wide)
        cast.replace_input_with(0, found)
        found.type = ir.TensorType(_DTYPES[dtype])
        model.graph.insert_after(node, cast)
