"""Turns the products of a graph into ones for NVIDIA GPUs, on packed weights.

>>> import onnx_ir
>>> from pathlib import Path
>>> from besa.export.onnx.builder import build
>>> build(Path("path/to/pruned"), Path("onnx"), precision="fp16", device="cuda")
>>> graph = onnx_ir.load("onnx/model.onnx")
>>> products = pack_for_cuda(graph, OnnxPacking(values="float16"), torch.float16)

A MatMul or Gemm whose weight has zeros enough becomes `ai.besa::SparseMatMul` on records, the
layout of besa's GPU kernels (besa.kernels.cuda.records), and all nodes share one initializer of
machine code (besa.export.onnx.machine_code): see besa/kernels/ort_cuda.cpp. All other products stay
as they are.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from besa.errors import BesaError
from besa.export.onnx.function import DOMAIN, NAME
from besa.export.onnx.machine_code import Instance, instances, machine_code
from besa.export.onnx.sparse import (
    OnnxPacking,
    constant_weight,
    gains,
    initializer,
    replace_operator,
)
from besa.export.weights import nonzeros_and_patterns, pack_weight
from besa.kernels.cuda.records import parts, to_records
from besa.kernels.cuda.tiles import COLS
from besa.model.export_record import PackedProduct

CODE = "besa.code"


def pack_for_cuda(
    model: ir.Model, packing: OnnxPacking, activations: torch.dtype
) -> list[PackedProduct]:
    """Packs the weights of a graph in place; tells which products they belong to.

    Args:
        activations: the graph's floating type, float16 or bfloat16; with values of a floating type
            it is theirs, too.

    Raises:
        BesaError: no weight has zeros enough, or the kernels cannot be compiled.
    """
    assert packing.float_type == activations or packing.values == "int8"
    products: list[PackedProduct] = []
    nodes: list[ir.Node] = []
    needed: set[Instance] = set()
    for node in list(model.graph):
        weight = constant_weight(node)
        if weight is None or weight.shape[1] % COLS:
            continue
        nonzeros, _ = nonzeros_and_patterns(weight)
        if not gains(weight, nonzeros, packing):
            continue
        packed = pack_weight(weight, packing.values, packing.group_size, packing.peak)
        records = to_records(*parts(packed), packed.in_features)
        needed.update(instances(records, packed.group_size, activations))
        old = node.inputs[1]
        assert old is not None
        name = str(old.name).removesuffix(".weight")
        data = initializer(model, f"{name}.weight_records", records.data)
        offsets = scale = None
        if records.offsets is not None:
            offsets = initializer(model, f"{name}.weight_offsets", records.offsets)
        if packed.scale is not None:
            scale = initializer(model, f"{name}.weight_scale", packed.scale)
        attributes = {
            "in_features": records.cols,
            "out_features": records.rows,
            "group_size": packed.group_size or 0,
            "capacity": records.capacity,
        }
        inputs = [node.inputs[0], data, offsets, scale]
        replace_operator(model, node, DOMAIN, NAME, inputs, attributes)
        nodes.append(node)
        products.append(
            PackedProduct(
                name=str(node.name),
                shape=(records.rows, records.cols),
                nonzeros=packed.values.numel(),
                density=packed.density,
                bytes=records.nbytes + (0 if packed.scale is None else packed.scale.nbytes),
                sparse=True,
            )
        )
    if not nodes:
        raise BesaError(
            "the model is not pruned: no linear has zeros enough and a multiple of 64 inputs; run "
            "`besa prune` first"
        )
    code = np.frombuffer(machine_code(needed), np.uint8)
    shared = initializer(model, CODE, torch.from_numpy(code.copy()))
    for node in nodes:
        node.resize_inputs(5)
        node.replace_input_with(4, shared)
    model.opset_imports[DOMAIN] = 1
    return products
