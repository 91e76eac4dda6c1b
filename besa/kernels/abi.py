"""What Python and the native library agree on: instruction sets, scales, products and experts.

abi.h says the same in C++. `native` compares `DESCRIPTION` with what a library says of itself, and
refuses one that was built from other sources. Needs no torch.

>>> ISAS.index("avx2")
1
>>> Job(tokens=1, rows=64, cols=128).group_size
0
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from typing import Any, ClassVar

# Counts up with every change of an exported function or of what it means.
VERSION = 3

# The number of each type of values and activations, by its name in torch, which is not needed here.
DTYPES = {"bfloat16": 0, "float16": 1, "float32": 2, "int8": 3, "int4": 4}

# Those of whole numbers, which have scales.
WHOLE = ("int8", "int4")

# What a product returns when it was not made.
PROBLEMS = {
    1: "row_ptr does not fit values and bitmask: the packed weight is corrupt",
    2: "this CPU lacks the instructions",
    3: "out of memory",
}

# Instruction sets, of each family from the least to the most. isa.h says which a CPU has.
ISAS = (
    *("portable", "avx2", "avx2_vnni", "avx512", "avx512_bf16", "avx512_dpbf16"),
    *("neon", "neon_dot", "neon_bf16"),
)

# What an expert does between its two products.
EXPERT_FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu2")

# How many columns may share a scale, other than a whole row.
GROUP_SIZES = (32, 64, 128)


class Job(ctypes.Structure):
    """One product, output = input W^T + bias; abi.h describes the fields.

    Pointers are addresses (`Tensor.data_ptr`), whose tensors the caller keeps alive.
    """

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("values", c_void_p),
        ("bitmask", c_void_p),
        ("row_ptr", c_void_p),
        ("scale", c_void_p),
        ("steps", c_void_p),
        ("bias", c_void_p),
        ("input", c_void_p),
        ("output", c_void_p),
        ("n_values", c_int64),
        ("tokens", c_int64),
        ("rows", c_int64),
        ("cols", c_int64),
        ("group_size", c_int64),
        ("step_size", c_int64),
        ("values_dtype", c_int),
        ("input_dtype", c_int),
        ("int8_input", c_int),
        ("isa", c_int),
        ("threads", c_int),
        ("parallel", c_void_p),  # None: on the library's own threads
        ("pool", c_void_p),
        ("grouped", c_void_p),  # None
    ]


class Experts(ctypes.Structure):
    """One layer of experts; abi.h describes the fields."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("gate_up", Job),
        ("down", Job),
        ("ids", c_void_p),
        ("weights", c_void_p),
        ("chosen", c_int64),
        ("experts", c_int64),
        ("function", c_int),
        ("gated", c_int),
        ("interleaved", c_int),
        ("alpha", c_float),
        ("limit", c_float),
        ("shift", c_float),
    ]


# What each function takes and returns.
FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "besa_abi": ([], c_char_p),
    "besa_isas": ([], c_int),  # bit i: this CPU has ISAS[i]
    "besa_best_isa": ([], c_int),
    # gives a status, see PROBLEMS
    "besa_sparse_linear": ([ctypes.POINTER(Job)], c_int),
    "besa_sparse_experts": ([ctypes.POINTER(Experts)], c_int),
    # weight, bitmask, row_ptr, rows, cols, element size, threads, isa
    "besa_pack_mask": ([*[c_void_p] * 3, *[c_int64] * 3, *[c_int] * 2], None),
    # bitmask, row_ptr, rows, row bytes, threads, isa
    "besa_row_pointers": ([*[c_void_p] * 2, *[c_int64] * 2, *[c_int] * 2], None),
    # weight, bitmask, row_ptr, values, rows, cols, element size, n_values, threads, isa; gives 0,
    # or 1 if they do not fit together
    "besa_compress": ([*[c_void_p] * 4, *[c_int64] * 4, *[c_int] * 2], c_int),
    # values, bitmask, row_ptr, dense, then as above
    "besa_expand": ([*[c_void_p] * 4, *[c_int64] * 4, *[c_int] * 2], c_int),
    # values, weight or None, buckets, out, rows, cols, n_buckets, threads
    "besa_segment_sum_f32": ([*[c_void_p] * 4, *[c_int64] * 3, c_int], None),
}

DESCRIPTION = (
    f"version {VERSION}, job of {ctypes.sizeof(Job)} bytes, experts of {ctypes.sizeof(Experts)}, "
    f"instruction sets {' '.join(ISAS)}, group sizes {' '.join(map(str, GROUP_SIZES))}, "
    f"functions {' '.join(EXPERT_FUNCTIONS)}"
)
