"""A weight without its zeros: the others' values, and a bitmask of where they are.

>>> weight = torch.tensor([[0.0, 1.5, 0.0, -2.0, 0.0, 0.0, 0.0, 0.5], [0.0] * 8])
>>> packed = pack(weight)
>>> packed.values, packed.bitmask
(tensor([ 1.5000, -2.0000,  0.5000]), tensor([[138],
        [  0]], dtype=torch.uint8))
>>> torch.equal(packed.unpack(), weight)
True
>>> pack(*quantize_int8(weight)).values
tensor([  95, -127,   32], dtype=torch.int8)

Numbers of four bits are two a byte (see besa.kernels.nibbles and besa.formats.int4).

Rows are neither padded nor of one length: pruning leaves them uneven. N:M needs nothing of its own,
its rows happen to be even.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from besa.errors import BesaError
from besa.kernels import nibbles, packing
from besa.kernels.abi import GROUP_SIZES
from besa.kernels.describe import describe
from besa.kernels.linear import INT4


class FormatError(BesaError):
    """Tensors that are no packed weight: cut short, damaged, or of another kind."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [out, in], packed. `pack` and `from_tensors` make one.

    To construct one checks types, shapes and devices. What `row_ptr`, bits and scales say is not
    read: `from_tensors` does that, for tensors that come from elsewhere.

    Attributes:
        values: [nonzeros] bfloat16, float16, float32 or int8, row by row; or int4 numbers, two a
            byte, uint8 [bytes].
        bitmask: uint8 [out, ceil(in / 8)]; column j is bit j % 8 of byte j // 8, and bits past the
            last column are 0.
        row_ptr: int64 [out + 1]; row r has values[row_ptr[r]:row_ptr[r + 1]].
        scale: float32 [out, groups] for int8, [out, 1] for int4, else None; the weight is value ×
            scale.
        steps: uint8 [out, groups] for int4, from 1 to 18, else None; the weight is number × step ×
            scale.
        in_features: the number of columns.
        group_size: how many columns share a scale, or for int4 a step, one of `GROUP_SIZES`, the
            last group of a row perhaps fewer; None if the whole row does.

    Raises:
        FormatError: if a tensor is not as above, or not contiguous, or not on the others' device.
    """

    values: Tensor
    bitmask: Tensor
    row_ptr: Tensor
    scale: Tensor | None
    in_features: int
    group_size: int | None = None
    steps: Tensor | None = None

    def __post_init__(self) -> None:
        _check(self.values, self.bitmask, self.scale, self.in_features, self.group_size, self.steps)
        _expect("row_ptr", self.row_ptr, torch.int64, (len(self.bitmask) + 1,), self.values.device)

    @classmethod
    def from_tensors(
        cls,
        values: Tensor,
        bitmask: Tensor,
        in_features: int,
        scale: Tensor | None = None,
        group_size: int | None = None,
        steps: Tensor | None = None,
    ) -> Packed:
        """A weight from what a file holds of it. Its tensors are kept, not copied.

        Raises:
            FormatError: if they are no packed weight, down to the last bit of the bitmask.
        """
        _check(values, bitmask, scale, in_features, group_size, steps)
        if packing.has_stray_bits(bitmask, in_features):
            raise FormatError(f"bitmask has bits set past its {in_features} columns")
        pointers = packing.row_pointers if steps is None else nibbles.row_pointers
        row_ptr = pointers(bitmask)
        if values.numel() != row_ptr[-1]:
            found, expected = values.numel(), int(row_ptr[-1])
            wanted = f"bitmask {expected} bits set" if steps is None else f"{expected} by bitmask"
            raise FormatError(f"values has {found} elements, but {wanted}")
        _check_scale(scale, steps)
        return cls(values, bitmask, row_ptr, scale, in_features, group_size, steps)

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return torch.Size((len(self.bitmask), self.in_features))

    @property
    def nbytes(self) -> int:
        """Bytes of values, bitmask, scale and steps, as in a file. `row_ptr` is rebuilt at load."""
        parts = (self.values, self.bitmask, self.scale, self.steps)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def nonzeros(self) -> int:
        """How many weights are kept."""
        return self.values.numel() if self.steps is None else nibbles.count(self.bitmask)

    @property
    def density(self) -> float:
        """The fraction of the weight that is not zero; 0 for a weight without elements."""
        return self.nonzeros / max(1, self.shape.numel())

    def to(self, device: torch.device | str) -> Packed:
        """The same weight on another device; tensors that are there already are shared."""
        return self._each(lambda tensor: tensor.to(device))

    def clone(self) -> Packed:
        """The same weight in memory of its own."""
        return self._each(Tensor.clone)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Packed:
        return replace(
            self,
            values=change(self.values),
            bitmask=change(self.bitmask),
            row_ptr=change(self.row_ptr),
            scale=None if self.scale is None else change(self.scale),
            steps=None if self.steps is None else change(self.steps),
        )

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in]: floats bit for bit (-0.0 as +0.0), whole numbers times
        their scale.

        Args:
            dtype: of the result; None takes the values' type, and float32 if they have a scale. The
                product with the scale is taken in float32 and rounded once.

        Raises:
            ValueError: if `dtype` is not floating, or a tensor was changed since it was checked.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"a weight can be unpacked to a floating type, not {dtype}")
        dense = self.unpack_values()
        if self.scale is not None:
            dense = dense.float()
            groups = groups_of(dense, self.group_size if self.steps is None else None)
            scales = self.scale.split([part.shape[1] for part in groups], dim=1)
            for part, scale in zip(groups, scales, strict=True):
                part.mul_(scale.unsqueeze(2))
        return dense if dtype is None else dense.to(dtype)

    def unpack_values(self) -> Tensor:
        """The weight [out, in] but for its scale: floats, or int8, which is number × step for int4.

        Raises:
            ValueError: if a tensor was changed since it was checked, so that they disagree.
        """
        if self.steps is None:
            return packing.expand(self.values, self.bitmask, self.row_ptr, self.in_features)
        return nibbles.expand(self.values, self.bitmask, self.row_ptr, self.steps, self.in_features)

    def unpack_numbers(self) -> Tensor:
        """The same but for the steps as well: what `pack` was given."""
        if self.steps is None:
            return self.unpack_values()
        return nibbles.unpack(self.values, self.bitmask, self.row_ptr, self.in_features)


def pack(
    weight: Tensor,
    scale: Tensor | None = None,
    group_size: int | None = None,
    steps: Tensor | None = None,
) -> Packed:
    """Packs a weight's nonzeros; NaN and infinity are some, -0.0 is none.

    Args:
        weight: [out, in] bfloat16, float16, float32, or int8 with a `scale`; in any layout.
        scale: float32 [out, groups], finite and not negative, for an int8 weight; else None.
        group_size: how many columns share a scale, or a step, one of `GROUP_SIZES`; None: the whole
            row.
        steps: uint8 [out, groups], from 1 to 18, to pack numbers from -7 to 7 in four bits; the
            scale is then [out, 1].

    Returns:
        The packed weight on the same device, with no memory in common with its arguments.

    Raises:
        ValueError: if `weight` is no such matrix.
        FormatError: if `scale` or `group_size` do not belong to it.
    """
    weight = weight.detach().contiguous()
    if steps is None:
        bitmask, row_ptr = packing.pack_mask(weight)
        values = packing.compress(weight, bitmask, row_ptr)
    else:
        values, bitmask, row_ptr = nibbles.pack(weight)
        steps = steps.detach().clone(memory_format=torch.contiguous_format)
    if scale is not None:
        scale = scale.detach().clone(memory_format=torch.contiguous_format)
    packed = Packed(values, bitmask, row_ptr, scale, weight.shape[1], group_size, steps)
    _check_scale(scale, steps)
    return packed


@torch.no_grad()
def quantize_int8(
    weight: Tensor, group_size: int | None = None, peak: int = 127
) -> tuple[Tensor, Tensor]:
    """Rounds a weight to int8 times a scale, symmetrically: the largest of a group becomes ±`peak`.

    Ties round to even. What rounds to 0 is a zero from then on. Weights of four bits, which are
    whole multiples of a seventh of a group's largest, stay what they are with a peak of 126.

    Args:
        weight: [out, in], floating point, in any layout.
        group_size: how many columns share a scale, one of `GROUP_SIZES`; None: the whole row.
        peak: at most 127.

    Returns:
        int8 [out, in] and its scale, float32 [out, groups], 1 for a group of zeros.

    Raises:
        ValueError: if `weight` is no such matrix, has a NaN or infinity, or for another group size.
    """
    check_float(weight, group_size)
    rounded = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = []
    groups = zip(groups_of(weight.float(), group_size), groups_of(rounded, group_size), strict=True)
    for part, target in groups:
        # amax has no answer for groups without columns.
        most = part.abs().amax(2) if part.numel() else part.new_zeros(part.shape[:2])
        if not most.isfinite().all():
            raise ValueError("weight has a NaN or an infinity, which int8 cannot hold")
        scale = most / peak
        # Also where the quotient underflows: all of the group then rounds to 0.
        scale[scale == 0] = 1
        # A scale among the denormals is so coarse that a quotient may exceed the peak.
        target.copy_((part / scale.unsqueeze(2)).round_().clamp_(-peak, peak))
        scales.append(scale)
    return rounded, torch.cat(scales, 1)


def check_float(weight: Tensor, group_size: int | None) -> None:
    """Raises a ValueError for what is no floating-point matrix, or another group size."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a floating-point matrix, not {describe(weight)}")
    if group_size not in (None, *GROUP_SIZES):
        raise ValueError(f"group_size must be None or one of {GROUP_SIZES}, not {group_size}")


def groups_of(matrix: Tensor, group_size: int | None) -> list[Tensor]:
    """Views [out, groups, columns] that make up the matrix: the full groups, then what is left."""
    if group_size is None:
        return [matrix.unsqueeze(1)]
    full, rest = divmod(matrix.shape[1], group_size)
    parts = [matrix[:, : full * group_size].unflatten(1, (full, group_size))]
    return [*parts, matrix[:, None, -rest:]] if rest else parts


def _check(
    values: Tensor,
    bitmask: Tensor,
    scale: Tensor | None,
    in_features: int,
    group_size: int | None,
    steps: Tensor | None,
) -> None:
    """What can be told without reading the tensors."""
    if not isinstance(in_features, int) or in_features < 0:
        raise FormatError(f"in_features must be 0 or more, not {in_features!r}")
    if group_size not in (None, *GROUP_SIZES):
        raise FormatError(f"group_size must be None or one of {GROUP_SIZES}, not {group_size!r}")
    if values.dtype not in (known_dtypes := (*packing.DTYPES, INT4)):
        known = ", ".join(str(dtype) for dtype in known_dtypes)
        raise FormatError(f"values is {describe(values)}, but one of {known} can be packed")
    _expect("values", values, values.dtype, (None,), values.device)
    _expect("bitmask", bitmask, torch.uint8, (None, -(-in_features // 8)), values.device)
    if (values.dtype == INT4) != (steps is not None):
        raise FormatError("steps go with int4 values, and with them only")
    if values.dtype not in (torch.int8, INT4):
        if scale is not None or group_size is not None:
            raise FormatError(f"scale and group_size are for int8 and int4, not {values.dtype}")
        return
    if scale is None:
        raise FormatError("scale is missing: int8 and int4 values need one")
    shape = (len(bitmask), 1 if group_size is None else -(-in_features // group_size))
    if steps is not None:
        _expect("steps", steps, torch.uint8, shape, values.device)
        shape = (len(bitmask), 1)
    _expect("scale", scale, torch.float32, shape, values.device)


def _expect(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    shape: tuple[int | None, ...],
    device: torch.device,
) -> None:
    """`None` in the shape stands for any size."""
    fits = len(shape) == tensor.ndim and all(
        size in (None, found) for size, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != dtype or tensor.device != device:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise FormatError(f"{name} is {describe(tensor)}, not {dtype} [{sizes}] on {device}")
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise FormatError(f"{name} is not contiguous")


def _check_scale(scale: Tensor | None, steps: Tensor | None) -> None:
    """A NaN or an infinity times zero would be no zero, and a sign would make it -0.0."""
    if scale is not None and not (scale.isfinite() & ~scale.signbit()).all():
        raise FormatError("scale has an element that is negative or not finite")
    if steps is not None and steps.numel() and int(steps.max()) > nibbles.MOST_STEP:
        raise FormatError(f"steps has an element above {nibbles.MOST_STEP}")
