"""y = x W^T + b from records: the torch operator `besa::records_linear`.

>>> from besa.formats import pack
>>> from besa.kernels.cuda.records import parts, to_records
>>> weight = torch.zeros(16, 64, dtype=torch.bfloat16).fill_diagonal_(2)
>>> records_linear(torch.ones(1, 64).bfloat16(), to_records(*parts(pack(weight)), cols=64))[0, :3]
tensor([2., 2., 2.], dtype=torch.bfloat16)

On a GPU it goes the way (`call.Way`) that `tuning.py` found fastest, queued on
torch's current stream: nothing waits for the GPU, so that CUDA graphs can capture it. On a CPU the
canonical form is made again and multiplied, which is the kernels' oracle. Results have the same
bits in every run that goes the same way.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from besa.errors import BesaWarning
from besa.kernels.cuda.call import TYPES, Call, Shape
from besa.kernels.cuda.expansion import expand
from besa.kernels.cuda.records import Records, parts, to_packed, to_records
from besa.kernels.cuda.tuning import Table, table
from besa.kernels.cuda.usable import usable as has_kernels
from besa.kernels.linear import PackedWeight, group_size, product, sparse_linear_reference


def records_linear(
    x: Tensor,
    records: Records,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    int8_input: bool = True,
) -> Tensor:
    """x W^T + bias.

    Args:
        x: [..., cols], bfloat16, float16 or float32.
        records: the weight [rows, cols].
        scale: float32 [rows, groups], for int8 values.
        bias: [rows].
        int8_input: whether int8 values multiply activations that are quantized to int8.

    Returns:
        [..., rows], of x's type.

    Raises:
        ValueError: if shapes, types or devices do not fit.
    """
    result: Tensor = torch.ops.besa.records_linear(
        x,
        records.data,
        records.offsets,
        scale,
        bias,
        records.rows,
        records.cols,
        records.capacity,
        records.dtype,
        int8_input,
    )
    return result


def records_of(packed: PackedWeight, cols: int, x: torch.dtype, int8_input: bool) -> Records:
    """The records of a packed weight on a GPU, with products of such an x measured (`tuned`)."""
    records = to_records(*parts(packed), cols)
    tuned(records, packed.scale, x, int8_input)
    return records


def tuned(records: Records, scale: Tensor | None, x: torch.dtype, int8_input: bool) -> Table | None:
    """The table of a weight on a GPU, measured if no process has done so; None if it needs none."""
    shape = shape_of(records, scale, x, int8_input)
    if shape is None or not records.rows * records.cols:
        return None
    some = torch.empty(1, shape.cols, dtype=x, device=records.data.device)
    out = some.new_empty(1, records.rows)
    return table(Call(shape, records.data, records.offsets, scale, None, some, out))


def shape_of(
    records: Records, scale: Tensor | None, x: torch.dtype, int8_input: bool
) -> Shape | None:
    """What the kernels are told of a weight; None if they don't take it with such an x."""
    if x not in TYPES or records.dtype not in (x, torch.int8):
        return None
    return Shape.of(records, group_size(records.cols, scale), x, int8_input)


def _records_linear(
    x: Tensor,
    data: Tensor,
    offsets: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    rows: int,
    cols: int,
    capacity: int,
    dtype: torch.dtype,
    int8_input: bool,
) -> Tensor:
    records = Records(data, offsets, rows, cols, capacity, dtype)
    _check(x, records, scale, bias)
    if not x.is_cuda:
        return sparse_linear_reference(x, *to_packed(records), scale, bias, int8_input)
    return _on_gpu(x, records, scale, bias, int8_input)


def _on_gpu(
    x: Tensor, records: Records, scale: Tensor | None, bias: Tensor | None, int8_input: bool
) -> Tensor:
    rows, cols = records.rows, records.cols
    out = x.new_empty(*x.shape[:-1], rows)
    if out.numel() == 0:
        return out
    if cols == 0:
        return out.zero_() if bias is None else out.copy_(bias.expand(out.shape))
    shape = shape_of(records, scale, x.dtype, int8_input)
    if shape is None:
        return _cast_and_multiplied(x, records, scale, bias, int8_input)
    flat = x.reshape(-1, cols)
    if cols != shape.cols:
        flat = F.pad(flat, (0, shape.cols - cols))
    flat = flat.contiguous()
    if flat.data_ptr() % 16:
        flat = flat.clone()
    if bias is not None:
        bias = bias.to(x.dtype)
    call = Call(shape, records.data, records.offsets, scale, bias, flat, out.view(-1, rows))
    table(call).way(len(flat)).run(call)
    return out


def _cast_and_multiplied(
    x: Tensor, records: Records, scale: Tensor | None, bias: Tensor | None, int8_input: bool
) -> Tensor:
    """By torch, for activations that the kernels have no product for; slow, and said once."""
    _say_cast(records.dtype, x.dtype)
    return product(x, _values(records), scale, bias, int8_input, torch.float32)


def _values(records: Records) -> Tensor:
    """The dense matrix [rows, cols] of the values, of their own type."""
    x = records.dtype if records.dtype in TYPES else torch.bfloat16  # of no product here
    shape = shape_of(records, None, x, int8_input=False)
    assert shape is not None
    none = records.data.new_empty(0)
    call = Call(shape, records.data, records.offsets, None, None, none, none)
    return expand(call, records.dtype)[:, : records.cols]


@cache
def _say_cast(values: torch.dtype, x: torch.dtype) -> None:
    kept, given = (str(dtype).removeprefix("torch.") for dtype in (values, x))
    warnings.warn(
        f"activations are {given}, and the packed weights {kept}: on a GPU this is slower than a "
        f"dense model; load the model with dtype={kept if values in TYPES else 'bfloat16'}",
        BesaWarning,
        stacklevel=2,
    )


def _check(x: Tensor, records: Records, scale: Tensor | None, bias: Tensor | None) -> None:
    """Shapes and devices, before a raw pointer leaves Python."""
    if x.ndim == 0 or x.shape[-1] != records.cols or not x.is_floating_point():
        raise ValueError(f"x must be floating point [..., {records.cols}], not {list(x.shape)}")
    if (records.dtype == torch.int8) != (scale is not None):
        raise ValueError("scale goes with int8 values, and with them only")
    if scale is not None and (scale.shape[0] != records.rows or not scale.is_contiguous()):
        raise ValueError(f"scale must be [{records.rows}, groups], not {list(scale.shape)}")
    if bias is not None and bias.shape != (records.rows,):
        raise ValueError(f"bias must be [{records.rows}], not {list(bias.shape)}")
    for tensor in (records.data, records.offsets, scale, bias):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x is on {x.device}, but a part of the weight on {tensor.device}")


def usable(device: torch.device, values: torch.dtype) -> bool:
    """Whether weights of this type become records on this device; says why not, once.

    Records are for GPUs with the kernels; float32 values stay as they are.
    """
    return device.type == "cuda" and values != torch.float32 and has_kernels(device)


def _fake(x: Tensor, *rest: object) -> Tensor:
    rows = rest[4]
    assert isinstance(rows, int | torch.SymInt)
    return x.new_empty(*x.shape[:-1], rows)


_LIBRARY = torch.library.Library("besa", "FRAGMENT")
_LIBRARY.define(
    "records_linear(Tensor x, Tensor records, Tensor? offsets, Tensor? scale, Tensor? bias, "
    "int rows, int cols, int capacity, ScalarType dtype, bool int8_input) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("records_linear", _records_linear, _device)
torch.library.register_fake("besa::records_linear", _fake, lib=_LIBRARY)
