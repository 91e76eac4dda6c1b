"""`ai.besa::SparseMatMul` in standard operators: a function that travels in small models.

>>> function = sparse_matmul("int8", opset=22)
>>> function.identifier()
('ai.besa', 'SparseMatMul', '')

A session that has besa's library takes its kernel and leaves the function alone. Without the
library the function stands in: the same meaning, from the weights made dense while the model loads.
That takes many times the memory of the weights, so that in a large model it is better left out.
"""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir

DOMAIN, NAME = "ai.besa", "SparseMatMul"

# 1 where a bit is set, [out, in]; how many are set up to there; the values in their places. Where
# no bit is set, what is gathered is the zero that was put in front of the values.
_EXPANDED = """
    powers = Constant <value = uint8[8] {1, 2, 4, 8, 16, 32, 64, 128}> ()
    last = Constant <value_ints = [-1]> ()
    begin = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    first_axis = Constant <value_int = 0> ()
    unfold = Constant <value_ints = [0, -1]> ()
    in_count = Constant <value_int: int = @in_features> ()
    in_end = Reshape (in_count, second)
    eights = Unsqueeze (bitmask, last)
    bits = BitwiseAnd (eights, powers)
    set_bits = Cast <to = 9> (bits)
    padded_rows = Reshape (set_bits, unfold)
    rows = Slice (padded_rows, begin, in_end, second)
    ones = Cast <to = 6> (rows)
    flat = Reshape (ones, last)
    counted = CumSum (flat, first_axis)
    places = Mul (counted, flat)
    zero = Constant <value_floats = [0.0]> ()
    floats = Cast <to = 1> (values)
    from_zero = Concat <axis = 0> (zero, floats)
    gathered = Gather (from_zero, places)
    matrix_shape = Shape (rows)
    expanded = Reshape (gathered, matrix_shape)
    x = Cast <to = 1> (X)
"""

_FLOAT = f"""
{NAME} <in_features, group_size> (X, values, bitmask) => (Y) {{
{_EXPANDED}
    turned = Transpose <perm = [1, 0]> (expanded)
    y = MatMul (x, turned)
    Y = CastLike (y, X)
}}
"""

# Activations are rounded per token to whole numbers from -127 to 127.
_INT8 = f"""
{NAME} <in_features, group_size> (X, values, bitmask, scale) => (Y) {{
{_EXPANDED}
    asked = Constant <value_int: int = @group_size> ()
    none = Constant <value_int = 0> ()
    whole_row = Equal (asked, none)
    columns = Where (whole_row, in_count, asked)
    step = Constant <value_int = 1> ()
    column = Range (none, in_count, step)
    group = Div (column, columns)
    scales = Gather <axis = 1> (scale, group)
    weight = Mul (expanded, scales)
    turned = Transpose <perm = [1, 0]> (weight)
    sizes = Abs (x)
    most = ReduceMax <keepdims = 1> (sizes, last)
    top = Constant <value_float = 127.0> ()
    nothing = Constant <value_float = 0.0> ()
    positive = Greater (most, nothing)
    quotient = Div (top, most)
    inverse = Where (positive, quotient, nothing)
    scaled = Mul (x, inverse)
    whole = Round (scaled)
    product = MatMul (whole, turned)
    token_scale = Div (most, top)
    y = Mul (product, token_scale)
    Y = CastLike (y, X)
}}
"""


def sparse_matmul(values: str, opset: int) -> ir.Function:
    """The function for values of that kind: "int8", or a floating type.

    Args:
        opset: the version of the standard operators that the model imports, 18 or later.
    """
    header = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>'
    text = header + (_INT8 if values == "int8" else _FLOAT)
    return ir.from_proto(onnx.parser.parse_function(text))
