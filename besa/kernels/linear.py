"""y = x W^T + b with packed weights: the torch operator `besa::sparse_linear`.

>>> from besa.formats import pack
>>> x, packed = torch.ones(1, 8), pack(torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 3]]))
>>> sparse_linear(x, packed)
tensor([[6.]])
>>> torch.ops.besa.sparse_linear(x, packed.values, packed.bitmask, packed.row_ptr, None, None)
tensor([[6.]])

On a CPU the native kernels multiply straight from the packed form (see sparse_linear.h); on other
devices, and without the library, the weight is expanded there and torch multiplies. Works under
torch.compile; records no gradient.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from besa.errors import BesaError
from besa.kernels import native, nibbles
from besa.kernels.abi import DTYPES, GROUP_SIZES, PROBLEMS, Job
from besa.kernels.describe import describe
from besa.kernels.isa import isa_number
from besa.kernels.packing import expand, expand_reference

# Bytes hold int4 values, see `nibbles`: torch can do nothing with its own type of that name.
INT4 = torch.uint8

_DTYPES = {getattr(torch, name): number for name, number in DTYPES.items() if name != "int4"}
_DTYPES[INT4] = DTYPES["int4"]
_INPUTS = (torch.bfloat16, torch.float16, torch.float32)

# A weight as the operators take it apart: values, bitmask, row_ptr, scale, steps, and its bias.
_Maybe: TypeAlias = Tensor | None
Parts: TypeAlias = tuple[Tensor, _Maybe, _Maybe, _Maybe, _Maybe, _Maybe]


class PackedWeight(Protocol):
    """What `sparse_linear` reads of a `besa.formats.Packed`."""

    @property
    def values(self) -> Tensor: ...
    @property
    def bitmask(self) -> Tensor: ...
    @property
    def row_ptr(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor | None: ...
    @property
    def steps(self) -> Tensor | None: ...


def sparse_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, int8_input: bool = True
) -> Tensor:
    """x W^T + bias.

    Sums are float32, of a fixed order for a given shape. int8 and int4 values multiply activations
    that are quantized to int8, one scale per token, with int32 sums; with `int8_input=False` they
    multiply the activations as they are.

    Args:
        x: [..., in], bfloat16, float16 or float32; need not be of the values' type.
        packed: the weight [out, in].
        bias: [out].

    Returns:
        [..., out], of x's type.

    Raises:
        ValueError: if shapes, types or devices do not fit.
        BesaError: if the packed weight is corrupt.
    """
    result: Tensor = torch.ops.besa.sparse_linear(
        x,
        packed.values,
        packed.bitmask,
        packed.row_ptr,
        packed.scale,
        bias,
        int8_input,
        packed.steps,
    )
    return result


def dense_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    int8_input: bool = True,
) -> Tensor:
    """x weight^T + bias by the same kernels, for a weight that has no zeros to leave out.

    On a CPU; elsewhere, and without the native library, torch's product.

    Args:
        x: [..., in], bfloat16, float16 or float32.
        weight: [out, in], floating point, or int8 with its scale, float32 [out, groups].
    """
    if native.library() is None or x.device.type != "cpu":
        return product(x, weight, scale, bias, int8_input, x.dtype)
    if weight.shape[-1] != x.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} columns, but weight {weight.shape[-1]}")
    return _native(x, weight.flatten(), None, None, scale, bias, len(weight), int8_input)


def sparse_linear_reference(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    row_ptr: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    int8_input: bool = True,
    steps: Tensor | None = None,
) -> Tensor:
    """`besa::sparse_linear` in plain torch: the kernels' oracle, float32 throughout."""
    check(x, values, bitmask, row_ptr, scale, bias, steps)
    if steps is None:
        weight = expand_reference(values, bitmask, row_ptr, x.shape[-1]).float()
    else:
        weight = nibbles.expand(values, bitmask, row_ptr, steps, x.shape[-1]).float()
    return product(x, weight, scale, bias, int8_input, torch.float32)


def _expanded(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    row_ptr: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    int8_input: bool = True,
    steps: Tensor | None = None,
) -> Tensor:
    """The weight expanded on its device, then torch's product in x's own type."""
    check(x, values, bitmask, row_ptr, scale, bias, steps)
    if steps is None:
        weight = expand(values, bitmask, row_ptr, x.shape[-1])
    else:
        weight = nibbles.expand(values, bitmask, row_ptr, steps, x.shape[-1])
    return product(x, weight, scale, bias, int8_input, x.dtype)


def product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    int8_input: bool,
    dtype: torch.dtype,
) -> Tensor:
    """x weight^T + bias by torch's product in `dtype`, for a dense weight on any device.

    Args:
        weight: [out, in], floating point, or whole numbers with their scale.

    Returns:
        [..., out], of x's type.
    """
    inputs, factor = x.to(dtype), None
    if scale is not None:
        if size := group_size(x.shape[-1], scale):
            scale = scale.repeat_interleave(size, 1)[:, : x.shape[-1]]
        weight = weight.float() * scale
        if int8_input:
            inputs, factor = quantize_rows(x)
    result = F.linear(inputs.to(dtype), weight.to(dtype)).float()
    if factor is not None:
        result = result * factor
    if bias is not None:
        result = result + bias.float()
    return result.to(x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as whole numbers from -127 to 127, and their scale.

    Args:
        x: [..., in].

    Returns:
        float32 [..., in] of whole numbers, and float32 [..., 1]; NaN for a row that is not finite.
    """
    most = x.float().abs().amax(-1, keepdim=True)
    finite = most.isfinite()
    # Divided as the kernels do: torch takes 127 / most for 127 times the rounded 1 / most.
    inverse = torch.where(finite & (most > 0), torch.full_like(most, 127) / most, 0.0)
    whole = torch.where(finite, x.float() * inverse, 0.0).round()
    return whole, torch.where(finite, most / 127, torch.nan)


def _sparse_linear_cpu(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    row_ptr: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    int8_input: bool = True,
    steps: Tensor | None = None,
) -> Tensor:
    if native.library() is None:
        return _expanded(x, values, bitmask, row_ptr, scale, bias, int8_input, steps)
    check(x, values, bitmask, row_ptr, scale, bias, steps)
    return _native(x, values, bitmask, row_ptr, scale, bias, len(bitmask), int8_input, steps)


def _native(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor | None,
    row_ptr: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    rows: int,
    int8_input: bool,
    steps: Tensor | None = None,
) -> Tensor:
    library = native.library()
    assert library is not None
    cols = x.shape[-1]
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], rows)
    weight = contiguous((values, bitmask, row_ptr, scale, steps, bias), x.dtype)
    job = job_of(weight, rows, cols, x.dtype, int8_input)
    job.input, job.output = x.data_ptr(), out.data_ptr()
    job.tokens = x.numel() // cols if cols else x.shape[:-1].numel()
    raise_problem(library.besa_sparse_linear(job))
    return out


def contiguous(weight: Parts, dtype: torch.dtype) -> Parts:
    """A weight as the native kernels read it: contiguous, its bias of the activations' type."""
    values, *others, bias = weight
    others.append(None if bias is None else bias.to(dtype))
    mask, row_ptr, scale, steps, bias = (
        None if part is None else part.contiguous() for part in others
    )
    return values.contiguous(), mask, row_ptr, scale, steps, bias


def job_of(weight: Parts, rows: int, cols: int, dtype: torch.dtype, int8_input: bool) -> Job:
    """The native kernels' job for a `contiguous` weight, but for inputs and outputs.

    Its memory is the tensors', which the caller keeps.
    """
    tensor, _, _, scales, all_steps, _ = weight
    addresses = [None if part is None else part.data_ptr() for part in weight]
    values, bitmask, row_ptr, scale, steps, bias = addresses
    return Job(
        values=values,
        bitmask=bitmask,
        row_ptr=row_ptr,
        scale=scale,
        steps=steps,
        bias=bias,
        n_values=tensor.numel(),
        rows=rows,
        cols=cols,
        group_size=group_size(cols, scales),
        step_size=group_size(cols, all_steps),
        values_dtype=_DTYPES[tensor.dtype],
        input_dtype=_DTYPES[dtype],
        int8_input=int8_input and tensor.dtype in (torch.int8, INT4),
        isa=isa_number(),
        threads=torch.get_num_threads(),
    )


def raise_problem(status: int) -> None:
    """Raises a BesaError for what the native library did not do."""
    if status:
        raise BesaError(PROBLEMS[status])


def group_size(cols: int, scale: Tensor | None) -> int:
    """Columns that share a scale; 0 where a row does, or there is none.

    No two of the sizes give the same number of several groups.

    Args:
        scale: [out, groups], of a weight of `cols` columns; or its steps.

    Raises:
        ValueError: if no size gives so many groups.
    """
    if scale is None or scale.shape[1] == 1:
        return 0
    for size in GROUP_SIZES:
        if -(-cols // size) == scale.shape[1]:
            return size
    raise ValueError(f"scale has {scale.shape[1]} groups, which no group size makes")


def check(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    row_ptr: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    steps: Tensor | None,
) -> None:
    """Shapes and types, before a raw pointer leaves Python."""
    if x.dtype not in _INPUTS or x.ndim == 0:
        raise ValueError(f"x must be bfloat16, float16 or float32 [..., in], not {describe(x)}")
    if values.dtype not in _DTYPES or values.ndim != 1:
        raise ValueError(
            "values must be 1-D bfloat16, float16, float32, int8, or int4 as uint8: "
            f"{describe(values)}"
        )
    if bitmask.dtype != torch.uint8 or bitmask.ndim != 2 or not bitmask.is_contiguous():
        raise ValueError(f"bitmask must be a contiguous uint8 matrix, not {describe(bitmask)}")
    rows, width = bitmask.shape
    if width != -(-x.shape[-1] // 8):
        raise ValueError(f"x has {x.shape[-1]} columns, but bitmask is {describe(bitmask)}")
    if row_ptr.dtype != torch.int64 or row_ptr.shape != (rows + 1,) or not row_ptr.is_contiguous():
        raise ValueError(f"row_ptr must be int64 [{rows + 1}], not {describe(row_ptr)}")
    if (values.dtype in (torch.int8, INT4)) != (scale is not None):
        raise ValueError("scale goes with int8 and int4 values, and with them only")
    if (values.dtype == INT4) != (steps is not None):
        raise ValueError("steps go with int4 values, and with them only")
    if scale is not None:
        if scale.dtype != torch.float32 or scale.ndim != 2 or len(scale) != rows:
            raise ValueError(f"scale must be float32 [{rows}, groups], not {describe(scale)}")
        group_size(x.shape[-1], scale)
    if steps is not None:
        if steps.dtype != torch.uint8 or steps.ndim != 2 or len(steps) != rows:
            raise ValueError(f"steps must be uint8 [{rows}, groups], not {describe(steps)}")
        if scale is not None and scale.shape[1] != 1:
            raise ValueError(f"int4 values have a scale a row, not {describe(scale)}")
        group_size(x.shape[-1], steps)
    if bias is not None and (bias.shape != (rows,) or not bias.is_floating_point()):
        raise ValueError(f"bias must be floating point [{rows}], not {describe(bias)}")
    for tensor in (values, bitmask, row_ptr, scale, bias, steps):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x is on {x.device}, but a part of the weight on {tensor.device}")


def _fake(x: Tensor, _values: Tensor, bitmask: Tensor, *_rest: object, **_more: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], bitmask.shape[0])


_LIBRARY = torch.library.Library("besa", "FRAGMENT")
_LIBRARY.define(
    "sparse_linear(Tensor x, Tensor values, Tensor bitmask, Tensor row_ptr, Tensor? scale=None, "
    "Tensor? bias=None, bool int8_input=True, Tensor? steps=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_LIBRARY.impl("sparse_linear", _sparse_linear_cpu, "CPU")
_LIBRARY.impl("sparse_linear", _expanded, "CUDA")
torch.library.register_fake("besa::sparse_linear", _fake, lib=_LIBRARY)
