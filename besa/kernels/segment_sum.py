"""Sums of a matrix's elements by bucket, row by row.

BESA's mask depends on a row's logits only through the bucket of each weight's rank, so the
gradient to the logits is the mask's gradient summed by bucket. Buckets fit in a byte, which spares
the 8 bytes a weight of torch's indices.

>>> buckets = torch.tensor([[0, 2, 2, 1]], dtype=torch.uint8)
>>> segment_sum(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]), buckets, n_buckets=3)
tensor([[   1., 1000.,  110.]])
"""

from __future__ import annotations

import torch
from torch import Tensor

from besa.kernels import native
from besa.kernels.cuda import buckets as on_gpu
from besa.kernels.describe import describe

MAX_BUCKETS = 256

# Elements whose int64 index exists at a time in the reference: 8 MiB.
_CHUNK = 1 << 20

# Elements that keep a thread busy for about 0.1 ms; with fewer, waking it costs more than it does.
_ELEMENTS_PER_THREAD = 1 << 17


def segment_sum(
    values: Tensor, buckets: Tensor, n_buckets: int, weight: Tensor | None = None
) -> Tensor:
    """`out[r, b]` = the sum of `values[r, j] * weight[r, j]` over the j with `buckets[r, j] == b`.

    Contiguous float32 on the CPU takes the native kernel, which gives the same bits whatever the
    number of threads; a GPU's kernel takes any layout of bfloat16, float16 and float32, and gives
    the same bits in every run. All else takes `segment_sum_reference`. Part of a backward pass: it
    records no gradient itself.

    Args:
        values: [R, C], floating point.
        buckets: [R, C], uint8; an element in bucket `n_buckets` or past it is left out.
        n_buckets: 1 to 256.
        weight: [R, C], floating point; None stands for ones.

    Returns:
        [R, n_buckets] float32, on the device of `values`.

    Raises:
        ValueError: if shapes, devices, `n_buckets` or the type of `buckets` are not as above.
    """
    _check(values, buckets, n_buckets, weight)
    if on_gpu.serves(values, weight):
        return on_gpu.segment_sum(values, buckets, n_buckets, weight)
    if not all(_is_plain(tensor) for tensor in (values, weight) if tensor is not None):
        return segment_sum_reference(values, buckets, n_buckets, weight)
    library = native.library() if buckets.is_contiguous() else None
    if library is None:
        return segment_sum_reference(values, buckets, n_buckets, weight)
    rows, cols = values.shape
    out = torch.empty(rows, n_buckets)
    library.besa_segment_sum_f32(
        values.data_ptr(),
        None if weight is None else weight.data_ptr(),
        buckets.data_ptr(),
        out.data_ptr(),
        rows,
        cols,
        n_buckets,
        min(torch.get_num_threads(), 1 + values.numel() // _ELEMENTS_PER_THREAD),
    )
    return out


@torch.no_grad()
def segment_sum_reference(
    values: Tensor, buckets: Tensor, n_buckets: int, weight: Tensor | None = None
) -> Tensor:
    """`segment_sum` in plain torch, for any device, layout and floating type.

    Needs memory for 2**20 elements, or one row, beyond its arguments. On CUDA the order of the
    additions varies from run to run.
    """
    _check(values, buckets, n_buckets, weight)
    rows, cols = values.shape
    out = torch.zeros(rows, MAX_BUCKETS, device=values.device)
    step = max(1, _CHUNK // max(1, cols))
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        terms = values[chunk].float()
        if weight is not None:
            terms = terms * weight[chunk].float()
        out[chunk].scatter_add_(1, buckets[chunk].long(), terms)
    return out[:, :n_buckets].contiguous()


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()


def _check(values: Tensor, buckets: Tensor, n_buckets: int, weight: Tensor | None) -> None:
    """Shapes and types, before a raw pointer leaves Python."""
    if values.ndim != 2 or not values.is_floating_point():
        raise ValueError(f"values must be a floating-point matrix, not {describe(values)}")
    if buckets.dtype != torch.uint8:
        raise ValueError(f"buckets must be uint8, not {buckets.dtype}")
    for name, tensor in (("buckets", buckets), ("weight", weight)):
        if tensor is None:
            continue
        if tensor.shape != values.shape or tensor.device != values.device:
            raise ValueError(f"{name} is {describe(tensor)}, but values is {describe(values)}")
    if not 1 <= n_buckets <= MAX_BUCKETS:
        raise ValueError(f"n_buckets must be 1 to {MAX_BUCKETS}, not {n_buckets}")
