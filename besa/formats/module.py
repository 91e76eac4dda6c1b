"""A linear whose weight is packed in memory, as transformers' models hold it.

>>> from besa.formats import pack
>>> dense = nn.Linear(64, 32)
>>> linear = SparseLinear(pack(dense.weight), dense.bias)
>>> linear(torch.randn(5, 64)).shape
torch.Size([5, 32])
>>> sorted(linear.state_dict())
['bias', 'weight_bitmask', 'weight_rows', 'weight_values']

Its tensors are buffers under the names of the packed format, so that a state dict is what a file
holds. Buffers, because nothing here can be trained: `besa::sparse_linear` records no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import besa.kernels.linear  # noqa: F401 - the operator
from besa.errors import BesaError
from besa.formats import Packed, tensors_of

# The bit patterns of each type of value, which a cast of the model leaves alone.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class SparseLinear(nn.Module):
    """x W^T + bias with a packed W.

    Attributes:
        in_features, out_features, bias: as in `nn.Linear`.
        weight_values, weight_bitmask, weight_rows, weight_scale: as a file holds them; casts of
            the module, `.to(torch.float16)` and the like, leave their types as they are.
        row_ptr: int64 [out + 1], in no file; None until a module made on the meta device is
            loaded (see `finish_loading`).
        dtype: what the weight becomes when it is unpacked.
        transposed: whether it then is [in, out], as in GPT-2's `Conv1D`.
    """

    bias: nn.Parameter | None
    weight_values: Tensor
    weight_bitmask: Tensor
    weight_rows: Tensor
    weight_scale: Tensor | None
    row_ptr: Tensor | None

    def __init__(
        self,
        packed: Packed,
        bias: nn.Parameter | None = None,
        int8_input: bool = True,
        dtype: torch.dtype | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.group_size = packed.group_size
        self.int8_input = int8_input
        kept = packed.values.dtype
        self.dtype = dtype or (kept if kept.is_floating_point else torch.float32)
        self.transposed = transposed
        self.register_parameter("bias", bias)
        self.register_buffer("weight_scale", None)
        for name, tensor in tensors_of(packed, "weight").items():
            self.register_buffer(name, tensor.to(packed.values.device))
        ready = not packed.row_ptr.is_meta
        self.register_buffer("row_ptr", packed.row_ptr if ready else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], of x's type.

        Raises:
            BesaError: in training, on the way back from the loss the gradient would get lost here.
        """
        if self.training and x.requires_grad:
            raise BesaError(
                "packed weights cannot be trained, nor what comes before them: load the model "
                "dense, with quantization_config=besa.BesaConfig(dense=True)"
            )
        result: Tensor = torch.ops.besa.sparse_linear(
            x,
            self.weight_values,
            self.weight_bitmask,
            self.row_ptr,
            self.weight_scale,
            self.bias,
            self.int8_input,
        )
        return result

    @property
    def packed(self) -> Packed:
        """The weight; shares its tensors."""
        assert self.row_ptr is not None
        return Packed(
            self.weight_values,
            self.weight_bitmask,
            self.row_ptr,
            self.weight_scale,
            self.in_features,
            self.group_size,
        )

    @property
    def weight(self) -> Tensor:
        """The dense weight, of type `dtype`, unpacked anew for each that asks.

        For models that read a weight without calling its linear: right, but as slow as it sounds.
        """
        if self.row_ptr is None:  # transformers' initialization asks, before anything is there
            shape = (self.out_features, self.in_features)
            shape = shape[::-1] if self.transposed else shape
            return torch.empty(shape, dtype=self.dtype, device="meta")
        return self.unpack(self.dtype)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The dense weight, contiguous: [out, in], or [in, out] if `transposed`."""
        weight = self.packed.unpack(dtype)
        return weight.T.contiguous() if self.transposed else weight

    def finish_loading(self) -> None:
        """After its buffers were loaded: checks them, and finds `row_ptr`.

        They stay where they were loaded, as all weights of a model do: in the file's memory map on
        a CPU, which the kernels read as fast (LOG.md).

        Raises:
            FormatError: the buffers are no packed weight.
        """
        packed = Packed.from_tensors(
            self.weight_values,
            self.weight_bitmask,
            self.in_features,
            self.weight_scale,
            self.group_size,
        )
        self.row_ptr = packed.row_ptr

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nonzeros={self.weight_values.numel()}, "
            f"values={str(self.weight_values.dtype).removeprefix('torch.')}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """What `.to` and its like do to every tensor; here they move values, and cast none."""

        def keeping_type(tensor: Any) -> Tensor:
            if isinstance(tensor, nn.Parameter):
                return fn(tensor)
            return fn(tensor.view(_BITS.get(tensor.element_size(), tensor.dtype))).view(
                tensor.dtype
            )

        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(keeping_type, recurse)
        return self
