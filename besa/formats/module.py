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

On an NVIDIA GPU the weight is laid out for the kernels there, as records (`besa.kernels.cuda`), and
the canonical tensors are gone until they are asked for: by a state dict, by `packed`, or by a move
to another device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from besa.errors import BesaError
from besa.formats import FormatError, Packed, tensors_of
from besa.formats.int4 import in_eight_bits, in_four_bits
from besa.kernels.cuda import linear as gpu
from besa.kernels.cuda.records import Records, fitting, to_packed

# What a file holds of the weight, besides its scale.
_CANONICAL = ("weight_values", "weight_bitmask", "weight_rows")

# The bit patterns of each type of value, which a cast of the model leaves alone.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def keeping_types(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What a move or a cast of a module does to its parameters, and to buffers without a cast."""

    def keeping_type(tensor: Any) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            return fn(tensor)
        return fn(tensor.view(_BITS.get(tensor.element_size(), tensor.dtype))).view(tensor.dtype)

    return keeping_type


def refuse_training(module: nn.Module, x: Tensor) -> None:
    """Raises a BesaError where the gradient to x would get lost in a packed weight."""
    if module.training and x.requires_grad:
        raise BesaError(
            "packed weights cannot be trained, nor what comes before them: load the model "
            "dense, with quantization_config=besa.BesaConfig(dense=True)"
        )


class SparseLinear(nn.Module):
    """x W^T + bias with a packed W.

    Attributes:
        in_features, out_features, bias: as in `nn.Linear`.
        weight_values, weight_bitmask, weight_rows, weight_scale, weight_steps: as a file holds
            them; casts of the module, `.to(torch.float16)` and the like, leave their types alone.
        row_ptr: int64 [out + 1], in no file; None until a module made on the meta device is
            loaded (see `finish_loading`).
        records: the weight on a GPU that besa's kernels run on, where the buffers above but
            `weight_scale` and `weight_steps` are None; else None.
        dtype: what the weight becomes when it is unpacked.
        transposed: whether it then is [in, out], as in GPT-2's `Conv1D`.
    """

    bias: nn.Parameter | None
    weight_values: Tensor | None
    weight_bitmask: Tensor | None
    weight_rows: Tensor | None
    weight_scale: Tensor | None
    weight_steps: Tensor | None
    row_ptr: Tensor | None
    records: Records | None

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
        for name in (*_CANONICAL, "weight_scale", "weight_steps"):
            self.register_buffer(name, None)
        self.register_buffer("row_ptr", None, persistent=False)
        self.records = None
        self._hold(packed)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], of x's type.

        Raises:
            BesaError: in training, on the way back from the loss the gradient would get lost here.
        """
        refuse_training(self, x)
        if self.records is not None:
            return gpu.records_linear(
                x, self.records, self.weight_scale, self.bias, self.int8_input
            )
        result: Tensor = torch.ops.besa.sparse_linear(
            x,
            self.weight_values,
            self.weight_bitmask,
            self.row_ptr,
            self.weight_scale,
            self.bias,
            self.int8_input,
            self.weight_steps,
        )
        return result

    @property
    def packed(self) -> Packed:
        """The weight; shares its tensors, where they are there."""
        if self.records is not None:
            canonical = to_packed(self.records)
            if self.weight_steps is not None:
                eight = Packed(*canonical, self.weight_scale, self.in_features)
                return in_four_bits(eight, self.weight_steps, self.group_size)
        else:
            assert self.weight_values is not None
            assert self.weight_bitmask is not None
            assert self.row_ptr is not None
            canonical = self.weight_values, self.weight_bitmask, self.row_ptr
        return Packed(
            *canonical, self.weight_scale, self.in_features, self.group_size, self.weight_steps
        )

    def _hold(self, packed: Packed) -> None:
        """Takes a weight, as records if it is on a GPU whose kernels take them.

        Raises:
            BesaError: the GPU has no room for the records.
        """
        device, ready = packed.values.device, not packed.row_ptr.is_meta
        # Of int4 values that are yet to be loaded nobody can tell.
        self.nonzeros = packed.nonzeros if ready or packed.steps is None else None
        self.values_dtype = packed.values.dtype
        self._hold_canonical(packed)
        if not ready:
            self.row_ptr = None
        elif gpu.usable(device, packed.values.dtype):
            if packed.steps is not None:  # a GPU's kernels have eight bits
                packed = in_eight_bits(packed)
            with fitting(packed, packed.in_features, device):
                self.records = gpu.records_of(
                    packed, packed.in_features, self.dtype, self.int8_input
                )
            for name in (*_CANONICAL, "row_ptr"):
                setattr(self, name, None)

    def _hold_canonical(self, packed: Packed) -> None:
        """Takes a weight as a file holds it."""
        for name, tensor in tensors_of(packed, "weight").items():
            setattr(self, name, tensor)
        self.row_ptr, self.records = packed.row_ptr, None

    def _as_canonical(self) -> None:
        """Gives the records up for the tensors that a file holds."""
        if self.records is not None:
            self._hold_canonical(self.packed)

    @property
    def weight(self) -> Tensor:
        """The dense weight, of type `dtype`, unpacked anew for each that asks.

        For models that read a weight without calling its linear: right, but as slow as it sounds.
        """
        if self.row_ptr is None and self.records is None:  # transformers' initialization asks
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
        assert self.weight_values is not None
        assert self.weight_bitmask is not None
        try:
            packed = Packed.from_tensors(
                self.weight_values,
                self.weight_bitmask,
                self.in_features,
                self.weight_scale,
                self.group_size,
                self.weight_steps,
            )
        except FormatError as error:
            raise FormatError(f"weight: {error}") from None
        self._hold(packed)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nonzeros={self.nonzeros}, "
            f"values={str(self.values_dtype).removeprefix('torch.')}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """What `.to` and its like do to every tensor; here they move values, and cast none."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self._as_canonical()
        super()._apply(keeping_types(fn), recurse)
        if self.row_ptr is not None:
            self._hold(self.packed)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.records is not None:
            for name, tensor in tensors_of(self.packed, "weight").items():
                destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any) -> None:
        was_ready = self.records is not None or self.row_ptr is not None
        self._as_canonical()
        super()._load_from_state_dict(*args)
        if was_ready:
            self.finish_loading()
